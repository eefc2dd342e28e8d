"""k-means: jitted, blocked, the same to the last bit on any devices.

Lloyd's algorithm alternates two steps. Assigning is a matrix product, of which
most can be left out: a centroid that has not moved keeps its products, so a
point whose own centroid stayed is compared only with those that moved. The
means are of whole numbers, whose sum has no order; so a cluster with the same
points has the same centroid, however the points are divided.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


class Clusters(NamedTuple):
  """The clusters of points.

  Attributes:
    assignments: int32 [num_points], the nearest centroid, the first of equals.
    centroids: float32 [num_clusters, dim].
    inertia: float32 [], the sum of squared distances to the nearest centroids.
    num_iterations: int32 [], how often the centroids moved.
  """

  assignments: jax.Array
  centroids: jax.Array
  inertia: jax.Array
  num_iterations: jax.Array


def kmeans(
  points: chex.Array,
  *,
  num_clusters: int,
  key: chex.PRNGKey | None = None,
  start: str | chex.Array = 'random',
  num_starts: int = 1,
  max_iterations: int = 20,
  tolerance: float = 0.0,
  mesh: jax.sharding.Mesh | None = None,
  axis_name: str | None = None,
  block_size: int = 1024,
  progress: Callable[[int], object] | None = None,
) -> Clusters:
  """Clusters points by Lloyd's algorithm.

  A cluster that loses all its points starts again at the point farthest from
  its centroid, the next such cluster at the next farthest. 20 iterations are
  FAISS's `niter` in the peers' evaluations.

  Args:
    points: float [num_points, dim], finite.
    num_clusters: in [1, num_points].
    key: for the first centroids.
    start: 'random': distinct points, each as likely. 'k-means++': each point
      with a probability in proportion to its squared distance to the nearest
      one before (Arthur and Vassilvitskii, 2007). Or the first centroids
      themselves, float [num_clusters, dim].
    num_starts: so many starts, of which the one of least inertia counts.
    max_iterations: at most so many updates of the centroids. Fewer if no
      assignment changes any more,
    tolerance: or if the inertia falls by no more than this share; 0 is never.
    mesh: the devices that share the points, along `axis_name`; by default one
      device. Each process gives all points and gets all assignments.
    axis_name: of the mesh.
    block_size: the largest number of points, and of centroids, whose products
      are held at once, rounded up to a multiple of 64. It changes no result.
    progress: is called with 1 for each update of the centroids.

  Returns:
    The clusters.

  Raises:
    ValueError: if there are fewer points than clusters, the start is unknown,
      or a number cannot be.
  """
  chex.assert_rank(points, 2)
  num_points, dim = points.shape
  if not 1 <= num_clusters <= num_points:
    raise ValueError(
      f'num_clusters ({num_clusters}) must be in [1, {num_points}], the number '
      'of points.'
    )
  if num_starts < 1 or max_iterations < 0:
    raise ValueError(
      f'num_starts ({num_starts}) must be at least 1, and max_iterations '
      f'({max_iterations}) not negative.'
    )
  if not isinstance(start, str):
    chex.assert_shape(start, (num_clusters, dim))
    key, num_starts = jax.random.key(0), 1
    start, centroids = 'given', jnp.asarray(start, jnp.float32)
  elif start in ('random', 'k-means++'):
    centroids = jnp.zeros((num_clusters, dim))
  else:
    raise ValueError(
      f"Unknown start {start!r}: choose 'random' or 'k-means++', or give the "
      'centroids.'
    )
  num_devices = 1 if mesh is None else mesh.shape[axis_name]
  share = -(-num_points // num_devices)
  block_size = -(-min(block_size, share) // _ROWS) * _ROWS
  padding = -num_points % (num_devices * block_size)
  points = jnp.pad(jnp.asarray(points, jnp.float32), ((0, padding), (0, 0)))
  if mesh is not None:
    sharding = NamedSharding(mesh, PartitionSpec(axis_name))
    points = jax.device_put(points, sharding)
  layout = _Layout(mesh, axis_name, block_size, num_points)
  best, least = None, float('inf')
  for each in jax.random.split(key, num_starts):
    state = _begin(points, centroids, each, start=start, layout=layout)
    num_iterations, goes_on = 0, True
    # One by one, so that a signal is heard.
    while goes_on and num_iterations < max_iterations:
      state, goes_on = _update(points, state, tolerance, layout=layout)
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


# Products of fewer rows may be rounded differently by XLA on CPUs.
_ROWS = 64
# Centroids of k-means++ from one product with all points to the next.
_ROUND = 256


class _Layout(NamedTuple):
  """How the points lie on devices: the first rows on the first.

  The methods are for use on each device; without a mesh there is one.
  """

  mesh: jax.sharding.Mesh | None
  axis_name: str | None
  block_size: int
  num_points: int

  def first(self, points):
    """The number of the device's first point."""
    if self.mesh is None:
      return 0
    return jax.lax.axis_index(self.axis_name) * points.shape[0]

  def sum(self, values):
    return values if self.mesh is None else jax.lax.psum(values, self.axis_name)

  def gather(self, values):
    """One value for each point, of all devices, in order."""
    if self.mesh is not None:
      values = jax.lax.all_gather(values, self.axis_name, tiled=True)
    return values[: self.num_points]

  def take(self, points, indices):
    """The points of these numbers, from wherever they are."""
    indices -= self.first(points)
    is_here = (indices >= 0) & (indices < points.shape[0])
    rows = points.at[indices].get(mode='clip')
    return self.sum(jnp.where(is_here[:, None], rows, 0))


