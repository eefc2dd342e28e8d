"""Losses with centers that track the embeddings instead of being learned.

Centers are part of the training state: a loss takes them as a constant, and
`update_centers` moves them after the step. All losses compute in float32,
whatever the input dtype, and return the unreduced `float32 [batch]`, 0 for
masked examples. A label out of range raises ValueError if it is concrete; under
`jit` its loss is NaN.

References:
  Wen et al., A Discriminative Feature Learning Approach for Deep Face
    Recognition, ECCV 2016
  Rippel et al., Metric Learning with Adaptive Density Discrimination, ICLR
    2016, https://arxiv.org/abs/1511.05939
"""

import chex
import jax
import jax.numpy as jnp

from proxy_nca_jax import distances
from proxy_nca_jax.losses import inputs, masked


def center_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  centers: chex.Array,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the center loss of each example.

    loss(x, y) = ||x - c_y||^2 / 2    (Eq. 2 of Wen et al.)

  It does not separate classes: by itself it is minimal where all coincide.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch], in [0, num_classes).
    centers: float [num_classes, dim].
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.
  """
  chex.assert_rank(centers, 2)
  num_classes = centers.shape[0]
  embeddings, where = inputs.validate(
    embeddings, labels, num_classes=num_classes, where=where
  )
  targets = jnp.asarray(centers, jnp.float32).at[labels].get(mode='clip')
  loss = jnp.sum((embeddings - targets) ** 2, axis=1) / 2
  return inputs.mask_loss(loss, labels, num_classes, where)


def center_softmax_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  centers: chex.Array,
  weight: float = 0.003,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the softmax loss plus center loss of each example.

    loss(x, y) = -log(exp(x.p_y) / sum_c exp(x.p_c)) + weight ||x - c_y||^2 / 2

  (Eq. 5 of Wen et al., without biases; the weight 0.003 is theirs). Neither
  embeddings nor proxies are normalized.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim], the weights of the softmax.
    labels: int [batch], in [0, num_classes).
    centers: float [num_classes, dim].
    weight: lambda, the weight of the center loss.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.
  """
  chex.assert_equal_shape([proxies, centers])
  num_classes = proxies.shape[0]
  embeddings, where = inputs.validate(
    embeddings, labels, num_classes=num_classes, where=where
  )
  center = center_loss(embeddings, labels, centers=centers, where=where)
  logits = distances.products(embeddings, proxies)
  is_target = inputs.one_hot(labels, num_classes)
  targets = jnp.sum(logits, axis=1, where=is_target)
  loss = jax.nn.logsumexp(logits, axis=1) - targets + weight * center
  return inputs.mask_loss(loss, labels, num_classes, where)


def magnet_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  centers: chex.Array,
  alpha: float = 1.0,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the magnet loss of each example.

  With m(x) the nearest center of the example's class, and the variance s2 =
  1/(N - 1) sum ||x - m(x)||^2 over the batch (Eq. 5 of
  https://arxiv.org/abs/1511.05939),

    loss(x, y) = [-log(exp(-||x - m(x)||^2 / (2 s2) - alpha)
      / sum_{c != y} sum_k exp(-||x - m_ck||^2 / (2 s2)))]_+.

  The paper recomputes the centers by k-means of all embeddings, and samples
  batches from neighboring clusters. Here the centers are an argument, and
  batches are arbitrary. The gradient passes through s2.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch], in [0, num_classes).
    centers: float [num_classes, num_centers, dim].
    alpha: the margin, in units of 2 s2.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.
  """
  chex.assert_rank(centers, 3)
  num_classes, num_centers, dim = centers.shape
  embeddings, where = inputs.validate(
    embeddings, labels, num_classes=num_classes, where=where
  )
  squares = distances.squared_distances(embeddings, centers.reshape(-1, dim))
  is_target = jnp.repeat(
    inputs.one_hot(labels, num_classes), num_centers, axis=1
  )
  targets = jnp.min(squares, axis=1, where=is_target, initial=jnp.inf)
  # A label out of range has no centers.
  targets = jnp.where(jnp.isfinite(targets), targets, 0)
  count = jnp.maximum(jnp.sum(where) - 1, 1)
  # With norms of about 1, smaller squared distances are rounding errors.
  variance = jnp.maximum(jnp.sum(targets, where=where) / count, 1e-12)
  scores = -squares / (2 * variance)
  others = masked.log_sum_exp(scores, axis=1, where=~is_target)
  loss = jax.nn.relu(targets / (2 * variance) + alpha + others)
  return inputs.mask_loss(loss, labels, num_classes, where)


def update_centers(
  centers: chex.Array,
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  rate: float = 0.5,
  where: chex.Array | None = None,
) -> jax.Array:
  """Moves centers toward the embeddings of a batch.

    c <- c - rate sum_{x of c} (c - x) / (1 + |{x of c}|)

  (Eq. 4 of Wen et al., whose rate is 0.5). If a class has several centers, an
  example moves the nearest. A label out of range moves none.

  Args:
    centers: float [num_classes, dim] or [num_classes, num_centers, dim].
    embeddings: float [batch, dim].
    labels: int [batch], in [0, num_classes).
    rate: step size, in (0, 1].
    where: bool [batch], examples to include; by default all.

  Returns:
    float32, of the shape of `centers`.
  """
  num_classes, dim = centers.shape[0], centers.shape[-1]
  embeddings, where = inputs.validate(
    embeddings, labels, num_classes=num_classes, where=where
  )
  where = where & (labels >= 0) & (labels < num_classes)
  rows = jnp.asarray(centers, jnp.float32).reshape(num_classes, -1, dim)
  shifts = rows.at[labels].get(mode='clip') - embeddings[:, None]
  nearest = jnp.argmin(jnp.sum(shifts**2, axis=2), axis=1)
  shifts = jnp.take_along_axis(shifts, nearest[:, None, None], axis=1)[:, 0]
  index = labels, nearest
  counts = jnp.zeros(rows.shape[:2]).at[index].add(where)
  sums = jnp.zeros(rows.shape).at[index].add(shifts * where[:, None])
  moved = rows - rate * sums / (1 + counts[:, :, None])
  return moved.reshape(centers.shape)
