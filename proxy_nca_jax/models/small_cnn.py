"""A small convolutional network for images of 32 to 64 pixels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from proxy_nca_jax.models import convolutions


def _conv(x, kernel, strides, padding, **unused) -> jax.Array:
  """`convolutions.conv` as nn.Conv calls it."""
  return convolutions.conv(x, kernel, strides[0], padding[0])


class SmallCNN(nn.Module):
  """Three stages of two 3x3 convolutions, each stage at half the resolution.

  Even the first convolution has stride 2: at full resolution it would take more
  time than all others on CPUs. The stages have `width`, 2 `width` and 4 `width`
  channels. Padding is symmetric, one pixel on each side.
  """

  width: int
  make_norm: Callable[..., nn.Module]
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x = images.astype(self.dtype)
    for stage in range(3):
      for stride in (2, 1):
        x = nn.Conv(
          self.width * 2**stage,
          kernel_size=(3, 3),
          strides=(stride, stride),
          padding=1,
          use_bias=False,
          dtype=self.dtype,
          conv_general_dilated=_conv,
        )(x)
        x = nn.relu(self.make_norm()(x, train=train))
    return x
