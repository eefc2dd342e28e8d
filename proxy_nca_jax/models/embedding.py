"""The embedding network: backbone, pooling, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from proxy_nca_jax.models import backbones

if TYPE_CHECKING:
  # benchmarks/train_step.py runs without ml_collections.
  import ml_collections

POOLINGS = (
  'average',
  'max',
  'average_max',
  'gem',
  'cls',
  'attention',
  'published',
)


class Head(nn.Module):
  """Pools over positions and projects to the embedding, in float32 or wider.

  Attributes:
    pooling: one of `POOLINGS` but published: the mean, the maximum, their sum
      (as in Proxy-Anchor), the generalized mean with a learned exponent
      (Radenovic et al., https://arxiv.org/abs/1711.02512), or a token of a
      transformer that summarizes the image: the class token (cls) or the output
      of its own attention pool (attention). The others ignore these tokens.
    layer_norm: whether pooled features pass a LayerNorm without parameters, as
      in ProxyNCA++.
    num_hidden: number of hidden units, with ReLU; 0 is a linear head.
    embedding_dim: dimension of the embeddings.
    normalize: whether embeddings have unit norm.
    stddev: standard deviation of the initial projection; 0 is LeCun's.
    summaries: the tokens before the patches, as of `Backbone`.
  """

  pooling: str
  layer_norm: bool
  num_hidden: int
  embedding_dim: int
  normalize: bool
  stddev: float
  summaries: tuple[str, ...] = ('cls',)

  def setup(self):
    if self.pooling == 'gem':
      self.order = self.param('order', nn.initializers.constant(3.0), ())
    kernel_init = nn.initializers.lecun_normal()
    if self.stddev:
      # Truncated at two standard deviations, as TensorFlow's.
      kernel_init = nn.initializers.truncated_normal(self.stddev)
    if self.num_hidden:
      self.hidden = nn.Dense(self.num_hidden)
    self.embedding = nn.Dense(self.embedding_dim, kernel_init=kernel_init)

  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps features, as `pool` takes them, to embeddings [batch, D]."""
    return self.project(self.pool(features))

  def pool(
    self,
    features: jax.Array,
    norm: Callable[[jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """Pools over positions.

    Args:
      features: [batch, height, width, C], tokens [batch, n, C], or vectors
        [batch, C], which have no positions.
      norm: the backbone's norm of pooled features, if it has one.

    Returns:
      float32 or wider, [batch, C].
    """
    at_least_float32 = jnp.promote_types(features.dtype, jnp.float32)
    pooled = self._pool(features.astype(at_least_float32))
    if norm:
      pooled = norm(pooled)
    if not self.layer_norm:
      return pooled
    # The epsilon of torch.nn.LayerNorm.
    mean = jnp.mean(pooled, axis=1, keepdims=True)
    var = jnp.var(pooled, axis=1, keepdims=True)
    return (pooled - mean) * jax.lax.rsqrt(var + 1e-5)

  def project(self, pooled: jax.Array) -> jax.Array:
    """Maps pooled features [batch, C] to embeddings [batch, D]."""
    if self.num_hidden:
      pooled = nn.relu(self.hidden(pooled))
    embeddings = self.embedding(pooled)
    if not self.normalize:
      return embeddings
    # 1e-12 keeps the square root differentiable at 0; beside the squared norm
    # of a trained embedding it rounds away.
    squares = jnp.sum(embeddings**2, axis=1, keepdims=True)
    return embeddings * jax.lax.rsqrt(squares + 1e-12)

  def _pool(self, features):
    if features.ndim == 2:
      return features
    if features.ndim == 3:
      if self.pooling in self.summaries:
        return features[:, self.summaries.index(self.pooling)]
      features = features[:, len(self.summaries) :]
    else:
      features = features.reshape(features.shape[0], -1, features.shape[-1])
    if self.pooling == 'average':
      return jnp.mean(features, axis=1)
    if self.pooling == 'max':
      return jnp.max(features, axis=1)
    if self.pooling == 'average_max':
      return jnp.mean(features, axis=1) + jnp.max(features, axis=1)
    # The exponent 3 and the lower bound are those of the authors' code.
    powers = jnp.maximum(features, 1e-6) ** self.order
    return jnp.mean(powers, axis=1) ** (1 / self.order)


class EmbeddingModel(nn.Module):
  """Maps images, or vectors, to embeddings, float32 [batch, dim].

  Its parameters are {'backbone', 'head'}, two groups of the optimizer.

  Attributes:
    make_backbone, make_head: build the two modules.
    mean, std: of the pixels, float [3], in the backbone's channel order.
    is_bgr: whether the backbone's weights expect blue first.
    input_shape: the shape of one input: an image's (height, width, 3) of uint8,
      or a vector's (dim,) of float32, which is not normalized.
  """

  make_backbone: Callable[..., nn.Module]
  make_head: Callable[..., nn.Module]
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  is_bgr: bool
  input_shape: tuple[int, ...]

  def example(self, batch_size: int) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a batch of inputs."""
    dtype = jnp.uint8 if len(self.input_shape) == 3 else jnp.float32
    return jax.ShapeDtypeStruct((batch_size, *self.input_shape), dtype)

  def setup(self):
    self.backbone = self.make_backbone()
    self.head = self.make_head()

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    return self.project(self.features(images, train=train))

  def features(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images to the pooled features that the head projects."""
    features = self._backbone(images, train=train)
    return self.head.pool(features, getattr(self.backbone, 'norm_pooled', None))

  def project(self, features: jax.Array) -> jax.Array:
    """Maps pooled features to embeddings."""
    return self.head.project(features)

  def _backbone(self, images, *, train):
    if len(self.input_shape) == 3:
      images = normalize(
        images, mean=self.mean, std=self.std, is_bgr=self.is_bgr
      )
    return self.backbone(images, train=train)


def normalize(
  images: jax.Array,
  *,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
  is_bgr: bool = False,
) -> jax.Array:
  """Maps RGB images uint8 [..., 3] to (x - mean) / std, float32.

  With `is_bgr` the channels of the result, of `mean` and of `std` are BGR.
  """
  if is_bgr:
    images = images[..., ::-1]
  shape = (1,) * (images.ndim - 1) + (3,)
  mean, std = (jnp.asarray(x).reshape(shape) for x in (mean, std))
  return (images - mean) / std


def create_model(
  config: ml_collections.ConfigDict, *, vector_dim: int | None = None
) -> EmbeddingModel:
  """Builds the network that `config.model` describes.

  Args:
    config: the run's config.
    vector_dim: the dimension of the vectors; None for a network of images.
  """
  size, config = config.dataset.image_size, config.model
  backbone = backbones.BACKBONES[config.name]
  return EmbeddingModel(
    make_backbone=lambda: backbones.make_backbone(
      config.name,
      dtype=jnp.dtype(config.dtype),
      remat=config.remat,
      batch_norm_momentum=config.batch_norm_momentum,
      width=config.width,
    ),
    make_head=lambda: Head(
      pooling=(
        backbone.pooling if config.pooling == 'published' else config.pooling
      ),
      layer_norm=config.layer_norm,
      num_hidden=config.head_hidden,
      embedding_dim=config.embedding_dim,
      normalize=config.normalize,
      stddev=config.embedding_stddev,
      summaries=backbone.summaries,
    ),
    mean=backbone.mean,
    std=backbone.std,
    is_bgr=backbone.is_bgr,
    input_shape=(vector_dim,) if backbone.takes_vectors else (size, size, 3),
  )
