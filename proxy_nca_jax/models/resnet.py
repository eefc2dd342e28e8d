"""ResNet-18, -50 and -101, version 1.5, as in torchvision.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016,
https://arxiv.org/abs/1512.03385. Version 1.5 has the stride of a bottleneck in
its 3x3 convolution. Modules are named as in torchvision, so that its weights
load without a table of names.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn


class _Block(nn.Module):
  """Convolutions with a shortcut, which is projected if the shapes differ.

  Attributes:
    widths: output channels of each convolution.
    sizes: kernel size of each convolution.
    strides: stride of each convolution.
    make_norm: builds a normalization layer, given its name.
    dtype: compute dtype of the convolutions.
  """

  widths: tuple[int, ...]
  sizes: tuple[int, ...]
  strides: tuple[int, ...]
  make_norm: Callable[..., nn.Module]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = x
    specs = zip(self.widths, self.sizes, self.strides)
    for number, (width, size, stride) in enumerate(specs, start=1):
      y = y if number == 1 else nn.relu(y)
      y = _conv(width, size, stride, self.dtype, f'conv{number}')(y)
      y = self.make_norm(name=f'bn{number}')(y, train=train)
    if x.shape != y.shape:
      stride = max(self.strides)
      x = _conv(self.widths[-1], 1, stride, self.dtype, 'downsample.0')(x)
      x = self.make_norm(name='downsample.1')(x, train=train)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """Maps images [batch, height, width, 3] to features at 1/32 resolution.

  Attributes:
    stages: number of blocks in each of the four stages.
    is_bottleneck: whether a block has 1x1, 3x3 and 1x1 convolutions, the last
      with four times the width, or two 3x3 convolutions.
    make_norm: builds a normalization layer, given its name.
    dtype: compute dtype of the convolutions.
    remat: whether to recompute each block in the backward pass.
  """

  stages: tuple[int, ...]
  is_bottleneck: bool
  make_norm: Callable[..., nn.Module]
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
    x = images.astype(self.dtype)
    x = _conv(64, 7, 2, self.dtype, 'conv1')(x)
    x = nn.relu(self.make_norm(name='bn1')(x, train=train))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage, num_blocks in enumerate(self.stages):
      width = 64 * 2**stage
      for index in range(num_blocks):
        stride = 2 if stage and not index else 1
        if self.is_bottleneck:
          shape = ((width, width, 4 * width), (1, 3, 1), (1, stride, 1))
        else:
          shape = ((width, width), (3, 3), (stride, 1))
        x = block(
          *shape, self.make_norm, self.dtype, name=f'layer{stage + 1}.{index}'
        )(x, train)
    return x


def _conv(width, size, stride, dtype, name):
  return nn.Conv(
    width,
    (size, size),
    strides=(stride, stride),
    padding=size // 2,
    use_bias=False,
    kernel_init=nn.initializers.he_normal(),
    dtype=dtype,
    name=name,
  )
