"""Compares the backbones with their torch originals.

python benchmarks/parity.py [models] [--models=resnet18,vit_s16] [--blocks=4]
python benchmarks/parity.py shapes
python benchmarks/parity.py saved
python benchmarks/parity.py bundled
python benchmarks/parity.py trajectory [--models=resnet18] [--steps=50]
python benchmarks/parity.py originals [--models=resnet18]

Needs an environment of its own with this project's requirements, and:
pip install torch torchvision timm pretrainedmodels munch six

`models` builds each original with random weights, writes them to a file in the
format that its authors publish, imports the file, and compares embeddings in
evaluation, and embeddings, running statistics and gradients of all parameters
in a training step. The difference of a tensor is max|a - b| divided by max|b|,
or by 1/1000 of the largest max|b| in the model if that is larger. `--blocks`
compares transformers and ConvNeXts of the same width with fewer blocks.

`shapes` compares names and shapes of the tensors of whole networks with timm's,
and prints how many parameters they have.

`saved` writes tiny networks with their heads as `Embedder.save_timm` does,
loads the files with timm, and compares embeddings, for several poolings.

Rounding can change whether a gradient passes a ReLU with an input near 0, or
which of two nearly equal values a pooling layer selects. A single such case
among millions changes a gradient by percents. Gradients are therefore compared
in two precisions: `gradients` are those of the same float32 weights computed in
float64 by both libraries, `in float32` those computed in float32, and `torch
itself` compares torch in float32 with torch in float64. Gradients of biases
that batch normalization cancels are 0 in theory and are reported separately:
`of zeros` is the size of ours in float32, relative to the model's largest
gradient.

`bundled` compares EfficientNet-Lite0 with the weights that this package
installs: embeddings of random images, with those of timm.

`trajectory` trains both from the same weights, proxies and images by the recipe
of dichotomies/proxy-nca (Adam with epsilon 1, label smoothing, its learning
rates), and compares losses and nearest proxies. As a control, it also trains
the original from weights that differ by at most one float32 unit in the last
place, because rounding errors grow from step to step even within one library.

`originals` writes tests/originals/NAME.npz: names and shapes of the tensors
that an original publishes; and for a small image and the weights of
tests/made_weights.py, the pooled features in evaluation and in training, the
running variance of the deepest layer after training or, for transformers, the
gradient of the features' sum with respect to the class token. Those of
`made_weights.TINY` are networks of a few thousand parameters. It also writes
small files in torch's two formats. A change of these files means that an
original or its input changed.
"""

import argparse
import collections
import copy
import dataclasses
import functools
import json
import math
import pathlib
import sys
import tempfile


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'part',
    nargs='?',
    default='models',
    choices=(
      'models',
      'shapes',
      'saved',
      'bundled',
      'trajectory',
      'originals',
    ),
  )
  parser.add_argument(
    '--models', default='', help='networks, separated by commas'
  )
  parser.add_argument(
    '--blocks', type=int, default=0, help='models: fewer blocks; 0 is all'
  )
  parser.add_argument(
    '--steps', type=int, default=50, help='trajectory: number of steps'
  )
  parser.add_argument(
    '--size', type=int, default=128, help='trajectory: image side in pixels'
  )
  return parser.parse_args()


# Parsed here because --help must work without the packages imported below.
_ARGUMENTS = _parse()

import jax
import jax.numpy as jnp
import numpy as np
import pretrainedmodels
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from torch.nn import functional

_ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / 'tests')]

import made_weights

from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import models, proxies, train_step
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import cub200, default
from proxy_nca_jax.evaluate import embed as embed_lib
from proxy_nca_jax.models import (
  backbones,
  efficientnet,
  embedding,
  pretrained,
  published,
)