class _State(NamedTuple):
  """What Lloyd's algorithm knows between two updates.

  Attributes:
    scores: float32 [num_rows], each point's best, as `_assign` has it.
    ids: int32 [num_rows], the centroids that have it.
    centroids: float32 [num_clusters, dim].
    inertia: float32 [].
  """

  scores: jax.Array
  ids: jax.Array
  centroids: jax.Array
  inertia: jax.Array


def _on_each(fn, layout: _Layout, *, arguments: str, results):
  """Maps the points and what else a device has of them, or all have alike."""
  if layout.mesh is None:
    return fn
  rows, shared = PartitionSpec(layout.axis_name), PartitionSpec()
  specs = {
    'rows': rows,
    'shared': shared,
    'state': _State(rows, rows, shared, shared),
  }
  return jax.shard_map(
    fn,
    mesh=layout.mesh,
    in_specs=tuple(specs[name] for name in arguments.split()),
    out_specs=jax.tree.map(specs.get, results),
    check_vma=False,
  )


@functools.partial(jax.jit, static_argnames=('start', 'layout'))
def _begin(points, centroids, key, *, start, layout):
  """Assigns the points to the first centroids, which it draws if not given."""

  def begin(points, centroids, key):
    num_clusters = centroids.shape[0]
    if start != 'given':
      choose = _choose if start == 'random' else _choose_plus_plus
      chosen = choose(points, key, num_clusters, layout)
      centroids = layout.take(points, chosen)
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

  return _on_each(
    begin, layout, arguments='rows shared shared', results='state'
  )(points, centroids, key)


@functools.partial(jax.jit, static_argnames='layout')
def _update(points, state, tolerance, *, layout):
  """Moves the centroids to the means; returns (state, whether to go on)."""

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
    has_fallen = state.inertia - inertia > tolerance * state.inertia
    goes_on = has_changed & (has_fallen | (tolerance == 0))
    return _State(scores, ids, means, inertia), goes_on

  return _on_each(
    update, layout, arguments='rows state shared', results=('state', 'shared')
  )(points, state, tolerance)


@functools.partial(jax.jit, static_argnames='layout')
def _gather(ids, *, layout):
  return _on_each(layout.gather, layout, arguments='rows', results='shared')(
    ids
  )


def _distances(squares, scores, layout):
  return layout.gather(jnp.maximum(squares - 2 * scores, 0))


