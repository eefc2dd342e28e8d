"""Exact nearest neighbours, and all pairs that are near, block by block."""

import functools
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np

from proxy_nca_jax.retrieval import blocked

# At most so many queries at once: with the default blocks, 8 MiB of
# similarities. Fewer are filled up to a multiple.
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
  """Finds the k items of largest inner product in float32 with each query.

  Equal to a full sort: nearest first, the earlier item where two are as near.
  `jax.lax.top_k` of each block is merged with the best so far; on CPUs, stages
  by the maxima of groups took longer than it (jax 0.10.2).

  Args:
    queries: float [num_queries, dim].
    k: in [1, num_items], or below num_items without a gallery.
    gallery: float [num_items, dim]. By default the queries, each without
      itself, by its index.
    recall_target: if given, `jax.lax.approx_max_k` finds a neighbour within its
      block of items with this probability, on a TPU; elsewhere it is exact.
    mesh: the devices that share the gallery, along `axis_name`; by default one
      device. Each process gives all rows and gets all neighbours.
    axis_name: of the mesh.
    block_size: items a block, rounded up to a multiple of 64. It changes no
      result but an approximate one, and the last digit where there are fewer
      than 64 queries.

  Returns:
    (similarities, indices): float32 and int32 [num_queries, k].

  Raises:
    ValueError: if there are fewer than k items to find.
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
  # Where one device has all rows, they are searched where they lie.
  num_rows = max(-(-num_items // num_devices), blocked.ROWS)
  size = min(blocked.round_up(block_size), num_rows - num_rows % blocked.ROWS)
  layout = blocked.Layout(mesh, axis_name, size)
  items = blocked.as_float32(gallery)
  if num_rows * num_devices > num_items:
    items = layout.take(items, np.arange(num_rows * num_devices))
  else:
    items = layout.place(items)
  queries = jnp.asarray(queries, jnp.float32)
  num_queries, dim = queries.shape
  at_once = min(blocked.round_up(max(num_queries, 1), _MULTIPLE), _MAX_QUERIES)
  queries = jnp.pad(queries, ((0, -num_queries % at_once), (0, 0)))
  similarities, indices = _nearest(
    items,
    queries.reshape(-1, at_once, dim),
    num_items,
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
def _nearest(items, queries, num_items, *, k, is_self, recall_target, layout):
  """Returns (similarities, indices) [num_blocks, queries at once, k]."""
  size, at_once = layout.block_size, queries.shape[1]
  if recall_target is None:
    top_k = jax.lax.top_k
  else:
    top_k = functools.partial(jax.lax.approx_max_k, recall_target=recall_target)

  def merge(best, indices, new, new_indices):
    best, place = jax.lax.top_k(jnp.concatenate([best, new], axis=1), k)
    indices = jnp.concatenate([indices, new_indices], axis=1)
    return best, jnp.take_along_axis(indices, place, axis=1)

  def local(items, shared):
    queries, num_items = shared
    num_rows = items.shape[0]
    device = 0
    if layout.num_devices > 1:
      device = jax.lax.axis_index(layout.axis_name)

    def search(block):
      queries, own = block

      def add_block(index, best):
        # The last block begins among the rows of the one before.
        start = jnp.minimum(index * size, num_rows - size)
        rows = jax.lax.dynamic_slice_in_dim(items, start, size)
        similarities = blocked.similarities(queries, rows)
        first = device * num_rows + start
        places = first + jnp.arange(size)[None, :]
        is_searched = places >= device * num_rows + index * size
        is_searched &= places < num_items
        if is_self:
          is_searched &= places != own[:, None]
        new, place = top_k(
          jnp.where(is_searched, similarities, -jnp.inf), min(k, size)
        )
        return merge(*best, new, first + place)

      shape = (at_once, k)
      best = (jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32))
      best = jax.lax.fori_loop(0, -(-num_rows // size), add_block, best)
      if layout.num_devices > 1:
        # Devices hold the items in order: so do their results.
        best = jax.lax.all_gather(best, layout.axis_name, axis=1, tiled=True)
        best = merge(*(rows[:, :0] for rows in best), *best)
      return best

    own = jnp.arange(queries.shape[0] * at_once).reshape(-1, at_once)
    return jax.lax.map(search, (queries, own))

  return layout.on_each(local, is_shared=True)(items, (queries, num_items))


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
  """Finds all pairs whose inner product in float32 is at least a threshold.

  Args:
    points: float [num_points, dim].
    threshold: of the products.
    block_size: points whose products are held at once, squared.

  Yields:
    (number, pairs): the next points, so many, and int64 [num_pairs, 2], their
    pairs with points after them; ascending, each pair once, in order.
  """
  chex.assert_rank(points, 2)
  points = blocked.as_float32(points)
  size = min(block_size, blocked.round_up(len(points)))
  blocks = [
    blocked.take(points, np.arange(first, first + size))
    for first in range(0, len(points), size)
  ]
  for row, queries in enumerate(blocks):
    pairs = []
    for column in range(row, len(blocks)):
      # The rows after the last are not a number, and reach nothing.
      found = np.asarray(_reach(queries, blocks[column], threshold))
      if row == column:
        found = np.triu(found, 1)
      pairs.append(np.argwhere(found) + size * np.array([row, column]))
    pairs = np.concatenate(pairs)
    number = min(size, len(points) - row * size)
    yield number, pairs[np.lexsort(pairs.T[::-1])]


@jax.jit
def _reach(queries, items, threshold):
  return blocked.similarities(queries, items) >= threshold