_BATCH = 4
_DIM = 64
# The name in timm, and the image size of the published weights.
_TIMM = {
  'vit_s16': ('vit_small_patch16_224', 224),
  'vit_b16': ('vit_base_patch16_224', 224),
  'vit_l16': ('vit_large_patch16_224', 224),
  'dino_s16': ('vit_small_patch16_224', 224),
  'dino_b16': ('vit_base_patch16_224', 224),
  'dinov2_s14': ('vit_small_patch14_dinov2', 518),
  'dinov2_b14': ('vit_base_patch14_dinov2', 518),
  'dinov2_l14': ('vit_large_patch14_dinov2', 518),
  'dinov2_s14_reg': ('vit_small_patch14_reg4_dinov2', 518),
  'dinov2_b14_reg': ('vit_base_patch14_reg4_dinov2', 518),
  'dinov2_l14_reg': ('vit_large_patch14_reg4_dinov2', 518),
  'dinov3_s16': ('vit_small_patch16_dinov3', 256),
  'dinov3_s16_plus': ('vit_small_plus_patch16_dinov3', 256),
  'dinov3_b16': ('vit_base_patch16_dinov3', 256),
  'dinov3_l16': ('vit_large_patch16_dinov3', 256),
  'siglip2_b16': ('vit_base_patch16_siglip_224', 224),
  'siglip2_l16': ('vit_large_patch16_siglip_256', 256),
  'pe_core_b16': ('vit_pe_core_base_patch16_224', 224),
  'pe_core_l14': ('vit_pe_core_large_patch14_336', 336),
  'tipsv2_b14': ('vit_base_patch14_reg1_tipsv2', 448),
  'eva02_b14': ('eva02_base_patch14_224', 224),
  'clip_l14': ('vit_large_patch14_clip_quickgelu_336', 336),
}
_CONVNEXT = {
  **{
    f'{prefix}_{size}': f'convnext_{size}'
    for prefix, sizes in (
      ('convnext', ('tiny', 'small', 'base')),
      ('dinov3_convnext', ('tiny', 'small', 'base', 'large')),
    )
    for size in sizes
  },
  **{f'convnextv2_{x}': f'convnextv2_{x}' for x in ('nano', 'tiny', 'base')},
}
# Transformers that `originals` stores at full size.
_WHOLE = (
  'vit_s16',
  'vit_b16',
  'dino_s16',
  'dino_b16',
  'dinov2_s14',
  'dinov2_b14',
)
# Others are published as safetensors.
_WITH_PTH = (
  'bn_inception',
  'resnet18',
  'resnet50',
  'vit_b16',
  'dino_s16',
  'dino_b16',
  'dinov2_s14',
  'dinov2_b14',
)
_CONVOLUTIONAL = (
  'bn_inception',
  'efficientnet_lite0',
  'resnet18',
  'resnet50',
  'resnet101',
)


def _make_timm(name: str, size: int, **kwargs):
  """Returns a network of timm without its classifier."""
  if name in _CONVNEXT:
    return timm.create_model(_CONVNEXT[name], num_classes=0, **kwargs)
  if name.startswith('pe_core'):
    # timm scales the positions at other sizes; the authors' code does not.
    patches = size // backbones.BACKBONES[name].patch_size
    kwargs |= {'ref_feat_shape': (patches, patches)}
  return timm.create_model(
    _TIMM[name][0], num_classes=0, img_size=size, **kwargs
  )


def _reduce(name: str, num_blocks: int) -> tuple[dict, dict]:
  """Returns arguments of our network and of timm's for fewer blocks."""
  if not num_blocks:
    return {}, {}
  if name in _CONVNEXT:
    return ({'depths': (1, 1, num_blocks, 1)},) * 2
  return {'num_blocks': num_blocks}, {'depth': num_blocks}


class _Original(torch.nn.Module):
  """Pooled features of an original network, and a linear layer."""

  def __init__(self, name: str, size: int, **kwargs):
    super().__init__()
    self.name = name
    if name in _TIMM or name in _CONVNEXT:
      self.backbone = _make_timm(name, size, **kwargs)
      width = self.backbone.num_features
    elif name == 'efficientnet_lite0':
      self.backbone = timm.create_model('tf_efficientnet_lite0', num_classes=0)
      width = self.backbone.num_features
    elif name == 'bn_inception':
      self.backbone = pretrainedmodels.bninception(pretrained=None)
      width = 1024
    else:
      self.backbone = getattr(torchvision.models, name)(weights=None)
      width = self.backbone.fc.in_features
    self.embedding = torch.nn.Linear(width, _DIM)

  def used_parameters(self):
    """Returns all parameters except the classifier of some originals."""
    unused = f'backbone.{backbones.BACKBONES[self.name].classifier}.'
    return [
      value
      for key, value in self.named_parameters()
      if not key.startswith(unused)
    ]

  def features(self, images):
    if backbones.BACKBONES[self.name].pooling == 'cls':
      return self.backbone.forward_features(images)[:, 0]
    if self.name in _TIMM or self.name in _CONVNEXT:
      return self.backbone(images)
    if self.name == 'efficientnet_lite0':
      return self.backbone.forward_features(images).mean((2, 3))
    if self.name == 'bn_inception':
      return self.backbone.features(images).mean((2, 3))
    net = self.backbone
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
      x = stage(x)
    return x.mean((2, 3))

  def forward(self, images):
    return self.embedding(self.features(images))