def _inertia(squares, scores, layout):
  # The sum alone, not fused with what differs between numbers of devices.
  distances = _distances(squares, scores, layout)
  return jnp.sum(jax.lax.optimization_barrier(distances))


def _choose(points, key, num_clusters, layout):
  """Draws distinct points, each as likely."""
  del points
  return jax.random.choice(
    key, layout.num_points, (num_clusters,), replace=False
  )


def _choose_plus_plus(points, key, num_clusters, layout):
  """Draws points by k-means++, exactly, in rounds that begin with a product.

  A point is drawn by its weight at the beginning of the round, and accepted
  with the share of it that the centroids since then have left. A round draws at
  most as many as there are already: of more, few would be accepted.
  """
  num_points, dim = layout.num_points, points.shape[1]
  squares = _squares(points)
  places = jnp.arange(_ROUND)

  def distances(centroids, is_used):
    half_norms = jnp.where(is_used, jnp.sum(centroids**2, axis=1) / 2, jnp.inf)

    def compare(rows):
      scores, _ = _nearest(rows, centroids, half_norms, places)
      return scores

    blocks = points.reshape(-1, layout.block_size, dim)
    scores = jax.lax.map(compare, blocks).reshape(-1)
    return layout.gather(jnp.maximum(squares - 2 * scores, 0))

  def draw(state, weights, cumulative, count):
    centroids, chosen, num_new, num_tries = state
    total = cumulative[-1]
    uniform = jax.random.uniform(
      jax.random.fold_in(jax.random.fold_in(key, count), num_tries), (2,)
    )
    place = jnp.searchsorted(cumulative, uniform[0] * total, side='right')
    # Where all points are among the chosen, any other will do.
    place = jnp.where(total > 0, place, uniform[0] * num_points)
    place = jnp.minimum(place.astype(jnp.int32), num_points - 1)
    point = layout.take(points, place[None])
    left = jnp.min(
      jnp.sum((point - centroids) ** 2, axis=1),
      initial=weights[place],
      where=places < num_new,
    )
    is_accepted = (uniform[1] * weights[place] < left) | (total == 0)
    return (
      jnp.where(is_accepted & (places == num_new)[:, None], point, centroids),
      jnp.where(is_accepted & (places == num_new), place, chosen),
      num_new + is_accepted,
      num_tries + 1,
    )

  def extend(state):
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
    weights = jnp.minimum(weights, distances(centroids, places < num_new))
    indices = indices.at[count + places].set(chosen, mode='drop')
    # Rounding leaves a chosen point at a little distance from itself.
    return weights.at[chosen].set(0, mode='drop'), indices, count + num_new

  first = jax.random.randint(key, (1,), 0, num_points)
  start = jnp.zeros((_ROUND, dim)).at[0].set(layout.take(points, first)[0])
  weights = distances(start, places == 0).at[first].set(0)
  indices = jnp.zeros(num_clusters, jnp.int32).at[0].set(first[0])
  _, indices, _ = jax.lax.while_loop(
    lambda state: state[2] < num_clusters,
    extend,
    (weights, indices, jnp.int32(1)),
  )
  return indices


