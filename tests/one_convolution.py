"""small_cnn with one convolution of its six: whole runs compile soon.

In another process, --config=tests/one_convolution.py:glyphs is that of
configs/glyphs.py with this network.
"""

import dataclasses
import importlib
from unittest import mock

from flax import linen as nn

from proxy_nca_jax.models import backbones, small_cnn

_RECIPES = {'image_folder': ('scratch',)}


class _OneConvolution(small_cnn.SmallCNN):
  @nn.compact
  def __call__(self, images, *, train):
    x = images.astype(self.dtype)
    x = nn.Conv(self.width, (8, 8), strides=(8, 8), use_bias=False)(x)
    return nn.relu(self.make_norm()(x, train=train))


def replaced():
  """Returns a context in which this network is small_cnn."""
  backbone = dataclasses.replace(
    backbones.BACKBONES['small_cnn'], make=_OneConvolution
  )
  return mock.patch.dict(backbones.BACKBONES, small_cnn=backbone)


def get_config(name):
  replaced().start()
  module = importlib.import_module(f'proxy_nca_jax.configs.{name}')
  return module.get_config(*_RECIPES.get(name, ()))