def _randomize(net: torch.nn.Module) -> None:
  """Randomizes tensors that are initialized as constants or close to 0."""
  generator = torch.Generator().manual_seed(0)
  # Rotary embeddings are buffers outside of the state dict.
  for name, tensor in net.state_dict().items():
    low, high = -0.1, 0.1
    if name.endswith(('weight', 'running_var', 'gamma')):
      low, high = 0.5, 1.5
    is_vector = tensor.ndim == 1 and tensor.is_floating_point()
    is_token = name.endswith(('pos_embed', '_token', 'latent'))
    if is_vector or is_token:
      tensor.data.uniform_(low, high, generator=generator)


def _write(original: _Original, folder: str) -> str:
  """Writes the backbone's weights in its authors' format; returns the path."""
  name, state = original.name, original.backbone.state_dict()
  path = f'{folder}/{name}'
  if name not in _WITH_PTH:
    safetensors.torch.save_file(state, f'{path}.safetensors')
    return f'{path}.safetensors'
  if name == 'bn_inception':
    state = {k: v[None] if v.ndim == 1 else v for k, v in state.items()}
  # The first ResNets were published in torch's format before zip archives.
  is_zip = name != 'resnet18'
  torch.save(state, f'{path}.pth', _use_new_zipfile_serialization=is_zip)
  return f'{path}.pth'


def _make_model(name: str, size: int, dtype: jnp.dtype, **kwargs):
  """Returns our model, and variables of zeros.

  It is not made from a config, which has no float64.
  """

  def make_backbone():
    return backbones.make_backbone(
      name,
      dtype=jnp.dtype(dtype),
      remat=False,
      batch_norm_momentum=0.9,
      width=1,
      **kwargs,
    )

  make_head = functools.partial(
    embedding.Head,
    pooling=backbones.BACKBONES[name].pooling,
    layer_norm=False,
    num_hidden=0,
    embedding_dim=_DIM,
    normalize=False,
    stddev=0.0,
    summaries=backbones.BACKBONES[name].summaries,
  )
  # The images of a comparison are normalized already.
  model = embedding.EmbeddingModel(
    make_backbone,
    make_head,
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    is_bgr=False,
    input_shape=(size, size, 3),
  )
  init = functools.partial(model.init, train=False)
  shapes = jax.eval_shape(
    init, jax.random.key(0), jnp.zeros((1, size, size, 3))
  )
  return model, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)


def _share_weights(name, size, variables, folder, **kwargs):
  """Returns an original with random weights, and our variables with them."""
  torch.manual_seed(0)
  published = _TIMM[name][1] if name in _TIMM else size
  original = _Original(name, published, **kwargs)
  _randomize(original.backbone)
  path = _write(original, folder)
  if published != size:
    original = _resize_positions(original, size, **kwargs)
  variables = dict(variables)
  params, model_state = models.load_weights(
    path, name, variables.pop('params'), variables
  )
  head = original.embedding
  params['head'] = {
    'embedding': {
      'kernel': jnp.asarray(head.weight.detach().numpy().T),
      'bias': jnp.asarray(head.bias.detach().numpy()),
    }
  }
  return original, params, model_state


