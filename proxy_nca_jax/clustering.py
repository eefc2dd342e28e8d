"""k-means: jitted, blocked, the same result for the same seed."""

import functools

import chex
import jax
import jax.numpy as jnp


@functools.partial(
  jax.jit, static_argnames=('num_clusters', 'max_iterations', 'block_size')
)
def kmeans(
    points: chex.Array,
    *,
    num_clusters: int,
    key: chex.PRNGKey,
    max_iterations: int = 20,
    block_size: int = 1024,
) -> tuple[jax.Array, jax.Array]:
  """Clusters points by Lloyd's algorithm from randomly chosen points.

  Stops when no assignment changes. A cluster that loses all its points starts
  again at the point farthest from its centroid, the next such cluster at the
  next farthest. 20 iterations are FAISS's `niter` in the peers' evaluations.

  Args:
    points: float [num_points, dim].
    num_clusters: in [1, num_points].
    key: for the choice of the first centroids.
    max_iterations: at most so many updates of the centroids.
    block_size: points whose distances to all centroids are held at once.

  Returns:
    (assignments, centroids): int32 [num_points], the nearest of the centroids
    float32 [num_clusters, dim].

  Raises:
    ValueError: if there are fewer points than clusters.
  """
  num_points = points.shape[0]
  if not 1 <= num_clusters <= num_points:
    raise ValueError(
      f'num_clusters ({num_clusters}) must be in [1, {num_points}], the number '
      'of points.'
    )
  points = points.astype(jnp.float32)
  assign = functools.partial(_assign, points, block_size=block_size)

  def update(state):
    assignments, distances, _, _, iteration = state
    centroids = _centroids(points, assignments, distances, num_clusters)
    new, distances = assign(centroids)
    changed = jnp.any(new != assignments)
    return new, distances, centroids, changed, iteration + 1

  def unfinished(state):
    *_, changed, iteration = state
    return changed & (iteration < max_iterations)

  chosen = jax.random.choice(key, num_points, (num_clusters,), replace=False)
  centroids = points[chosen]
  state = (*assign(centroids), centroids, True, 0)
  assignments, _, centroids, _, _ = jax.lax.while_loop(
    unfinished, update, state
  )
  return assignments, centroids


def _assign(points, centroids, *, block_size):
  """Returns each point's nearest centroid and squared distance to it."""
  half_norms = jnp.sum(centroids**2, axis=1) / 2

  def assign_block(block):
    # argmin ||x - c||^2 = argmax x.c - ||c||^2 / 2.
    scores = jnp.dot(block, centroids.T, precision=jax.lax.Precision.HIGHEST)
    scores -= half_norms[None, :]
    best = jnp.argmax(scores, axis=1).astype(jnp.int32)
    distances = jnp.sum(block**2, axis=1) - 2 * jnp.max(scores, axis=1)
    return best, distances

  num_points, dim = points.shape
  block_size = min(block_size, num_points)
  padding = -num_points % block_size
  blocks = jnp.pad(points, ((0, padding), (0, 0)))
  best, distances = jax.lax.map(
    assign_block, blocks.reshape(-1, block_size, dim)
  )
  return best.reshape(-1)[:num_points], distances.reshape(-1)[:num_points]


def _centroids(points, assignments, distances, num_clusters):
  """Returns the means of the clusters, empty ones refilled."""
  sums = jax.ops.segment_sum(points, assignments, num_clusters)
  sizes = jax.ops.segment_sum(
    jnp.ones_like(distances), assignments, num_clusters
  )
  farthest = jnp.argsort(-distances)[:num_clusters]
  empty = sizes == 0
  refill = points[farthest[jnp.cumsum(empty) - 1]]
  means = sums / jnp.maximum(sizes, 1)[:, None]
  return jnp.where(empty[:, None], refill, means)
