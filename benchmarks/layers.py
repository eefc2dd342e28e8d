"""Times a network layer by layer beside PyTorch: what bounds its step on CPUs.

python benchmarks/layers.py [--model=small_cnn] [--batch_size=0]
  [--image_size=0] [--rounds=10]

Convolutions, products and normalizations are timed one at a time, each with the
input that it has in the network: the forward pass, and the forward and the
backward pass together. Each library runs in a process of its own, on as many
threads as there are cores: the threads of one would spin beside the other.
Columns are medians over the rounds:

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
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import train_step
from proxy_nca_jax.runtime import huge_pages


class Layer(NamedTuple):
  """A layer of the network, measured.

  Attributes:
    kind: 'normalization', or the size of the filter.
    shape: of its input.
    flops: operations of its forward pass.
    forward: milliseconds of the forward pass.
    step: milliseconds of the forward pass and the gradients.
  """

  kind: str
  shape: tuple[int, ...]
  flops: float
  forward: float
  step: float


def measure(name: str, batch_size: int, size: int, rounds: int) -> list[Layer]:
  """Measures the layers of the network of which none contains another."""
  model = train_step.make_model(name, 'float32', size)
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
    _measure_layer(*leaf, has_images=index == 0, rounds=rounds)
    for index, leaf in enumerate(leaves)
  ]


def _measure_layer(
  module, shape, kwargs, *, has_images: bool, rounds: int
) -> Layer:
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
    forward=time_calls(
      lambda: jax.block_until_ready(forward(params, x)), rounds
    ),
    step=time_calls(
      lambda: jax.block_until_ready(backward(params, x, gradient)), rounds
    ),
  )


def measure_peer(
  name: str, batch_size: int, size: int, rounds: int
) -> list[float]:
  """Returns the milliseconds of the steps of torch's layers."""
  import torch

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
    time_calls(make_step(module, shape, has_images=index == 0), rounds)
    for index, (module, shape) in enumerate(layers)
  ]


def time_calls(function: Callable[[], object], rounds: int) -> float:
  """Returns the median milliseconds of a call, after one that allocates."""
  function()
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    function()
    times.append(1e3 * (time.perf_counter() - start))
  return statistics.median(times)


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
  batch_size, size, *_ = train_step.RECIPES[arguments.model]
  batch_size = arguments.batch_size or batch_size
  size = arguments.image_size or size
  layers, peers = (
    train_step.run_in_process(
      fn, arguments.model, batch_size, size, arguments.rounds
    )
    for fn in (measure, measure_peer)
  )
  for result in (layers, peers):
    if isinstance(result, BaseException):
      raise result
  print(
    f'{arguments.model}, batch {batch_size}, {size} pixels; jax '
    f'{jax.__version__}, torch {metadata.version("torch")}, '
    f'{arguments.rounds} rounds'
  )
  print(
    f'{"layer, input":38}{"GFLOP":>8}{"forward":>9}{"step":>9}'
    f'{"GFLOP/s":>9}{"torch":>9}{"faster":>8}'
  )
  sums = collections.defaultdict(lambda: np.zeros(4))
  for layer, peer in zip(layers, peers, strict=True):
    row = np.array([layer.flops, layer.forward, layer.step, peer])
    shape = ' x '.join(map(str, layer.shape))
    print(format_row(f'{layer.kind}, {shape}', *row), flush=True)
    sums[layer.kind] += row
    sums['all'] += row
  for kind, row in sums.items():
    print(format_row(f'all {kind}' if kind != 'all' else kind, *row))


if __name__ == '__main__':
  huge_pages.restart()
  main()