def _resize_positions(original: _Original, size: int, **kwargs) -> _Original:
  """Adapts an original to an image size, by its authors' interpolation."""
  name, state = original.name, original.state_dict()
  resized = _Original(name, size, **kwargs)
  positions = state.get('backbone.pos_embed')
  if positions is None:
    resized.load_state_dict(state)
    return resized
  old = math.isqrt(positions.shape[1])
  num_first = positions.shape[1] - old**2
  new = size // original.backbone.patch_embed.patch_size[0]
  grid = positions[:, num_first:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
  method = backbones.BACKBONES[name].resampling
  if method == 'antialiased':
    grid = functional.interpolate(
      grid, size=(new, new), mode='bicubic', antialias=True
    )
  elif method == 'bilinear':
    grid = functional.interpolate(grid, size=(new, new), mode='bilinear')
  else:
    scale = (new + 0.1) / old
    grid = functional.interpolate(
      grid, scale_factor=(scale, scale), mode='bicubic'
    )
  grid = grid.permute(0, 2, 3, 1).reshape(1, new**2, -1)
  state['backbone.pos_embed'] = torch.cat(
    [positions[:, :num_first], grid], dim=1
  )
  resized.load_state_dict(state)
  return resized


def _difference(actual, expected, floor: float = 0.0) -> float:
  actual, expected = np.asarray(actual), np.asarray(expected)
  scale = max(np.abs(expected).max(), floor)
  return float(np.abs(actual - expected).max() / scale)


def _step_ours(make_model, params, model_state, images, weights):
  """Returns (gradients and statistics, embeddings) of a training step."""
  model, _ = make_model(dtype=images.dtype)

  @jax.jit
  def step(params, model_state, images, weights):
    def loss_fn(params):
      embeddings, state = model.apply(
        {'params': params, **model_state},
        images,
        train=True,
        mutable=['batch_stats'],
      )
      return jnp.sum(embeddings * weights), (embeddings, state)

    return jax.grad(loss_fn, has_aux=True)(params)

  gradients, (embeddings, state) = step(params, model_state, images, weights)
  tree = {
    'params': gradients['backbone'] | gradients['head'],
    'batch_stats': state.get('batch_stats', {}).get('backbone', {}),
  }
  return _flatten(tree), np.asarray(embeddings)


def _step_original(original, images, weights, params, model_state):
  """Returns the same of an original, in our tree structure."""
  original.zero_grad()
  original.train()
  images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  embeddings = original(images)
  (embeddings * torch.from_numpy(weights)).sum().backward()
  net = original.backbone
  tensors = {
    key: value.grad.numpy()
    for key, value in net.named_parameters()
    if value.grad is not None
  } | {
    key: value.numpy()
    for key, value in net.named_buffers()
    if key in net.state_dict()
  }
  like = {
    'params': params['backbone'],
    'batch_stats': model_state.get('batch_stats', {}).get('backbone', {}),
  }
  tree = pretrained.import_tensors(tensors, like, original.name)
  tree['params'] = tree['params'] | {
    'embedding': {
      'kernel': original.embedding.weight.grad.numpy().T,
      'bias': original.embedding.bias.grad.numpy(),
    }
  }
  return _flatten(tree), embeddings.detach().numpy()


def _compare(name: str, size: int, num_blocks: int) -> dict[str, float]:
  our_kwargs, kwargs = _reduce(name, num_blocks)
  make_model = functools.partial(_make_model, name, size, **our_kwargs)
  model, variables = make_model(dtype=jnp.float32)
  rng = np.random.default_rng(1)
  images = rng.normal(size=(_BATCH, size, size, 3)).astype(np.float32)
  weights = rng.normal(size=(_BATCH, _DIM)).astype(np.float32)
  with tempfile.TemporaryDirectory() as folder:
    original, params, model_state = _share_weights(
      name, size, variables, folder, **kwargs
    )
  trees = (params, model_state)

  original.eval()
  with torch.no_grad():
    expected = original(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
  evaluated = jax.jit(functools.partial(model.apply, train=False))(
    {'params': params, **model_state}, images
  )
  result = {'embeddings': _difference(evaluated, expected)}

  # Copied, because a step changes the running statistics.
  exact_original = copy.deepcopy(original).double()
  theirs, expected = _step_original(original, images, weights, *trees)
  ours, trained = _step_ours(make_model, *trees, images, weights)
  result['trained'] = _difference(trained, expected)
  result['statistics'] = _largest(ours, theirs, 'batch_stats')
  result['in float32'] = _largest(ours, theirs, 'params')
  result['of zeros'] = _largest_cancelled(ours)

  images, weights = images.astype(np.float64), weights.astype(np.float64)
  exact, _ = _step_original(exact_original, images, weights, *trees)
  with jax.enable_x64(True):
    ours, _ = _step_ours(make_model, *trees, images, weights)
  result['gradients'] = _largest(ours, exact, 'params')
  result['torch itself'] = _largest(theirs, exact, 'params')
  return result


def _is_cancelled(key: tuple[str, ...], tree) -> bool:
  """Whether batch normalization cancels this bias."""
  return key[-1] == 'bias' and ('params', f'{key[1]}_bn', 'bias') in tree


def _largest(ours, theirs, group: str) -> float:
  """Returns the largest difference of a group's tensors; NaN if it has none."""
  keys = [
    key for key in theirs if key[0] == group and not _is_cancelled(key, theirs)
  ]
  largest = max((np.abs(theirs[key]).max() for key in keys), default=0)
  return max(
    (_difference(ours[key], theirs[key], floor=1e-3 * largest) for key in keys),
    default=math.nan,
  )


def _largest_cancelled(tree) -> float:
  sizes = {
    key: float(np.abs(value).max())
    for key, value in tree.items()
    if key[0] == 'params'
  }
  zeros = [x for key, x in sizes.items() if _is_cancelled(key, tree)]
  return max(zeros, default=math.nan) / max(sizes.values())


def _flatten(tree) -> dict[tuple[str, ...], np.ndarray]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {tuple(k.key for k in path): np.asarray(x) for path, x in leaves}


def _sizes(name: str) -> tuple[int, ...]:
  if name in _CONVOLUTIONAL:
    return 224, 227, 256
  if name in _CONVNEXT:
    return 224, 250
  return (224, 252) if '14' in name else (224, 256)


def compare_models(names: list[str], num_blocks: int) -> None:
  required = ('embeddings', 'trained', 'statistics', 'gradients')
  titles = (*required, 'in float32', 'torch itself', 'of zeros')
  print(f'{"largest difference":26}' + ''.join(f'{t:>13}' for t in titles))
  worst = 0.0
  for name in names:
    for size in _sizes(name):
      result = _compare(name, size, num_blocks)
      worst = max(
        worst, *(result[t] for t in required if result[t] == result[t])
      )
      print(
        f'{name:22}{size:4}'
        + ''.join(
          ' ' * 13 if math.isnan(result[t]) else f'{result[t]:13.1e}'
          for t in titles
        ),
        flush=True,
      )
      jax.clear_caches()
  print(f'worst of the first four: {worst:.1e}; required: below 1e-4')


def compare_shapes(names: list[str]) -> None:
  """Compares names and shapes of all tensors; prints numbers of parameters."""
  for name in names:
    size = _TIMM[name][1] if name in _TIMM else 224
    with torch.device('meta'):
      state = _make_timm(name, size).state_dict()
    module = backbones.make_backbone(
      name,
      dtype=jnp.dtype('float32'),
      remat=False,
      batch_norm_momentum=0.9,
      width=1,
    )
    variables = jax.eval_shape(
      functools.partial(module.init, train=False),
      jax.random.key(0),
      jnp.zeros((1, size, size, 3)),
    )
    # Arrays that take no memory.
    tensors = {
      key: np.broadcast_to(np.float32(0), tuple(value.shape))
      for key, value in state.items()
    }
    pretrained.match_tensors(tensors, variables, name)
    count = sum(x.size for x in jax.tree.leaves(variables['params']))
    stated = published.WEIGHTS[name].num_parameters
    if count != stated:
      raise ValueError(f'{name} has {count} parameters, not {stated}.')
    print(f'{name:22}{len(tensors):5} tensors {count:13,} parameters')


def _timm_kwargs(tiny: dict) -> dict:
  """Returns arguments of `made_weights.TINY` as timm names them."""
  keys = {
    'dim': 'embed_dim',
    'num_heads': 'num_heads',
    'num_blocks': 'depth',
    'depths': 'depths',
    'widths': 'dims',
  }
  return {keys[key]: value for key, value in tiny.items() if key in keys}


def compare_saved(names: list[str]) -> None:
  """Compares embeddings with those of timm from files that we write."""
  for name in names:
    backbone = backbones.BACKBONES[name]
    size = 2 * backbone.patch_size if backbone.patch_size > 1 else 65
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, size, size, 3)).astype(np.uint8)
    for pooling in dict.fromkeys((backbone.pooling, 'average', 'max')):
      difference = _compare_saved(name, pooling, images)
      print(f'{name:22}{pooling:12}{difference:9.1e}', flush=True)
    jax.clear_caches()


