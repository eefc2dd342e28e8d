"""BN-Inception, the backbone of the experiments of Proxy-NCA.

Ioffe and Szegedy, Batch Normalization, ICML 2015,
https://arxiv.org/abs/1502.03167. It follows the Caffe model that the published
weights come from: convolutions have biases, strided pooling rounds the output
size up, and average pooling includes the padding. Modules are named as in the
port of `pretrainedmodels`, so that its weights load without a table of names.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

# Widths of each block's branches: 1x1; reduction, 3x3; reduction, 3x3, 3x3; and
# the pooling with the width of its projection. Blocks without a 1x1 branch and
# a projection halve the resolution.
_BLOCKS = {
  '3a': (64, (64, 64), (64, 96, 96), ('average', 32)),
  '3b': (64, (64, 96), (64, 96, 96), ('average', 64)),
  '3c': (0, (128, 160), (64, 96, 96), ('max', 0)),
  '4a': (224, (64, 96), (96, 128, 128), ('average', 128)),
  '4b': (192, (96, 128), (96, 128, 128), ('average', 128)),
  '4c': (160, (128, 160), (128, 160, 160), ('average', 128)),
  '4d': (96, (128, 192), (160, 192, 192), ('average', 128)),
  '4e': (0, (128, 192), (192, 256, 256), ('max', 0)),
  '5a': (352, (192, 320), (160, 224, 224), ('average', 128)),
  '5b': (352, (192, 320), (192, 224, 224), ('max', 128)),
}


class BNInception(nn.Module):
  """Maps images [batch, height, width, 3] to features [batch, h, w, 1024].

  Attributes:
    make_norm: builds a normalization layer, given its name.
    dtype: compute dtype of the convolutions.
    remat: whether to recompute each block in the backward pass.
  """

  make_norm: Callable[..., nn.Module]
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    def block(module, x, name):
      return module._block(name, x, train)

    if self.remat:
      block = nn.remat(block, static_argnums=(2,))
    x = images.astype(self.dtype)
    x = self._conv('conv1_7x7_s2', 64, 7, x, train, stride=2)
    x = _halve(x)
    x = self._conv('conv2_3x3_reduce', 64, 1, x, train)
    x = self._conv('conv2_3x3', 192, 3, x, train)
    x = _halve(x)
    for name in _BLOCKS:
      x = block(self, x, name)
    return x

  def _block(self, name, x, train):
    pointwise, (reduce, width), double, (pool, projection) = _BLOCKS[name]
    stride = 1 if pointwise else 2
    conv = functools.partial(self._conv, train=train)
    prefix = f'inception_{name}_'
    branches = []
    if pointwise:
      branches.append(conv(prefix + '1x1', pointwise, 1, x))
    y = conv(prefix + '3x3_reduce', reduce, 1, x)
    branches.append(conv(prefix + '3x3', width, 3, y, stride=stride))
    y = conv(prefix + 'double_3x3_reduce', double[0], 1, x)
    y = conv(prefix + 'double_3x3_1', double[1], 3, y)
    branches.append(
      conv(prefix + 'double_3x3_2', double[2], 3, y, stride=stride)
    )
    if stride == 2:
      return jnp.concatenate([*branches, _halve(x)], axis=-1)
    pool_fn = nn.max_pool if pool == 'max' else nn.avg_pool
    y = pool_fn(x, (3, 3), padding=((1, 1), (1, 1)))
    branches.append(conv(prefix + 'pool_proj', projection, 1, y))
    return jnp.concatenate(branches, axis=-1)

  def _conv(self, name, width, size, x, train, stride=1):
    """Applies convolution, normalization, and ReLU."""
    x = nn.Conv(
      width,
      (size, size),
      strides=(stride, stride),
      padding=size // 2,
      kernel_init=nn.initializers.he_normal(),
      dtype=self.dtype,
      name=name,
    )(x)
    return nn.relu(self.make_norm(name=f'{name}_bn')(x, train=train))


def _halve(x):
  """Max-pools 3x3 with stride 2, with the size rounded up as in Caffe."""
  return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)))
