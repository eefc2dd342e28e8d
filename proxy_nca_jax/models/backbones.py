"""The backbones by name: constructors and conventions of published weights.

`published.WEIGHTS` has the weights under the same names.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from proxy_nca_jax.models import foreign_names, rotary, vit
from proxy_nca_jax.models.batch_norm import BatchNorm
from proxy_nca_jax.models.bn_inception import BNInception
from proxy_nca_jax.models.convnext import ConvNeXt
from proxy_nca_jax.models.efficientnet import (
  EfficientNetLite0,
  rename_tensors,
)
from proxy_nca_jax.models.resnet import ResNet
from proxy_nca_jax.models.small_cnn import SmallCNN

_IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

# The pixels of CLIP's training images.
_CLIP_MEAN = (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255)
_CLIP_STD = (0.26862954 * 255, 0.26130258 * 255, 0.27577711 * 255)
_HALF = (127.5,) * 3

_INCEPTION_BLOCKS = ('3a', '3b', '3c', '4a', '4b', '4c', '4d', '4e', '5a', '5b')


@dataclasses.dataclass(frozen=True)
class Backbone:
  """An architecture with the conventions of its published weights.

  Attributes:
    make: builds the module, given `dtype` and the arguments below.
    mean, std: for normalizing each channel in [0, 255], in the channel order of
      the backbone.
    is_bgr: whether the channel order is BGR.
    takes_vectors: whether the input is vectors, float32 [batch, dim], which are
      not normalized.
    has_batch_norm: whether `make` takes `make_norm`.
    has_blocks: whether `make` takes `remat`.
    patch_size: divisor of the image's height and width; 1 for convolutions.
    min_size: least height and width of an image.
    summaries: the poolings that are tokens before the patches, in their order:
      cls and attention.
    pooling: that of the published network; one of `embedding.POOLINGS`.
    layers: a pattern for each layer, from the input on, of the names of its
      modules and parameters.
    dense: names of the dense layers of a block, for LoRA.
    classifier: the module of the published files that is the classifier; ''
      without one.
    unused: further tensors in the published files that an embedding does not
      need.
    one_pixel: dense layers that the published files have as convolutions of 1 x
      1 pixels.
    resampling: method of `pretrained.resample` for position embeddings; None
      without position embeddings.
    rename: maps the names of tensors in other published files to those of the
      modules; None if there are no other files.
  """

  make: Callable[..., nn.Module]
  mean: tuple[float, float, float] = _IMAGENET_MEAN
  std: tuple[float, float, float] = _IMAGENET_STD
  is_bgr: bool = False
  takes_vectors: bool = False
  has_batch_norm: bool = False
  has_blocks: bool = True
  patch_size: int = 1
  min_size: int = 1
  summaries: tuple[str, ...] = ()
  pooling: str = 'average'
  layers: tuple[str, ...] = ()
  dense: tuple[str, ...] = ()
  classifier: str = ''
  unused: tuple[str, ...] = ()
  one_pixel: tuple[str, ...] = ()
  resampling: str | None = None
  rename: Callable[[Mapping], dict] | None = None


class Vectors(nn.Module):
  """Returns vectors as they are; the head is the whole network."""

  dtype: jnp.dtype = jnp.float32

  def __call__(self, vectors: jax.Array, *, train: bool) -> jax.Array:
    del train
    return vectors


def _resnet(stages, is_bottleneck):
  return Backbone(
    functools.partial(ResNet, stages, is_bottleneck),
    has_batch_norm=True,
    layers=(r'(conv|bn)1', *(rf'layer{i}\.\d+' for i in range(1, 5))),
    classifier='fc',
  )


def _vit(
  dim,
  *,
  num_blocks=12,
  patch_size=16,
  dense=('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'),
  summaries=('cls',),
  pooling=None,
  classifier='head',
  unused=(),
  mean=_IMAGENET_MEAN,
  std=_IMAGENET_STD,
  resampling=None,
  rename=None,
  **kwargs,
):
  return Backbone(
    functools.partial(
      vit.ViT,
      patch_size=patch_size,
      dim=dim,
      num_heads=dim // 64,
      num_blocks=num_blocks,
      **kwargs,
    ),
    mean=mean,
    std=std,
    patch_size=patch_size,
    min_size=patch_size,
    summaries=summaries,
    pooling=pooling or summaries[0],
    layers=(
      r'(cls|reg)_token|pos_embed|patch_embed\.proj|norm_pre',
      *(rf'blocks\.{i}' for i in range(num_blocks)),
      'norm|fc_norm|attn_pool',
    ),
    dense=dense,
    classifier=classifier,
    unused=unused,
    resampling=resampling,
    rename=rename,
  )


def _augreg(dim, **kwargs):
  return _vit(
    dim,
    mean=_HALF,
    std=_HALF,
    unused=('pre_logits/kernel', 'pre_logits/bias'),
    resampling='antialiased',
    **kwargs,
  )


def _dino(dim):
  return _vit(
    dim,
    resampling='offset',
  )


def _dinov2(dim, **kwargs):
  return _vit(
    dim,
    patch_size=14,
    style=vit.Style(layer_scale=1e-5),
    # It replaces patches only in its own training.
    unused=('mask_token',),
    resampling='offset',
    **kwargs,
  )


def _dinov2_registers(dim, **kwargs):
  return _vit(
    dim,
    patch_size=14,
    style=vit.Style(layer_scale=1e-5),
    num_registers=4,
    has_class_position=False,
    unused=('mask_token',),
    resampling='antialiased',
    rename=foreign_names.rename_registers,
    **kwargs,
  )


def _tipsv2(dim):
  return _vit(
    dim,
    patch_size=14,
    style=vit.Style(layer_scale=1.0),
    num_registers=1,
    has_class_position=False,
    mean=(0.0,) * 3,
    std=(255.0,) * 3,
    unused=('mask_token',),
    resampling='antialiased',
  )


def _dinov3(dim, is_gated=False, **kwargs):
  dense = ('mlp.fc1_g', 'mlp.fc1_x') if is_gated else ('mlp.fc1',)
  return _vit(
    dim,
    style=vit.Style(
      epsilon=1e-5,
      layer_scale=1e-5,
      has_gammas=True,
      has_qkv_bias=False,
      is_gated=is_gated,
    ),
    rotary=rotary.DINOV3,
    num_registers=4,
    has_positions=False,
    dense=('attn.qkv', 'attn.proj', *dense, 'mlp.fc2'),
    **kwargs,
  )


def _siglip2(dim, **kwargs):
  return _vit(
    dim,
    has_class_token=False,
    has_class_position=False,
    num_pool_heads=dim // 64,
    summaries=('attention',),
    mean=_HALF,
    std=_HALF,
    resampling='antialiased',
    **kwargs,
  )


def _pe_core(dim, **kwargs):
  return _vit(
    dim,
    style=vit.Style(epsilon=1e-5),
    rotary=rotary.PE,
    has_first_norm=True,
    num_pool_heads=8,
    summaries=('attention', 'cls'),
    mean=_HALF,
    std=_HALF,
    # The projection to the space of texts, not a classifier.
    classifier='',
    unused=('head.weight', 'head.bias'),
    resampling='bilinear',
    **kwargs,
  )


def _convnext(depths, widths, is_v2=False, one_pixel=()):
  # The groups of layer-wise decay in the authors' code, optim_factory.py: three
  # blocks in the third stage, whole stages elsewhere.
  def stage(number, blocks):
    return rf'stages\.{number}\.({blocks})'

  third = [
    stage(2, rf'blocks\.({"|".join(map(str, range(i, i + 3)))})')
    for i in range(0, depths[2], 3)
  ]
  third[0] = rf'stages\.2\.downsample\.\d|{third[0]}'
  return Backbone(
    functools.partial(ConvNeXt, depths=depths, widths=widths, is_v2=is_v2),
    min_size=32,
    layers=(
      r'stem\.\d',
      stage(0, '.*'),
      stage(1, '.*'),
      *third,
      stage(3, '.*'),
      r'head\.norm',
    ),
    dense=('mlp.fc1', 'mlp.fc2'),
    classifier='head.fc',
    one_pixel=one_pixel,
  )


_CONVNEXTS = {
  'nano': ((2, 2, 8, 2), (80, 160, 320, 640)),
  'tiny': ((3, 3, 9, 3), (96, 192, 384, 768)),
  'small': ((3, 3, 27, 3), (96, 192, 384, 768)),
  'base': ((3, 3, 27, 3), (128, 256, 512, 1024)),
  'large': ((3, 3, 27, 3), (192, 384, 768, 1536)),
}


def _convnexts(prefix, sizes, **kwargs):
  return {
    f'{prefix}_{size}': _convnext(*_CONVNEXTS[size], **kwargs) for size in sizes
  }


_CLIP_L14 = _vit(
  1024,
  num_blocks=24,
  patch_size=14,
  style=vit.Style(epsilon=1e-5, activation=vit.quick_gelu),
  has_first_norm=True,
  mean=_CLIP_MEAN,
  std=_CLIP_STD,
  # The projection to the space of texts, not a classifier.
  classifier='',
  unused=('head.weight', 'head.bias'),
  resampling='antialiased',
  rename=foreign_names.rename_clip,
)

BACKBONES = {
  'small_cnn': Backbone(
    SmallCNN,
    mean=_HALF,
    std=_HALF,
    has_batch_norm=True,
    has_blocks=False,
    layers=tuple(f'(Conv|BatchNorm)_{i}' for i in range(6)),
  ),
  'bn_inception': Backbone(
    BNInception,
    mean=(104.0, 117.0, 128.0),
    std=(1.0, 1.0, 1.0),
    is_bgr=True,
    has_batch_norm=True,
    layers=(
      'conv1_.*',
      'conv2_.*',
      *(f'inception_{i}_.*' for i in _INCEPTION_BLOCKS),
    ),
    classifier='last_linear',
  ),
  'efficientnet_lite0': Backbone(
    EfficientNetLite0,
    # https://github.com/tensorflow/tpu/blob/master/models/official/efficientnet
    # /lite/efficientnet_lite_builder.py
    mean=(127.0,) * 3,
    std=(128.0,) * 3,
    has_batch_norm=True,
    layers=(
      'conv_stem|bn1',
      *(rf'blocks\.{i}\.\d+' for i in range(7)),
      'conv_head|bn2',
    ),
    classifier='classifier',
    rename=rename_tensors,
  ),
  'vectors': Backbone(Vectors, takes_vectors=True, has_blocks=False),
  'resnet18': _resnet((2, 2, 2, 2), False),
  'resnet50': _resnet((3, 4, 6, 3), True),
  'resnet101': _resnet((3, 4, 23, 3), True),
  'vit_s16': _augreg(384),
  'vit_b16': _augreg(768),
  'vit_l16': _augreg(1024, num_blocks=24),
  'dino_s16': _dino(384),
  'dino_b16': _dino(768),
  'dinov2_s14': _dinov2(384),
  'dinov2_b14': _dinov2(768),
  'dinov2_l14': _dinov2(1024, num_blocks=24),
  'dinov2_s14_reg': _dinov2_registers(384),
  'dinov2_b14_reg': _dinov2_registers(768),
  'dinov2_l14_reg': _dinov2_registers(1024, num_blocks=24),
  'dinov3_s16': _dinov3(384),
  'dinov3_s16_plus': _dinov3(384, is_gated=True),
  'dinov3_b16': _dinov3(768),
  'dinov3_l16': _dinov3(1024, num_blocks=24),
  **_convnexts('dinov3_convnext', ('tiny', 'small', 'base', 'large')),
  **_convnexts('convnext', ('tiny', 'small', 'base')),
  **_convnexts(
    'convnextv2', ('nano',), is_v2=True, one_pixel=('mlp.fc1', 'mlp.fc2')
  ),
  **_convnexts('convnextv2', ('tiny', 'base'), is_v2=True),
  'siglip2_b16': _siglip2(768),
  'siglip2_l16': _siglip2(1024, num_blocks=24),
  'pe_core_b16': _pe_core(768),
  'pe_core_l14': _pe_core(1024, num_blocks=24, patch_size=14),
  'tipsv2_b14': _tipsv2(768),
  'eva02_b14': _vit(
    768,
    patch_size=14,
    style=vit.Style(
      has_split_qkv=True, is_gated=True, has_hidden_norm=True, mlp_ratio=8 / 3
    ),
    rotary=rotary.EVA02,
    has_pooled_norm=True,
    pooling='average',
    dense=(
      *(f'attn.{x}_proj' for x in 'qkv'),
      'attn.proj',
      *(f'mlp.{x}' for x in ('fc1_g', 'fc1_x', 'fc2')),
    ),
    mean=_CLIP_MEAN,
    std=_CLIP_STD,
    unused=('mask_token', 'lm_head.weight', 'lm_head.bias'),
    resampling='antialiased',
    rename=foreign_names.rename_masked,
  ),
  'clip_l14': _CLIP_L14,
  'mlcd_l14': _CLIP_L14,
}


def make_backbone(
  name: str,
  *,
  dtype: jnp.dtype,
  remat: bool,
  batch_norm_momentum: float,
  width: int,
  **kwargs,
) -> nn.Module:
  """Builds a backbone from the arguments that its architecture takes.

  Further arguments replace those of its row, for a smaller network of the same
  family.
  """
  backbone = BACKBONES[name]
  kwargs['dtype'] = dtype
  if backbone.has_batch_norm:
    kwargs['make_norm'] = functools.partial(
      BatchNorm, momentum=batch_norm_momentum, dtype=dtype
    )
  if backbone.has_blocks:
    kwargs['remat'] = remat
  if name == 'small_cnn':
    kwargs['width'] = width
  return backbone.make(**kwargs)