def _compare_saved(name: str, pooling: str, images: np.ndarray) -> float:
  config = default.get_config()
  config.model.name, config.model.pooling = name, pooling
  config.model.embedding_dim = _DIM
  config.dataset.image_size = size = images.shape[1]
  tiny = made_weights.TINY.get(name, {})
  model, variables = _make_model(name, size, jnp.float32, **tiny)
  rng = np.random.default_rng(1)

  def draw(x):
    if x.ndim < 2:
      return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
    scale = math.sqrt(2 / math.prod(x.shape[:-1]))
    return scale * rng.standard_normal(x.shape, np.float32)

  variables = jax.tree.map(draw, variables)
  params = dict(variables).pop('params')
  model_state = {k: v for k, v in variables.items() if k != 'params'}
  content = models.make_file(config, params, model_state)
  with tempfile.TemporaryDirectory() as folder:
    path = f'{folder}/saved.safetensors'
    pathlib.Path(path).write_bytes(content)
    with safetensors.safe_open(path, 'pt') as file:
      facts = {k: json.loads(v) for k, v in file.metadata().items()}
    net = timm.create_model(
      **facts['create_model'], **_timm_kwargs(tiny), checkpoint_path=path
    )
  net.eval()
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()) / 255
  mean, std = (
    torch.tensor(facts[key])[:, None, None] for key in ('mean', 'std')
  )
  with torch.no_grad():
    theirs = net((pixels - mean) / std)
  ours = embedding.EmbeddingModel(
    model.make_backbone,
    functools.partial(model.make_head, pooling=pooling),
    mean=backbones.BACKBONES[name].mean,
    std=backbones.BACKBONES[name].std,
    is_bgr=False,
    input_shape=images.shape[1:],
  )
  apply = jax.jit(functools.partial(ours.apply, train=False))
  return _difference(apply(variables, images), theirs)


