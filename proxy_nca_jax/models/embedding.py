"""The embedding network: backbone, pooling, linear head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from proxy_nca_jax.models import backbones

if TYPE_CHECKING:
  # Who builds a network without a config does without the library.
  import ml_collections

POOLINGS = ('average', 'max', 'average_max', 'gem', 'cls')


class Head(nn.Module):
  """Pools over positions and maps to the embedding, in float32 at least.

  Attributes:
    pooling: one of `POOLINGS`: the mean, the maximum, their sum (as
      Proxy-Anchor), the generalised mean of a learned order (Radenovic et al.,
      https://arxiv.org/abs/1711.02512), or the class token of a transformer.
      The others leave the class token out.
    layer_norm: whether what is pooled is normalised, without parameters, as in
      ProxyNCA++.
    embedding_dim: of the result.
    normalize: whether the result has unit norm.
    stddev: of the first linear weights; 0 is LeCun's.
  """

  pooling: str
  layer_norm: bool
  embedding_dim: int
  normalize: bool
  stddev: float

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps [batch, height, width, C] or tokens [batch, n, C] to [batch, D]."""
    at_least_float32 = jnp.promote_types(features.dtype, jnp.float32)
    features = features.astype(at_least_float32)
    pooled = self._pool(features)
    if self.layer_norm:
      # The epsilon of torch.nn.LayerNorm.
      pooled = nn.LayerNorm(
        epsilon=1e-5,
        use_scale=False,
        use_bias=False,
        use_fast_variance=False,
      )(pooled)
    kernel_init = nn.initializers.lecun_normal()
    if self.stddev:
      # Cut at two of the asked standard deviations, as TensorFlow's.
      kernel_init = nn.initializers.truncated_normal(self.stddev)
    embeddings = nn.Dense(
      self.embedding_dim, kernel_init=kernel_init, name='embedding'
    )(pooled)
    if not self.normalize:
      return embeddings
    # 1e-12 keeps the root differentiable at 0 and is lost beside any square
    # of a trained embedding.
    squares = jnp.sum(embeddings**2, axis=1, keepdims=True)
    return embeddings * jax.lax.rsqrt(squares + 1e-12)

  def _pool(self, features):
    if features.ndim == 3:
      if self.pooling == 'cls':
        return features[:, 0]
      features = features[:, 1:]
    else:
      features = features.reshape(features.shape[0], -1, features.shape[-1])
    if self.pooling == 'average':
      return jnp.mean(features, axis=1)
    if self.pooling == 'max':
      return jnp.max(features, axis=1)
    if self.pooling == 'average_max':
      return jnp.mean(features, axis=1) + jnp.max(features, axis=1)
    # The order 3 and the least value are those of the authors' code.
    order = self.param('order', nn.initializers.constant(3.0), ())
    powers = jnp.maximum(features, 1e-6) ** order
    return jnp.mean(powers, axis=1) ** (1 / order)


class EmbeddingModel(nn.Module):
  """Maps images [batch, height, width, 3] to embeddings float32 [batch, D].

  Its parameters are {'backbone', 'head'}, two groups of the optimiser.
  """

  make_backbone: Callable[..., nn.Module]
  make_head: Callable[..., nn.Module]

  def setup(self):
    self.backbone = self.make_backbone()
    self.head = self.make_head()

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    return self.head(self.backbone(images, train=train))


def create_model(config: ml_collections.ConfigDict) -> EmbeddingModel:
  """Builds the network that `config.model` describes.

  Raises:
    ValueError: if a name is unknown, or fields do not fit each other.
  """
  check_model(config)
  config = config.model
  return EmbeddingModel(
    make_backbone=lambda: backbones.make_backbone(
      config.name,
      dtype=jnp.dtype(config.dtype),
      remat=config.remat,
      batch_norm_momentum=config.batch_norm_momentum,
      width=config.width,
    ),
    make_head=lambda: Head(
      pooling=config.pooling,
      layer_norm=config.layer_norm,
      embedding_dim=config.embedding_dim,
      normalize=config.normalize,
      stddev=config.embedding_stddev,
    ),
  )


def check_model(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if `config.model` cannot be built."""
  model, image_size = config.model, config.dataset.image_size
  for field, choices in (
    ('name', backbones.BACKBONES),
    ('dtype', ('float32', 'bfloat16')),
    ('pooling', POOLINGS),
  ):
    if model[field] not in choices:
      raise ValueError(
        f'Unknown config.model.{field} {model[field]!r}: choose one of '
        f'{", ".join(choices)}.'
      )
  for field in ('embedding_dim', 'width'):
    if model[field] < 1:
      raise ValueError(
        f'config.model.{field} ({model[field]}) must be at least 1.'
      )
  if not 0 <= model.batch_norm_momentum < 1:
    raise ValueError(
      f'config.model.batch_norm_momentum ({model.batch_norm_momentum}) must be '
      'in [0, 1): the share of the running statistics that a step keeps.'
    )
  backbone = backbones.BACKBONES[model.name]
  if model.pooling == 'cls' and backbone.patch_size == 1:
    raise ValueError(
      f'{model.name} has no class token (config.model.pooling=cls): choose one '
      f'of {", ".join(POOLINGS[:-1])}.'
    )
  if image_size % backbone.patch_size:
    raise ValueError(
      f'config.dataset.image_size ({image_size}) must be a multiple of '
      f'{backbone.patch_size}, the patches of {model.name}.'
    )
  if model.remat and not backbone.has_blocks:
    raise ValueError(
      f'{model.name} has no blocks to recompute (config.model.remat): set it '
      'to False.'
    )
  if model.freeze_batch_norm_steps and not backbone.has_batch_norm:
    raise ValueError(
      f'{model.name} has no batch statistics to freeze '
      '(config.model.freeze_batch_norm_steps): set it to 0.'
    )
