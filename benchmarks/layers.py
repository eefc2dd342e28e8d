"""Times a network layer by layer beside PyTorch: what bounds its step on CPUs.

python benchmarks/layers.py [--model=small_cnn] [--batch_size=0]
  [--image_size=0] [--rounds=10]

Convolutions, products and normalizations are timed one at a time, each with the
input that it has in the network: the forward pass, and the forward and the
backward pass together. Both libraries run in one process, alternately, on two
threads; columns are medians over the rounds:

  GFLOP         operations of the forward pass, counted by XLA
  forward, step milliseconds of the forward pass, and with the gradients of
                input and parameters; images have no gradient
  GFLOP/s       operations of three forward passes over the time of the step
  torch         PyTorch's time of the step, without torch.compile

The last rows add up the layers of a kind. What the step of the network takes
beyond their sum is activations, the loss and the optimizer. torch's
normalization of EfficientNet includes the activation.

Needs: pip install torch timm
"""

import argparse
import collections
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import train_step
from proxy_nca_jax.runtime import huge_pages


class Layer(NamedTuple):
  """A layer of the network.

  Attributes:
    kind: 'normalization', or the size of the filter.
    shape: of its input.
    flops: operations of its forward pass.
    forward: computes it.
    step: computes it and its gradients.
  """

  kind: str
  shape: tuple[int, ...]
  flops: float
  forward: callable
  step: callable


def find_layers(model, batch_size: int, size: int) -> list[Layer]:
  """Returns the layers of a Flax network of which none contains another."""
  leaves, num_calls = [], 0

  def record(next_fn, args, kwargs, context):
    nonlocal num_calls
    num_calls += 1
    before = num_calls
    result = next_fn(*args, **kwargs)
    if num_calls == before and context.module.variables.get('params'):
      module = context.module.clone(parent=None, name=None)
      leaves.append((module, args[0].shape, kwargs))
    return result

  with nn.intercept_methods(record):
    jax.eval_shape(
      lambda key, x: model.init(key, x, train=True),
      jax.random.key(0),
      jnp.zeros((batch_size, size, size, 3), jnp.uint8),
    )
  # The head is not among the layers of images.
  leaves = [leaf for leaf in leaves if len(leaf[1]) == 4]
  return [
    _make_layer(*leaf, has_images=index == 0)
    for index, leaf in enumerate(leaves)
  ]


def _make_layer(module, shape, kwargs, *, has_images: bool) -> Layer:
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  variables = module.init(jax.random.key(0), x, **kwargs)
  params = variables['params']
  rest = {name: tree for name, tree in variables.items() if name != 'params'}

  def apply(params, x):
    y, _ = module.apply(
      {'params': params, **rest}, x, mutable=['batch_stats'], **kwargs
    )
    return y

  gradient = jax.tree.map(
    lambda y: jnp.ones(y.shape), jax.eval_shape(apply, params, x)
  )

  def step(params, x, gradient):
    if has_images:
      return jax.vjp(lambda params: apply(params, x), params)[1](gradient)
    return jax.vjp(apply, params, x)[1](gradient)

  lowered = jax.jit(apply).lower(params, x)
  kernel = params.get('kernel')
  forward = lowered.compile()
  backward = jax.jit(step).lower(params, x, gradient).compile()
  kind = 'normalization'
  if kernel is not None:
    depthwise = ', depthwise' if kernel.shape[2] < shape[-1] else ''
    kind = f'{kernel.shape[0]}x{kernel.shape[1]}{depthwise}'
  return Layer(
    kind=kind,
    shape=shape,
    flops=lowered.cost_analysis().get('flops', 0),
    forward=lambda: jax.block_until_ready(forward(params, x)),
    step=lambda: jax.block_until_ready(backward(params, x, gradient)),
  )


def find_torch_steps(name: str, batch_size: int, size: int) -> list[callable]:
  """Returns the functions that compute torch's layers and their gradients."""
  _, _, pooling, layer_norm, dim = train_step.RECIPES[name]
  net = train_step.make_peer(
    name, size, pooling=pooling, layer_norm=layer_norm, dim=dim
  )
  net = net.to(memory_format=torch.channels_last).train()
  layers = []
  for module in net.backbone.modules():
    if isinstance(module, torch.nn.Conv2d | torch.nn.BatchNorm2d):
      module.register_forward_hook(
        lambda module, args, _: layers.append((module, args[0].shape))
      )
  with torch.no_grad():
    net(torch.zeros(batch_size, 3, size, size))
  for module, _ in layers:
    module._forward_hooks.clear()

  def make_step(module, shape, has_images):
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    x.requires_grad_(not has_images)
    with torch.no_grad():
      gradient = torch.ones_like(module(x))
    return lambda: module(x).backward(gradient)

  return [
    make_step(module, shape, has_images=index == 0)
    for index, (module, shape) in enumerate(layers)
  ]


def time_alternately(functions, rounds: int) -> list[float]:
  """Returns the median milliseconds of each function."""
  times = [[] for _ in functions]
  for number in range(rounds + 1):
    for function, values in zip(functions, times):
      start = time.perf_counter()
      function()
      if number:  # The first call allocates.
        values.append(1e3 * (time.perf_counter() - start))
  return [statistics.median(values) for values in times]


def format_row(title, flops, forward, step, peer) -> str:
  return (
    f'{title:38}{flops / 1e9:8.2f}{forward:9.1f}{step:9.1f}'
    f'{3 * flops / step / 1e6:9.0f}{peer:9.1f}{peer / step:8.2f}'
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--model',
    default='small_cnn',
    choices=('small_cnn', 'efficientnet_lite0', 'resnet50'),
    help='network (default: small_cnn)',
  )
  for name, value, text in (
    ('batch_size', 0, 'batch size; 0 is that of the recipe'),
    ('image_size', 0, 'image side in pixels; 0 is that of the recipe'),
    ('rounds', 10, 'repetitions of each measurement'),
  ):
    parser.add_argument(f'--{name}', type=int, default=value, help=text)
  arguments = parser.parse_args()
  torch.set_num_threads(2)
  batch_size, size, *_ = train_step.RECIPES[arguments.model]
  batch_size = arguments.batch_size or batch_size
  size = arguments.image_size or size
  layers = find_layers(
    train_step.make_model(arguments.model, 'float32'), batch_size, size
  )
  peers = find_torch_steps(arguments.model, batch_size, size)
  print(
    f'{arguments.model}, batch {batch_size}, {size} pixels; jax '
    f'{jax.__version__}, torch {torch.__version__}, {arguments.rounds} rounds'
  )
  print(
    f'{"layer, input":38}{"GFLOP":>8}{"forward":>9}{"step":>9}'
    f'{"GFLOP/s":>9}{"torch":>9}{"faster":>8}'
  )
  sums = collections.defaultdict(lambda: np.zeros(4))
  for layer, peer in zip(layers, peers, strict=True):
    times = time_alternately(
      [layer.forward, layer.step, peer], arguments.rounds
    )
    row = np.array([layer.flops, *times])
    shape = ' x '.join(map(str, layer.shape))
    print(format_row(f'{layer.kind}, {shape}', *row), flush=True)
    sums[layer.kind] += row
    sums['all'] += row
  for kind, row in sums.items():
    print(format_row(f'all {kind}' if kind != 'all' else kind, *row))


if __name__ == '__main__':
  huge_pages.restart()
  main()