def compare_bundled() -> None:
  name = 'efficientnet_lite0'
  path = models.find_weights(models.BUNDLED, name)
  tensors = efficientnet.rename_tensors(pretrained.read_weights(path))
  original = _Original(name, 224)
  original.backbone.load_state_dict(
    {key: torch.tensor(value) for key, value in tensors.items()}, strict=False
  )
  original.eval()
  module = backbones.make_backbone(
    name,
    dtype=jnp.dtype('float32'),
    remat=False,
    batch_norm_momentum=0.9,
    width=1,
  )
  for size in (160, 224):
    images = np.random.default_rng(0).uniform(-1, 1, (8, size, size, 3))
    images = images.astype(np.float32)
    shapes = jax.eval_shape(
      functools.partial(module.init, train=False), jax.random.key(0), images
    )
    variables = pretrained.import_tensors(
      tensors, jax.tree.map(lambda x: jnp.zeros(x.shape), shapes), name
    )
    ours = jax.jit(functools.partial(module.apply, train=False))(
      variables, images
    )
    with torch.no_grad():
      theirs = original.features(
        torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
      )
    difference = _difference(jnp.mean(ours, (1, 2)), theirs)
    print(f'{name}, bundled weights, {size} pixels: {difference:.1e}')


def _make_batches(steps: int, size: int):
  """Yields uint8 images of 20 classes, each a pattern with noise."""
  rng = np.random.default_rng(0)
  patterns = rng.integers(0, 128, (20, size, size, 3))
  for _ in range(steps):
    labels = rng.integers(0, 20, 32)
    noise = rng.integers(0, 128, (32, size, size, 3))
    yield (patterns[labels] + noise).astype(np.uint8), labels


def _torch_loss(embeddings, proxies, labels, smoothing: float):
  """Returns the label-smoothed softmax loss for vectors of norm 3."""
  x = 3 * functional.normalize(embeddings)
  p = 3 * functional.normalize(proxies)
  logs = functional.log_softmax(-(torch.cdist(x, p) ** 2), dim=1)
  others = smoothing / (len(proxies) - 1)
  targets = torch.full_like(logs, others)
  targets[torch.arange(len(labels)), labels] = 1 - smoothing
  return -(targets * logs).sum(dim=1).mean()


def _train_original(original, proxies, config, batches, to_torch):
  """Trains an original in place; returns its losses."""
  for module in original.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      module.momentum = 1 - config.model.batch_norm_momentum
  fields = config.optimizer
  optimizer = torch.optim.Adam(
    [
      {'params': original.used_parameters(), 'lr': fields.head.learning_rate},
      {'params': [proxies], 'lr': fields.proxies.learning_rate},
    ],
    eps=fields.eps,
  )
  schedule = torch.optim.lr_scheduler.StepLR(
    optimizer, fields.head.decay_every, fields.head.decay_rate
  )
  original.train()
  losses = []
  for images, labels in batches:
    optimizer.zero_grad()
    loss = _torch_loss(
      original(to_torch(images)),
      proxies,
      torch.tensor(labels),
      config.loss.proxy_nca.label_smoothing,
    )
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
  return np.array(losses)


