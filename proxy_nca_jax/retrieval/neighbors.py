"""Exact nearest neighbors, and all pairs above a similarity, in blocks."""

import functools
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np

from proxy_nca_jax import blocked

# Queries are searched in batches of at most this size: with the default blocks,
# 8 MiB of similarities. A single smaller batch is padded to the multiple.
_MAX_QUERIES, _MULTIPLE = 256, 16


def nearest(
  queries: chex.Array,
  k: int,
  *,
  gallery: chex.Array | None = None,
  recall_target: float | None = None,
  mesh: jax.sharding.Mesh | None = None,
  axis_name: str | None = None,
  block_size: int = 8192,
) -> tuple[jax.Array, jax.Array]:
  """Finds the k items with the largest float32 inner product with each query.

  The result is that of a full sort: most similar first, ties by index.
  `jax.lax.top_k` of each block is merged with the best so far; reducing groups
  to their maxima before was slower on CPUs (jax 0.10.2).

  Args:
    queries: float [num_queries, dim].
    k: in [1, num_items], or [1, num_items - 1] without a gallery.
    gallery: float [num_items, dim]. By default the queries are searched, and
      each query's own index is excluded.
    recall_target: if given, `jax.lax.approx_max_k` finds each neighbor within
      its block of items with this probability, on TPUs; elsewhere it is exact.
    mesh: the devices that the gallery is sharded over, along `axis_name`; by
      default one device. Every process passes all rows and gets all neighbors.
    axis_name: of the mesh.
    block_size: items per block, rounded up to a multiple of 64. Exact results
      do not depend on it, except in the last digit with fewer than 64 queries.

  Returns:
    (similarities, indices): float32 and int32 [num_queries, k].

  Raises:
    ValueError: if k is out of range.
  """
  is_self = gallery is None
  gallery = queries if is_self else gallery
  chex.assert_rank([queries, gallery], 2)
  num_items = len(gallery)
  if not 1 <= k <= num_items - is_self:
    raise ValueError(
      f'k ({k}) must be in [1, {num_items - is_self}], the number of items '
      'that a query searches.'
    )
  num_devices = 1 if mesh is None else mesh.shape[axis_name]
  # The rows are not padded to whole blocks: on one device they are searched in
  # place, without a copy.
  num_rows = max(-(-num_items // num_devices), blocked.ROWS)
  size = min(blocked.round_up(block_size), num_rows - num_rows % blocked.ROWS)
  layout = blocked.Layout(mesh, axis_name, size, num_items)
  items = blocked.as_float32(gallery)
  if num_rows * num_devices > num_items:
    items = layout.take(items, np.arange(num_rows * num_devices))
  else:
    items = layout.put(items)
  queries = jnp.asarray(queries, jnp.float32)
  num_queries, dim = queries.shape
  batch = min(blocked.round_up(max(num_queries, 1), _MULTIPLE), _MAX_QUERIES)
  queries = jnp.pad(queries, ((0, -num_queries % batch), (0, 0)))
  similarities, indices = _nearest(
    items,
    queries.reshape(-1, batch, dim),
    k=k,
    is_self=is_self,
    recall_target=recall_target,
    layout=layout,
  )
  return tuple(
    rows.reshape(-1, k)[:num_queries] for rows in (similarities, indices)
  )


@functools.partial(
  jax.jit, static_argnames=('k', 'is_self', 'recall_target', 'layout')
)
def _nearest(items, queries, *, k, is_self, recall_target, layout):
  """Returns (similarities, indices), each [num_batches, batch, k]."""
  size, batch = layout.block_size, queries.shape[1]
  if recall_target is None:
    top_k = jax.lax.top_k
  else:
    top_k = functools.partial(jax.lax.approx_max_k, recall_target=recall_target)

  def merge(best, indices, new, new_indices):
    best, order = jax.lax.top_k(jnp.concatenate([best, new], axis=1), k)
    indices = jnp.concatenate([indices, new_indices], axis=1)
    return best, jnp.take_along_axis(indices, order, axis=1)

  def search_shard(items, queries):
    num_rows, first_index = items.shape[0], layout.first_index(items)

    def search(query_batch):
      queries, query_indices = query_batch

      def add_block(block, best):
        # The last block is shifted back to end with the last row. Rows that the
        # block before has searched are masked out.
        start = jnp.minimum(block * size, num_rows - size)
        rows = jax.lax.dynamic_slice_in_dim(items, start, size)
        similarities = blocked.similarities(queries, rows)
        indices = first_index + start + jnp.arange(size)[None, :]
        is_searched = indices >= first_index + block * size
        is_searched &= indices < layout.num_rows
        if is_self:
          is_searched &= indices != query_indices[:, None]
        new, columns = top_k(
          jnp.where(is_searched, similarities, -jnp.inf), min(k, size)
        )
        return merge(*best, new, first_index + start + columns)

      shape = (batch, k)
      best = (jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32))
      best = jax.lax.fori_loop(0, -(-num_rows // size), add_block, best)
      if layout.num_devices > 1:
        # The devices hold the items in order, so ties stay sorted by index.
        best = layout.all_gather(best, axis=1)
        best = merge(*(rows[:, :0] for rows in best), *best)
      return best

    query_indices = jnp.arange(queries.shape[0] * batch).reshape(-1, batch)
    return jax.lax.map(search, (queries, query_indices))

  return layout.on_each(
    search_shard, (layout.sharded, blocked.REPLICATED), blocked.REPLICATED
  )(items, queries)


def neighbor_distances(
  queries: np.ndarray, items: np.ndarray, indices: np.ndarray
) -> np.ndarray:
  """Returns the Euclidean distance of each query to its neighbors.

  Computed from the differences: sqrt(2 - 2 x.y) would lose small distances to
  rounding.

  Args:
    queries: float [num_queries, dim].
    items: float [num_items, dim].
    indices: int [num_queries, k], in [0, num_items).

  Returns:
    float [num_queries, k].
  """
  return np.stack(
    [
      np.linalg.norm(items[row] - query, axis=1)
      for query, row in zip(queries, indices)
    ]
  )


def pairs_above(
  points: chex.Array, threshold: float, *, block_size: int = 2048
) -> Iterator[tuple[int, np.ndarray]]:
  """Finds all pairs whose float32 inner product is at least a threshold.

  Args:
    points: float [num_points, dim].
    threshold: lower bound of the inner products.
    block_size: points per block; block_size^2 products are held at a time.

  Yields:
    (num_points, pairs) of each comparison of two blocks: the number of points
    that have met all others since, 0 or that of a block; and int64 [num_pairs,
    2], at most block_size^2 pairs (i, j) with i < j, sorted. Each pair comes
    once.
  """
  chex.assert_rank(points, 2)
  points = blocked.as_float32(points)
  size = min(block_size, blocked.round_up(len(points)))
  blocks = [
    blocked.take(points, np.arange(first, first + size))
    for first in range(0, len(points), size)
  ]
  for row, queries in enumerate(blocks):
    for column in range(row, len(blocks)):
      # Padding is NaN, whose products reach no threshold.
      is_pair = np.asarray(_reach(queries, blocks[column], threshold))
      if row == column:
        is_pair = np.triu(is_pair, 1)
      is_last = column == len(blocks) - 1
      num_points = min(size, len(points) - row * size) if is_last else 0
      yield num_points, np.argwhere(is_pair) + size * np.array([row, column])


@jax.jit
def _reach(queries, items, threshold):
  return blocked.similarities(queries, items) >= threshold
