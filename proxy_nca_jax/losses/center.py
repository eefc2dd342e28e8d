"""Losses around centers that follow the embeddings instead of being learned.

The centers are carried from step to step: a loss takes them as the constant
`centers`, and `update_centers` moves them after the step. All functions compute
in float32 whatever comes in and return the unreduced `float32 [batch]`, 0 for
examples that `where` leaves out. Labels known outside of `jit` are checked
(ValueError); inside, one out of range gives NaN for its example.

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

  Nothing keeps classes apart: alone it is least where all coincide.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch], in [0, num_classes).
    centers: float [num_classes, dim].
    where: bool [batch], examples that count.

  Returns:
    float32 [batch], the loss of each example.
  """
  chex.assert_rank(centers, 2)
  num_classes = centers.shape[0]
  embeddings, where = inputs.prepare(
    embeddings, labels, num_classes=num_classes, where=where
  )
  own = jnp.asarray(centers, jnp.float32).at[labels].get(mode='clip')
  loss = jnp.sum((embeddings - own) ** 2, axis=1) / 2
  return inputs.finish(loss, labels, num_classes, where)


def center_softmax_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  centers: chex.Array,
  weight: float = 0.003,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the softmax loss with center loss of each example.

    loss(x, y) = -log(exp(x.p_y) / sum_c exp(x.p_c)) + weight ||x - c_y||^2 / 2

  (Eq. 5 of Wen et al., without the biases of the softmax; their weight is
  0.003). Nothing is normalised.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim], the softmax's weights.
    labels: int [batch], in [0, num_classes).
    centers: float [num_classes, dim].
    weight: lambda, of the center loss.
    where: bool [batch], examples that count.

  Returns:
    float32 [batch], the loss of each example.
  """
  chex.assert_equal_shape([proxies, centers])
  center = center_loss(embeddings, labels, centers=centers, where=where)
  num_classes = proxies.shape[0]
  embeddings, where = inputs.prepare(
    embeddings, labels, num_classes=num_classes, where=where
  )
  logits = distances.products(embeddings, proxies)
  own = jnp.sum(logits, axis=1, where=inputs.is_class(labels, num_classes))
  loss = jax.nn.logsumexp(logits, axis=1) - own + weight * center
  return inputs.finish(loss, labels, num_classes, where)


def magnet_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  centers: chex.Array,
  alpha: float = 1.0,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the magnet loss of each example.

  With m(x) the nearest of the centers of the example's own class, and s2 the
  sum of ||x - m(x)||^2 over the batch divided by its size less one (Eq. 5 of
  https://arxiv.org/abs/1511.05939),

    loss(x, y) = [-log(exp(-||x - m(x)||^2 / (2 s2) - alpha)
      / sum_{c != y} sum_k exp(-||x - m_ck||^2 / (2 s2)))]_+.

  The paper has k-means find the centers of all embeddings from time to time and
  draws batches around some of them; here `centers` come from anywhere, and s2
  from the batch. The gradient passes through s2.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch], in [0, num_classes).
    centers: float [num_classes, num_centers, dim].
    alpha: the margin, in units of 2 s2.
    where: bool [batch], examples that count.

  Returns:
    float32 [batch], the loss of each example.
  """
  chex.assert_rank(centers, 3)
  num_classes, num_centers, dim = centers.shape
  embeddings, where = inputs.prepare(
    embeddings, labels, num_classes=num_classes, where=where
  )
  squares = distances.squared_distances(embeddings, centers.reshape(-1, dim))
  is_own = jnp.repeat(inputs.is_class(labels, num_classes), num_centers, axis=1)
  own = jnp.min(squares, axis=1, where=is_own, initial=jnp.inf)
  own = jnp.where(jnp.isfinite(own), own, 0)  # A label out of range has none.
  count = jnp.maximum(jnp.sum(where) - 1, 1)
  # Squared distances below this are rounding, where norms are about 1.
  variance = jnp.maximum(jnp.sum(own, where=where) / count, 1e-12)
  scores = -squares / (2 * variance)
  others = masked.log_sum_exp(scores, axis=1, where=~is_own)
  loss = jax.nn.relu(own / (2 * variance) + alpha + others)
  return inputs.finish(loss, labels, num_classes, where)


def update_centers(
  centers: chex.Array,
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  rate: float = 0.5,
  where: chex.Array | None = None,
) -> jax.Array:
  """Moves the centers towards the embeddings of a batch.

    c <- c - rate sum_{x of c} (c - x) / (1 + |{x of c}|)

  (Eq. 4 of Wen et al., whose rate is 0.5). Where a class has several centers,
  an example is of the nearest. A label out of range moves none.

  Args:
    centers: float [num_classes, dim] or [num_classes, num_centers, dim].
    embeddings: float [batch, dim].
    labels: int [batch], in [0, num_classes).
    rate: in (0, 1].
    where: bool [batch], examples that count.

  Returns:
    float32, of the shape of `centers`.
  """
  num_classes, dim = centers.shape[0], centers.shape[-1]
  embeddings, where = inputs.prepare(
    embeddings, labels, num_classes=num_classes, where=where
  )
  where &= (labels >= 0) & (labels < num_classes)
  rows = centers.astype(jnp.float32).reshape(num_classes, -1, dim)
  shifts = rows.at[labels].get(mode='clip') - embeddings[:, None]
  nearest = jnp.argmin(jnp.sum(shifts**2, axis=2), axis=1)
  shifts = jnp.take_along_axis(shifts, nearest[:, None, None], axis=1)[:, 0]
  place = labels, nearest
  counts = jnp.zeros(rows.shape[:2]).at[place].add(where)
  sums = jnp.zeros(rows.shape).at[place].add(shifts * where[:, None])
  moved = rows - rate * sums / (1 + counts[:, :, None])
  return moved.reshape(centers.shape)