def _nudge(tensor: torch.Tensor) -> None:
  """Changes each entry by one unit in the last place, or not at all."""
  generator = torch.Generator().manual_seed(1)
  targets = torch.randint(-1, 2, tensor.shape, generator=generator)
  is_changed = targets != 0
  adjacent = torch.nextafter(tensor.data, targets * torch.inf)
  tensor.data[is_changed] = adjacent[is_changed]


def compare_trajectories(name: str, steps: int, size: int) -> None:
  config = cub200.get_config('dichotomies')
  config.model.name, config.model.init_from = name, ''
  config.dataset.image_size, config.num_steps = size, steps
  for group in ('backbone', 'head', 'proxies'):
    # Epochs of 10 steps, so that the learning rates decay within the run.
    config.optimizer[group].decay_every = 10
  mesh = mesh_lib.make_mesh()
  model = models.create_model(config)
  optimizer = optimizer_lib.make_optimizer(config)
  state = state_lib.create(
    config, model, optimizer, class_sizes=np.ones(20, int), mesh=mesh
  )
  torch.manual_seed(0)
  original = _Original(name, size)
  with tempfile.TemporaryDirectory() as folder:
    params, model_state = models.load_weights(
      _write(original, folder), name, state.params, state.model_state
    )
  state = dataclasses.replace(state, params=params, model_state=model_state)
  head = params['head']['embedding']
  original.embedding.weight.data = torch.tensor(np.asarray(head['kernel']).T)
  original.embedding.bias.data = torch.tensor(np.asarray(head['bias']))
  torch_proxies = torch.nn.Parameter(
    torch.tensor(np.asarray(params['proxies']))
  )
  nudged, nudged_proxies = copy.deepcopy((original, torch_proxies))
  for tensor in nudged.parameters():
    _nudge(tensor)

  step = train_step.make_train_step(
    model, optimizer, train_step.make_loss(config)
  )
  batches = list(_make_batches(steps, size))
  losses = []
  for images, labels in batches:
    batch = {
      'image': images,
      'label': labels.astype(np.int32),
    }
    state, metrics = step(state, mesh_lib.shard_batch(batch, mesh))
    losses.append(float(metrics['loss']))

  def to_torch(images):
    images = models.normalize(
      images, mean=model.mean, std=model.std, is_bgr=model.is_bgr
    )
    return torch.tensor(np.asarray(images).transpose(0, 3, 1, 2))

  theirs = _train_original(original, torch_proxies, config, batches, to_torch)
  control = _train_original(nudged, nudged_proxies, config, batches, to_torch)

  def nearest(net, net_proxies):
    net.eval()
    with torch.no_grad():
      rows = net(to_torch(batches[-1][0])).numpy()
    return proxies.nearest_proxies(
      jnp.asarray(rows), jnp.asarray(net_proxies.detach().numpy())
    )

  embed = embed_lib.make_embed_fn(model, mesh)
  ours = proxies.nearest_proxies(
    embed(state, {'image': batches[-1][0]})['embedding'],
    state.params['proxies'],
  )
  expected = nearest(original, torch_proxies)
  losses = np.array(losses)
  print(
    f'{name}, {steps} steps at {size} pixels, loss {theirs[0]:.4f} to '
    f'{theirs[-1]:.4f}. Largest relative difference of the losses from those '
    'of the original up to each step, and agreement of the nearest proxies:'
  )
  rows = {
    'ours': (losses, ours),
    'original, weights 1 ulp apart': (
      control,
      nearest(nudged, nudged_proxies),
    ),
  }
  for title, (values, nearest_indices) in rows.items():
    differences = np.maximum.accumulate(np.abs(values / theirs - 1))
    cells = ''.join(
      f'  {k}: {differences[k - 1]:.1e}'
      for k in (1, 2, 5, 10, 20, steps)
      if k <= steps
    )
    same = np.mean(nearest_indices == expected)
    print(f'  {title:40}{cells}; {100 * same:.0f}% the same', flush=True)


_DEEP = {
  'bn_inception': 'inception_5b_pool_proj_bn.running_var',
  'efficientnet_lite0': 'bn2.running_var',
  'resnet18': 'layer4.1.bn2.running_var',
  'resnet50': 'layer4.2.bn3.running_var',
  'resnet101': 'layer4.2.bn3.running_var',
}


