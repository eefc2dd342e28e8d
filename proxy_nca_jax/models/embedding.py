"""The embedding network: backbone, pooling, linear head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from proxy_nca_jax.models.small_cnn import SmallCNN

BACKBONES = {'small_cnn': SmallCNN}


class Head(nn.Module):
  """Averages over positions and maps to the embedding, in float32."""

  embedding_dim: int
  normalize: bool

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    pooled = jnp.mean(features.astype(jnp.float32), axis=(1, 2))
    embeddings = nn.Dense(self.embedding_dim, name='embedding')(pooled)
    if not self.normalize:
      return embeddings
    # 1e-12 keeps the root differentiable at 0 and is lost beside any square
    # of a trained embedding.
    squares = jnp.sum(embeddings**2, axis=1, keepdims=True)
    return embeddings * jax.lax.rsqrt(squares + 1e-12)


class EmbeddingModel(nn.Module):
  """Maps images [batch, height, width, 3] to embeddings float32 [batch, D].

  Its parameters are {'backbone', 'head'}, two groups of the optimiser.
  """

  make_backbone: Callable[..., nn.Module]
  embedding_dim: int
  normalize: bool

  def setup(self):
    self.backbone = self.make_backbone()
    self.head = Head(self.embedding_dim, self.normalize)

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    return self.head(self.backbone(images, train=train))


def create_model(config: ml_collections.ConfigDict) -> EmbeddingModel:
  """Builds the network that `config.model` describes.

  Raises:
    ValueError: if the name or the dtype is unknown, or a size is not positive.
  """
  config = config.model
  if config.name not in BACKBONES:
    raise ValueError(
      f'Unknown model {config.name!r} (config.model.name): choose one of '
      f'{", ".join(sorted(BACKBONES))}.'
    )
  if config.dtype not in ('float32', 'bfloat16'):
    raise ValueError(
      f'Unknown dtype {config.dtype!r} (config.model.dtype): choose float32 or '
      'bfloat16.'
    )
  for field in ('embedding_dim', 'width'):
    if config[field] < 1:
      raise ValueError(
        f'config.model.{field} ({config[field]}) must be at least 1.'
      )
  backbone, width, dtype = (
    BACKBONES[config.name],
    config.width,
    jnp.dtype(config.dtype),
  )
  return EmbeddingModel(
    make_backbone=lambda: backbone(width=width, dtype=dtype),
    embedding_dim=config.embedding_dim,
    normalize=config.normalize,
  )
