"""k-means by Lloyd's algorithm: jitted, blocked, and reproducible.

The result is bitwise the same on any number of devices and for any block size.

Assignment is one matrix product of points and centroids, most of which can be
skipped: the scores of a centroid that did not move are still valid, so a point
whose centroid stayed is compared only with the centroids that moved. Means are
accumulated in fixed point: integer addition is associative, so the order of
points and devices does not matter.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from proxy_nca_jax import blocked

# Centroids that k-means++ draws between two products with all points.
_ROUND = 256
# Bits of the significand of a float32.
_FLOAT32_BITS = 24


class Clusters(NamedTuple):
  """The result of k-means.

  Attributes:
    assignments: int32 [num_points], the nearest centroid, ties by index.
    centroids: float32 [num_clusters, dim].
    inertia: float32 [], the sum of squared distances to the nearest centroids.
    num_iterations: int32 [], the number of updates of the centroids.
  """

  assignments: jax.Array
  centroids: jax.Array
  inertia: jax.Array
  num_iterations: jax.Array


class _State(NamedTuple):
  """The state of Lloyd's algorithm between two updates.

  Attributes:
    scores: float32 [num_rows], each point's largest score, see `_assign`.
    ids: int32 [num_rows], the centroid with that score.
    centroids: float32 [num_clusters, dim].
    inertia: float32 [].
  """

  scores: jax.Array
  ids: jax.Array
  centroids: jax.Array
  inertia: jax.Array


def kmeans(
  points: chex.Array,
  *,
  num_clusters: int,
  key: chex.PRNGKey | None = None,
  init: str | chex.Array = 'random',
  n_init: int = 1,
  max_iterations: int = 20,
  tolerance: float = 0.0,
  mesh: jax.sharding.Mesh | None = None,
  axis_name: str | None = None,
  block_size: int = 1024,
  progress: Callable[[int], object] | None = None,
) -> Clusters:
  """Clusters points by Lloyd's algorithm.

  An empty cluster is moved to the point farthest from its centroid, the next
  empty one to the next farthest point. 20 iterations are FAISS's `niter` in
  other evaluations of metric learning.

  Args:
    points: float [num_points, dim], finite.
    num_clusters: in [1, num_points].
    key: of `jax.random.key`, for the initial centroids; unused if they are
      given.
    init: 'random' draws distinct points uniformly. 'k-means++' draws points in
      proportion to their squared distance to the nearest centroid so far
      (Arthur and Vassilvitskii, 2007). An array float [num_clusters, dim] holds
      the initial centroids.
    n_init: number of runs with different initial centroids, of which the one
      with the smallest inertia is returned.
    max_iterations: maximum number of updates of the centroids. A run ends
      earlier when no assignment changes.
    tolerance: a run also ends when the inertia decreases by at most this
      fraction; 0 disables this.
    mesh: the devices that the points are sharded over, along `axis_name`; by
      default one device. Every process passes all points and gets all
      assignments.
    axis_name: of the mesh.
    block_size: maximum number of points, and of centroids, in one product;
      rounded up to a multiple of 64. The result does not depend on it.
    progress: called with 1 after each update of the centroids.

  Returns:
    The clusters.

  Raises:
    ValueError: if `num_clusters`, `n_init` or `max_iterations` is out of range,
      or `init` is unknown.
  """
  chex.assert_rank(points, 2)
  num_points, dim = points.shape
  if not 1 <= num_clusters <= num_points:
    raise ValueError(
      f'num_clusters ({num_clusters}) must be in [1, {num_points}], the number '
      'of points.'
    )
  if n_init < 1 or max_iterations < 0:
    raise ValueError(
      f'n_init ({n_init}) must be at least 1, and max_iterations '
      f'({max_iterations}) must not be negative.'
    )
  if not isinstance(init, str):
    chex.assert_shape(init, (num_clusters, dim))
    key, n_init = jax.random.key(0), 1
    init, centroids = 'given', jnp.asarray(init, jnp.float32)
  elif init in _CHOOSE:
    centroids = jnp.zeros((num_clusters, dim))
  else:
    raise ValueError(
      f"Unknown init {init!r}: choose 'random' or 'k-means++', or give the "
      'centroids.'
    )
  layout = blocked.make_layout(mesh, axis_name, block_size, num_points)
  padding = -num_points % (layout.num_devices * layout.block_size)
  points = blocked.as_float32(points)
  # Points on the host are sharded from there: no device holds them all.
  pad = jnp.pad if isinstance(points, jax.Array) else np.pad
  points = layout.put(pad(points, ((0, padding), (0, 0))))
  best, least = None, float('inf')
  for run_key in jax.random.split(key, n_init):
    state = _initialize(points, centroids, run_key, init=init, layout=layout)
    num_iterations, continues = 0, True
    # The loop is on the host, so that signals are handled between updates.
    while continues and num_iterations < max_iterations:
      state, continues = _update(points, state, tolerance, layout=layout)
      num_iterations += 1
      if progress:
        progress(1)
    if best is None or float(state.inertia) < least:
      best, least = (state, num_iterations), float(state.inertia)
  state, num_iterations = best
  return Clusters(
    _gather(state.ids, layout=layout),
    state.centroids,
    state.inertia,
    jnp.int32(num_iterations),
  )


def _specs(layout: blocked.Layout):
  """Returns the specs of (points, state, replicated arrays)."""
  rows, replicated = layout.sharded, blocked.REPLICATED
  return rows, _State(rows, rows, replicated, replicated), replicated


@functools.partial(jax.jit, static_argnames=('init', 'layout'))
def _initialize(points, centroids, key, *, init, layout):
  """Assigns the points to the initial centroids, given or drawn."""

  def initialize(points, centroids, key):
    num_clusters = centroids.shape[0]
    if init != 'given':
      indices = _CHOOSE[init](points, key, num_clusters, layout)
      centroids = layout.look_up(points, indices)
    squares = _squares(points)
    scores, ids = _assign(
      points,
      centroids,
      jnp.ones(num_clusters, bool),
      squares,
      jnp.zeros(squares.shape, jnp.int32),
      layout=layout,
    )
    return _State(scores, ids, centroids, _inertia(squares, scores, layout))

  rows, state, replicated = _specs(layout)
  return layout.on_each(initialize, (rows, replicated, replicated), state)(
    points, centroids, key
  )


@functools.partial(jax.jit, static_argnames='layout')
def _update(points, state, tolerance, *, layout):
  """Moves the centroids to the means; returns (state, whether to continue)."""

  def update(points, state, tolerance):
    squares, num_clusters = _squares(points), state.centroids.shape[0]
    means = _means(
      points,
      state.ids,
      num_clusters,
      _scale(points, layout),
      _distances(squares, state.scores, layout),
      layout,
    )
    has_moved = jnp.any(means != state.centroids, axis=1)
    scores, ids = _assign(
      points, means, has_moved, state.scores, state.ids, layout=layout
    )
    inertia = _inertia(squares, scores, layout)
    has_changed = jnp.any(layout.gather(ids != state.ids))
    has_decreased = state.inertia - inertia > tolerance * state.inertia
    continues = has_changed & (has_decreased | (tolerance == 0))
    return _State(scores, ids, means, inertia), continues

  rows, specs, replicated = _specs(layout)
  return layout.on_each(update, (rows, specs, replicated), (specs, replicated))(
    points, state, tolerance
  )


@functools.partial(jax.jit, static_argnames='layout')
def _gather(ids, *, layout):
  return layout.on_each(layout.gather, (layout.sharded,), blocked.REPLICATED)(
    ids
  )


def _distances(squares, scores, layout):
  """Returns the squared distances of all points to their centroids."""
  return layout.gather(jnp.maximum(squares - 2 * scores, 0))


def _inertia(squares, scores, layout):
  # The barrier keeps XLA from fusing the sum with code that depends on the
  # number of devices, which would change the order of summation.
  distances = _distances(squares, scores, layout)
  return jnp.sum(jax.lax.optimization_barrier(distances))


def _choose_uniformly(points, key, num_clusters, layout):
  """Draws distinct points uniformly: int32 [num_clusters]."""
  del points
  return jax.random.choice(key, layout.num_rows, (num_clusters,), replace=False)


def _choose_plus_plus(points, key, num_clusters, layout):
  """Draws points by k-means++, exactly, by rejection sampling in rounds.

  k-means++ draws each point in proportion to its weight, the squared distance
  to the nearest centroid so far. Updating all weights after every draw would
  take one pass over the points per centroid. Instead, a round draws from the
  weights at its start, and accepts a point with the probability

    weight now / weight at the start of the round,

  the weight now being the minimum of the weight at the start and the squared
  distances to the centroids of this round. One product updates all weights
  after the round. Since the acceptance rate falls with each new centroid, a
  round at most doubles their number, with at most 4 trials per new centroid.
  """
  num_points, dim = layout.num_rows, points.shape[1]
  squares = _squares(points)
  slots = jnp.arange(_ROUND)

  def distances(centroids, is_used):
    """Returns squared distances of all points to the nearest used centroid."""
    half_norms = jnp.where(is_used, jnp.sum(centroids**2, axis=1) / 2, jnp.inf)

    def compare(rows):
      scores, _ = _nearest(rows, centroids, half_norms, slots)
      return scores

    blocks = points.reshape(-1, layout.block_size, dim)
    scores = jax.lax.map(compare, blocks).reshape(-1)
    return _distances(squares, scores, layout)

  def draw(state, weights, cumulative, count):
    """Draws one point, and adds it to the centroids of the round or not."""
    centroids, chosen, num_new, num_trials = state
    total = cumulative[-1]
    uniform = jax.random.uniform(
      jax.random.fold_in(jax.random.fold_in(key, count), num_trials), (2,)
    )
    index = jnp.searchsorted(cumulative, uniform[0] * total, side='right')
    # If every point coincides with a centroid, draw uniformly.
    index = jnp.where(total > 0, index, uniform[0] * num_points)
    index = jnp.minimum(index.astype(jnp.int32), num_points - 1)
    point = layout.look_up(points, index[None])
    weight = jnp.min(
      jnp.sum((point - centroids) ** 2, axis=1),
      initial=weights[index],
      where=slots < num_new,
    )
    is_accepted = (uniform[1] * weights[index] < weight) | (total == 0)
    is_slot = is_accepted & (slots == num_new)
    return (
      jnp.where(is_slot[:, None], point, centroids),
      jnp.where(is_slot, index, chosen),
      num_new + is_accepted,
      num_trials + 1,
    )

  def run_round(state):
    weights, indices, count = state
    most = jnp.minimum(jnp.minimum(count, _ROUND), num_clusters - count)
    cumulative = jnp.cumsum(weights)
    centroids, chosen, num_new, _ = jax.lax.while_loop(
      lambda state: (state[2] < most) & (state[3] < 4 * most),
      lambda state: draw(state, weights, cumulative, count),
      (
        jnp.zeros((_ROUND, dim)),
        jnp.full(_ROUND, num_points, jnp.int32),
        jnp.int32(0),
        jnp.int32(0),
      ),
    )
    weights = jnp.minimum(weights, distances(centroids, slots < num_new))
    indices = indices.at[count + slots].set(chosen, mode='drop')
    # Rounding leaves a chosen point at a small distance from itself.
    return weights.at[chosen].set(0, mode='drop'), indices, count + num_new

  first = jax.random.randint(key, (1,), 0, num_points)
  centroids = jnp.zeros((_ROUND, dim))
  centroids = centroids.at[0].set(layout.look_up(points, first)[0])
  weights = distances(centroids, slots == 0).at[first].set(0)
  indices = jnp.zeros(num_clusters, jnp.int32).at[0].set(first[0])
  _, indices, _ = jax.lax.while_loop(
    lambda state: state[2] < num_clusters,
    run_round,
    (weights, indices, jnp.int32(1)),
  )
  return indices


_CHOOSE = {'random': _choose_uniformly, 'k-means++': _choose_plus_plus}


def _assign(points, centroids, has_moved, scores, ids, *, layout):
  """Finds the nearest centroid of each point.

  argmin ||x - c||^2 = argmax x.c - ||c||^2 / 2, the score.

  Points are sorted so that those whose centroid has moved come first. Their
  blocks are compared with all centroids, the other blocks only with those that
  have moved:

                               all centroids | moved ones first
    points that lost theirs    x x x x x x x | . . . . . . .
    other points               . . . . . . . | x x . . . . .

  Args:
    points: float32 [num_rows, dim].
    centroids: float32 [num_clusters, dim].
    has_moved: bool [num_clusters], whether a centroid has moved since `scores`
      and `ids` were found.
    scores: float32 [num_rows], each point's largest score.
    ids: int32 [num_rows], the centroid with that score.
    layout: of the points.

  Returns:
    The scores and ids for these centroids.
  """
  size, num_clusters = layout.block_size, centroids.shape[0]
  half_norms = jnp.sum(centroids**2, axis=1) / 2
  width = min(size, blocked.round_up(num_clusters))
  padding = (0, -num_clusters % width)
  order = [jnp.arange(num_clusters), jnp.argsort(~has_moved)]
  order = jnp.concatenate(
    [jnp.pad(part, padding, constant_values=num_clusters) for part in order]
  )
  num_blocks = order.shape[0] // width // 2
  num_moved = -(-jnp.sum(has_moved) // width)
  is_lost = has_moved[ids]
  point_order = jnp.argsort(~is_lost)
  num_lost = jnp.sum(is_lost)
  scores = jnp.where(is_lost, -jnp.inf, scores)

  def assign_block(block):
    index, point_indices = block
    rows = points[point_indices]

    def compare(index, best):
      centroid_indices = blocked.get_block(order, index, width)
      scores, ids = _nearest(
        rows,
        centroids.at[centroid_indices].get(mode='clip'),
        half_norms.at[centroid_indices].get(mode='fill', fill_value=jnp.inf),
        centroid_indices,
      )
      is_better = (scores > best[0]) | ((scores == best[0]) & (ids < best[1]))
      return jnp.where(is_better, scores, best[0]), jnp.where(
        is_better, ids, best[1]
      )

    has_lost = index * size < num_lost
    return jax.lax.fori_loop(
      jnp.where(has_lost, 0, num_blocks),
      num_blocks + jnp.where(has_lost, 0, num_moved),
      compare,
      (scores[point_indices], ids[point_indices]),
    )

  blocks = point_order.reshape(-1, size)
  assigned = jax.lax.map(assign_block, (jnp.arange(len(blocks)), blocks))
  return tuple(
    old.at[point_order].set(new.reshape(-1))
    for old, new in zip((scores, ids), assigned)
  )


def _nearest(points, centroids, half_norms, ids):
  """Returns the largest score of each point, and the least id that has it."""
  scores = blocked.similarities(centroids, points)
  scores -= half_norms[:, None]
  best = jnp.max(scores, axis=0)
  # An argmax takes three times as long on CPUs.
  is_best = scores == best[None, :]
  largest = jnp.iinfo(jnp.int32).max
  return best, jnp.min(jnp.where(is_best, ids[:, None], largest), axis=0)


def _squares(points):
  """Returns the squared norms: float32 [num_rows].

  They are computed in blocks of one size, since XLA's rounding depends on it.
  """
  blocks = points.reshape(-1, blocked.ROWS, points.shape[1])
  return jax.lax.map(lambda rows: jnp.sum(rows**2, axis=1), blocks).reshape(-1)


def _scale(points, layout):
  """Returns a power of 2 that no coordinate exceeds."""
  largest = layout.max(jnp.max(jnp.abs(points)))
  return jnp.ldexp(jnp.float32(1), jnp.frexp(largest)[1])


def _means(points, ids, num_clusters, scale, distances, layout):
  """Returns the means of the clusters, by fixed-point accumulation.

  Each coordinate is split into int32 limbs, narrow enough that no sum overflows
  and together wide enough for float32's 24-bit significand. Integer addition is
  associative, so the means are bitwise the same on any number of devices. An
  empty cluster gets the farthest point that no other empty cluster has got.

  Args:
    points: float32 [num_rows, dim].
    ids: int32 [num_rows], in [0, num_clusters).
    num_clusters: number of means.
    scale: float32 [], a bound of the absolute coordinates.
    distances: float32 [num_points], of all points to their centroids.
    layout: of the points.

  Returns:
    float32 [num_clusters, dim].
  """
  size, dim = layout.block_size, points.shape[1]
  num_bits = 31 - layout.num_rows.bit_length()
  num_limbs = -(-_FLOAT32_BITS // num_bits)
  # Padding belongs to no cluster.
  indices = jnp.arange(points.shape[0]) + layout.first_index(points)
  ids = jnp.where(indices < layout.num_rows, ids, num_clusters)

  def add_block(index, state):
    sums, sizes = state
    rows, clusters = (
      blocked.get_block(array, index, size) for array in (points, ids)
    )
    rest = rows / scale
    for limb in range(num_limbs):
      rest *= 2**num_bits
      whole = jnp.round(rest)
      rest -= whole
      sums = sums.at[limb, clusters].add(whole.astype(jnp.int32), mode='drop')
    return sums, sizes.at[clusters].add(1, mode='drop')

  sums, sizes = layout.sum(
    jax.lax.fori_loop(
      0,
      points.shape[0] // size,
      add_block,
      (
        jnp.zeros((num_limbs, num_clusters, dim), jnp.int32),
        jnp.zeros(num_clusters, jnp.int32),
      ),
    )
  )
  units = scale * 2.0 ** (-num_bits * jnp.arange(1, num_limbs + 1))
  means = jnp.sum(sums * units[:, None, None], axis=0)
  means /= jnp.maximum(sizes, 1)[:, None]
  is_empty = sizes == 0

  def refill(means):
    farthest = jnp.argsort(-distances)[:num_clusters]
    indices = farthest[jnp.cumsum(is_empty) - 1]
    return jnp.where(is_empty[:, None], layout.look_up(points, indices), means)

  return jax.lax.cond(jnp.any(is_empty), refill, lambda means: means, means)