def store_original(name: str) -> None:
  """Writes the expected values that the tests of a network compare with."""
  is_vit = name in _TIMM
  patch = backbones.BACKBONES[name].patch_size
  size = 2 * patch if is_vit else 64
  original = _Original(name, _TIMM[name][1] if is_vit else size)
  shapes = {
    key: tuple(value.shape)
    for key, value in original.backbone.state_dict().items()
  }
  original.backbone.load_state_dict(
    {
      key: torch.from_numpy(made_weights.make_tensor(key, shape))
      for key, shape in shapes.items()
    }
  )
  if is_vit:
    original = _resize_positions(original, size)
  images = made_weights.make_images(size).transpose(0, 3, 1, 2)
  images = torch.from_numpy(images.copy())
  original.eval()
  evaluated = original.features(images).detach()
  original.train()
  trained = original.features(images)
  trained.sum().backward()
  result = {
    'names': list(shapes),
    'shapes': [str(shape) for shape in shapes.values()],
    'size': size,
    'evaluated': evaluated.numpy(),
    'trained': trained.detach().numpy(),
  }
  if is_vit:
    result['token_gradient'] = original.backbone.cls_token.grad
  if name in _DEEP:
    result['deep_variance'] = original.backbone.state_dict()[_DEEP[name]]
  np.savez_compressed(_ROOT / 'tests' / 'originals' / f'{name}.npz', **result)


def store_tiny(name: str) -> None:
  """Writes the same of a tiny network of a family, at its own image size."""
  kwargs = _timm_kwargs(made_weights.TINY[name])
  size = made_weights.tiny_size(backbones.BACKBONES[name].patch_size)
  net = _make_timm(name, size, **kwargs)
  shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
  net.load_state_dict(
    {
      key: torch.from_numpy(made_weights.make_tensor(key, shape))
      for key, shape in shapes.items()
    }
  )
  images = made_weights.make_images(size).transpose(0, 3, 1, 2)
  images = torch.from_numpy(images.copy()).requires_grad_()
  features = net(images)
  result = {
    'names': list(shapes),
    'shapes': [str(shape) for shape in shapes.values()],
    # Of class tokens, by timm's default; those of DINOv3 are averages.
    'features': features.detach().numpy(),
  }
  features.sum().backward()
  first = net.blocks[0].norm1 if name in _TIMM else net.stages[2].blocks[0].norm
  result['gradient'] = first.weight.grad.numpy()
  np.savez_compressed(_ROOT / 'tests' / 'originals' / f'{name}.npz', **result)


def store_files() -> None:
  """Writes small files in torch's two formats, and their tensors."""
  square = torch.arange(12.0).reshape(3, 4)
  state = {
    'module.weight': torch.nn.Parameter(square[:, 1:].T),
    'module.bias': square[1],
    'module.half': torch.tensor([1.5, -2], dtype=torch.float16),
    'module.bfloat16': torch.tensor([1.5, -2], dtype=torch.bfloat16),
    'module.count': torch.tensor(7),
    'module.empty': torch.zeros(0, 3),
  }
  folder = _ROOT / 'tests' / 'originals'
  for kind, is_zip in (('zip', True), ('stream', False)):
    torch.save(
      {'epoch': 3, 'state_dict': collections.OrderedDict(state)},
      folder / f'{kind}.pth',
      _use_new_zipfile_serialization=is_zip,
    )
  np.savez(
    folder / 'tensors.npz',
    **{
      name.removeprefix('module.'): tensor.detach().float().numpy()
      for name, tensor in state.items()
    },
  )


def main() -> None:
  arguments = _ARGUMENTS
  torch.set_num_threads(2)
  print(
    f'jax {jax.__version__} and torch {torch.__version__}, '
    f'{jax.devices()[0].device_kind}'
  )
  names = [name for name in arguments.models.split(',') if name]
  if arguments.part == 'models':
    compare_models(
      names or [*_CONVOLUTIONAL, *_TIMM, *_CONVNEXT], arguments.blocks
    )
  elif arguments.part == 'saved':
    compare_saved(
      names or [*made_weights.TINY, 'resnet18', 'efficientnet_lite0']
    )
  elif arguments.part == 'shapes':
    compare_shapes(names or [*_TIMM, *_CONVNEXT])
  elif arguments.part == 'bundled':
    compare_bundled()
  elif arguments.part == 'originals':
    whole = (*_CONVOLUTIONAL, *_WHOLE)
    for name in names or [*whole, *made_weights.TINY]:
      (store_tiny if name in made_weights.TINY else store_original)(name)
    if not names:
      store_files()
  else:
    for name in names or ['resnet18', 'bn_inception']:
      compare_trajectories(name, arguments.steps, arguments.size)


if __name__ == '__main__':
  main()