def _assign(points, centroids, has_moved, scores, ids, *, layout):
  """Finds each point's nearest centroid.

  argmin ||x - c||^2 = argmax x.c - ||c||^2 / 2, the score.

  Args:
    points: float32 [num_rows, dim].
    centroids: float32 [num_clusters, dim].
    has_moved: bool [num_clusters], since `scores` and `ids` were found.
    scores: float32 [num_rows], the best.
    ids: int32 [num_rows], the centroids that have it.
    layout: of the points.

  Returns:
    The scores and ids of these centroids.
  """
  size, num_clusters = layout.block_size, centroids.shape[0]
  half_norms = jnp.sum(centroids**2, axis=1) / 2
  # First all centroids in order, then those that moved.
  width = min(size, -(-num_clusters // _ROWS) * _ROWS)
  filling = (0, -num_clusters % width)
  order = [jnp.arange(num_clusters), jnp.argsort(~has_moved)]
  order = jnp.concatenate(
    [jnp.pad(part, filling, constant_values=num_clusters) for part in order]
  )
  num_blocks = order.shape[0] // width // 2
  num_moved = -(-jnp.sum(has_moved) // width)
  # First the points that have lost their centroid.
  is_lost = has_moved[ids]
  places = jnp.argsort(~is_lost)
  num_lost = jnp.sum(is_lost)
  scores = jnp.where(is_lost, -jnp.inf, scores)

  def assign_block(block):
    index, places = block
    rows = points[places]

    def compare(index, best):
      places = jax.lax.dynamic_slice_in_dim(order, index * width, width)
      scores, ids = _nearest(
        rows,
        centroids.at[places].get(mode='clip'),
        half_norms.at[places].get(mode='fill', fill_value=jnp.inf),
        places,
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
      (scores[places], ids[places]),
    )

  blocks = places.reshape(-1, size)
  found = jax.lax.map(assign_block, (jnp.arange(len(blocks)), blocks))
  return tuple(
    old.at[places].set(new.reshape(-1))
    for old, new in zip((scores, ids), found)
  )


def _nearest(points, centroids, half_norms, ids):
  """Returns the best score of each point, and the least id that has it."""
  scores = jnp.dot(centroids, points.T, precision=jax.lax.Precision.HIGHEST)
  scores -= half_norms[:, None]
  best = jnp.max(scores, axis=0)
  # An argmax takes three times as long on CPUs.
  is_best = scores == best[None, :]
  largest = jnp.iinfo(jnp.int32).max
  return best, jnp.min(jnp.where(is_best, ids[:, None], largest), axis=0)


def _squares(points):
  """The squared norms; sums over few or many rows are rounded differently."""
  blocks = points.reshape(-1, _ROWS, points.shape[1])
  return jax.lax.map(lambda rows: jnp.sum(rows**2, axis=1), blocks).reshape(-1)


def _scale(points, layout):
  """A power of 2 that no coordinate exceeds."""
  largest = jnp.max(jnp.abs(points))
  if layout.mesh is not None:
    largest = jax.lax.pmax(largest, layout.axis_name)
  return jnp.ldexp(jnp.float32(1), jnp.frexp(largest)[1])


def _means(points, ids, num_clusters, scale, distances, layout):
  """Returns the means of the clusters, empty ones refilled.

  A coordinate is cut into whole numbers of so few bits that no sum of them
  overflows, together at least the 24 of a float32.
  """
  size, dim = layout.block_size, points.shape[1]
  num_bits = 31 - layout.num_points.bit_length()
  num_parts = -(-24 // num_bits)
  numbers = jnp.arange(points.shape[0]) + layout.first(points)
  ids = jnp.where(numbers < layout.num_points, ids, num_clusters)

  def add_block(index, state):
    sums, sizes = state
    rows, clusters = (
      jax.lax.dynamic_slice_in_dim(array, index * size, size)
      for array in (points, ids)
    )
    rest = rows / scale
    for part in range(num_parts):
      rest *= 2**num_bits
      whole = jnp.round(rest)
      rest -= whole
      sums = sums.at[part, clusters].add(whole.astype(jnp.int32), mode='drop')
    return sums, sizes.at[clusters].add(1, mode='drop')

  sums, sizes = layout.sum(
    jax.lax.fori_loop(
      0,
      points.shape[0] // size,
      add_block,
      (
        jnp.zeros((num_parts, num_clusters, dim), jnp.int32),
        jnp.zeros(num_clusters, jnp.int32),
      ),
    )
  )
  units = scale * 2.0 ** (-num_bits * jnp.arange(1, num_parts + 1))
  means = jnp.sum(sums * units[:, None, None], axis=0)
  means /= jnp.maximum(sizes, 1)[:, None]
  is_empty = sizes == 0

  def refill(means):
    farthest = jnp.argsort(-distances)[:num_clusters]
    places = farthest[jnp.cumsum(is_empty) - 1]
    return jnp.where(is_empty[:, None], layout.take(points, places), means)

  return jax.lax.cond(jnp.any(is_empty), refill, lambda means: means, means)
