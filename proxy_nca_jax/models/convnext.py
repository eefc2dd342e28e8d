"""ConvNeXt and ConvNeXt V2.

Liu et al., A ConvNet for the 2020s, CVPR 2022,
https://arxiv.org/abs/2201.03545; Woo et al., ConvNeXt V2, CVPR 2023,
https://arxiv.org/abs/2301.00808. Modules are named as in timm.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from proxy_nca_jax.models import convolutions

_init = nn.initializers.truncated_normal(0.02)
# Without a dtype argument, it computes in float32, that of the residual stream.
_norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)
_SIZE = 7


class _Depthwise(nn.Module):
  """Convolves each channel by itself, with a filter of 7 x 7 pixels."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    kernel = self.param('kernel', _init, (_SIZE, _SIZE, 1, channels))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    y = convolutions.depthwise_conv(
      x.astype(self.dtype), kernel.astype(self.dtype), 1
    )
    return y + bias.astype(self.dtype)[None, None, None, :]


class _ResponseNorm(nn.Module):
  """Scales channels by their norm over the image, relative to the others'.

  Global response normalization, equations (1) to (3) of ConvNeXt V2.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1],)
    scale = self.param('scale', nn.initializers.zeros, shape)
    bias = self.param('bias', nn.initializers.zeros, shape)
    x = x.astype(jnp.promote_types(x.dtype, scale.dtype))
    squares = jnp.sum(x**2, axis=(1, 2), keepdims=True)
    # The bound keeps the gradient of the root finite where a channel is 0.
    norms = jnp.sqrt(jnp.maximum(squares, 1e-30))
    relative = norms / (jnp.mean(norms, axis=-1, keepdims=True) + 1e-6)
    return x + scale[None, None, None] * x * relative + bias[None, None, None]


class _Block(nn.Module):
  """A depthwise convolution and an MLP for each pixel, with a shortcut.

  Attributes:
    is_v2: whether the hidden units pass a response norm, instead of a factor
      for each channel before the addition.
    dtype: compute dtype of the convolutions and matmuls.
  """

  is_v2: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    y = _norm(name='norm')(_Depthwise(self.dtype, name='conv_dw')(x))
    y = _dense(4 * channels, self.dtype, 'mlp.fc1')(y)
    y = nn.gelu(y, approximate=False)
    if self.is_v2:
      y = _ResponseNorm(name='mlp.grn')(y)
    y = _dense(channels, self.dtype, 'mlp.fc2')(y)
    if not self.is_v2:
      init = nn.initializers.constant(1e-6)
      y = y * self.param('gamma', init, (channels,))[None, None, None]
    return x + y


class ConvNeXt(nn.Module):
  """Maps images [batch, height, width, 3] to features at 1/32 resolution.

  Attributes:
    depths: number of blocks in each of the four stages.
    widths: number of channels in each.
    is_v2: whether the blocks are those of ConvNeXt V2.
    dtype: compute dtype of the convolutions and matmuls.
    remat: whether to recompute each block in the backward pass.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...]
  is_v2: bool = False
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  def setup(self):
    self.last_norm = _norm(name='head.norm')

  def norm_pooled(self, pooled: jax.Array) -> jax.Array:
    """Normalizes pooled features [batch, channels]."""
    return self.last_norm(pooled)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    del train  # There are no batch statistics and no dropout.
    block = nn.remat(_Block) if self.remat else _Block
    x = _conv(self.widths[0], 4, self.dtype, 'stem.0')(images)
    # The residual stream is at least float32; convolutions may have less.
    x = _norm(name='stem.1')(x)
    for stage, (depth, width) in enumerate(zip(self.depths, self.widths)):
      name = f'stages.{stage}'
      if stage:
        x = _norm(name=f'{name}.downsample.0')(x)
        x = _conv(width, 2, self.dtype, f'{name}.downsample.1')(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      for index in range(depth):
        x = block(self.is_v2, self.dtype, name=f'{name}.blocks.{index}')(x)
    if self.is_initializing():
      self.norm_pooled(x[:, 0, 0])
    return x


def _dense(dim, dtype, name):
  return nn.Dense(dim, kernel_init=_init, dtype=dtype, name=name)


def _conv(width, size, dtype, name):
  """Convolves patches that do not overlap; incomplete ones are left out."""
  return nn.Conv(
    width,
    (size, size),
    strides=(size, size),
    padding='VALID',
    kernel_init=_init,
    dtype=dtype,
    name=name,
  )
