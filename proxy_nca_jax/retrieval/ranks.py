"""Exact ranks of positives by counting, block by block.

The rank of a positive is 1 + the positives before it + the negatives at least
as similar to the query. A query's similarities to its positives are therefore
thresholds: counting the negatives that reach each threshold takes one
comparison per pair, and neither a sort nor a top-k.

Rows are sorted by class, classes by size. The positives of a block of queries
are then one band of consecutive items, and the queries of a block have similar
numbers of thresholds:

  items, sorted:  | c0 | c1 | c2  | c3   | c4    | c5     | c6      | padding |
  a block of queries:     [c2 c2 c3 c3 c3 c4 c4 c4]
  its band:            | c2  | c3   | c4    |
                       ^first               ^first + length
  a query of c3:             |starts|ends

Memory holds one block of similarities, the thresholds, and their counts. Where
the queries are the items, one product of two blocks serves both of them. With
several devices, blocks are dealt to them in turn, and each device's items pass
all others in a ring (`_count_ring`). Counts are integers, so the ranks do not
depend on the order of summation.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from proxy_nca_jax import blocked

# Up to this number, the thresholds of a block are compared one by one, with all
# similarities at once: 0.25 ms each on two CPU cores. Beyond it a binary search
# of about 35 ms is faster.
_MAX_COMPARED = 128
# Thresholds held at a time: 64 MiB, and as much again for their counts.
_MAX_THRESHOLDS = 1 << 24
# Queries are counted in at most `_MAX_CALLS` calls: with a million items, each
# takes about a minute, which delays signals and progress. A call has at least
# `_MIN_BLOCKS` blocks, since it passes all items through the ring.
_MIN_BLOCKS, _MAX_CALLS = 8, 64
# The class of padding rows, larger than any other.
_PADDING = np.iinfo(np.int32).max


class _Sorted(NamedTuple):
  """Rows sorted by class, padded to the same number of blocks on each device.

  Attributes:
    embeddings: float32 [num_rows, dim], dealt to the devices.
    classes: int32 [num_rows], in the same order.
    order: int64 [num_rows], the original row of each sorted row; for padding,
      the number of original rows.
    sorted_classes: int32 [num_rows], ascending; `_PADDING` for padding.
  """

  embeddings: jax.Array
  classes: jax.Array
  order: np.ndarray
  sorted_classes: np.ndarray


class _Band(NamedTuple):
  """The sorted items that contain the positives of a block of queries.

  On several devices it describes one block on each. The arrays starts, ends and
  self_index are int32 [num_devices * block_size].

  Attributes:
    starts, ends: the range of items of each query's class.
    self_index: the query's own index among the items, or -1.
    first: int [num_devices], the first item of the band.
    length: number of items of the longest band.
    num_positives: the largest number of positives of a query.
  """

  starts: np.ndarray
  ends: np.ndarray
  self_index: np.ndarray
  first: np.ndarray
  length: int
  num_positives: int


def positive_ranks(
  embeddings: chex.Array,
  labels: np.ndarray,
  *,
  gallery: tuple[chex.Array, np.ndarray] | None = None,
  cameras: tuple[np.ndarray, np.ndarray] | None = None,
  nearest_only: bool = False,
  mesh: jax.sharding.Mesh | None = None,
  axis_name: str | None = None,
  block_size: int = 1024,
  progress: Callable[[float], object] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Ranks the positives of each query in its gallery, block by block.

  Items are ranked by their float32 inner product with the query; on the unit
  sphere that is the order of distances.

  Args:
    embeddings: float [num_queries, dim], of unit norm.
    labels: int [num_queries].
    gallery: (float [num_items, dim], int [num_items]), the items to search. By
      default the queries are searched, and each query's own index is excluded.
    cameras: (int [num_queries], int [num_items]), camera ids; items with the
      query's label and camera are ignored, as in re-identification.
    nearest_only: rank only the nearest positive, which suffices for Recall@K
      and the reciprocal rank, and is faster.
    mesh: the devices that the rows are sharded over, along `axis_name`; by
      default one device. Every process passes all rows and gets all ranks.
    axis_name: of the mesh.
    block_size: queries per block, rounded up to a multiple of 64 and limited to
      the rows of a device. The ranks do not depend on it.
    progress: called with the fraction of the work done since the last call; the
      fractions sum to 1.

  Yields:
    (queries, ranks): int64 [n], rows of `embeddings`, n at most block_size; and
    int32 [n, k], the ranks of their positives from 1, ascending, padded with 0.
    k is the largest number of positives in the block, at least 1. Every query
    comes once.
  """
  chex.assert_rank([embeddings, labels], [2, 1])
  is_self = gallery is None
  embeddings = blocked.as_float32(embeddings)
  if is_self:
    gallery = (embeddings, labels)
  else:
    gallery = (blocked.as_float32(gallery[0]), gallery[1])
  num_rows = max(len(embeddings), len(gallery[0]))
  layout = blocked.make_layout(mesh, axis_name, block_size, num_rows)
  query_classes, item_classes = _number_by_size(labels, gallery[1])
  queries = _sort(embeddings, query_classes, layout)
  items = queries if is_self else _sort(gallery[0], item_classes, layout)
  if cameras is not None:
    # Ids of any size and type are compared as int32 below.
    cameras = _number_by_size(*cameras)
    cameras = tuple(
      np.append(ids, 0)[rows.order]
      for ids, rows in zip(cameras, (queries, items))
    )
  bands = _find_bands(queries, items, layout, is_self=is_self)
  sizes = [1 if nearest_only else band.num_positives for band in bands]
  groups = _group_blocks(sizes, layout)
  for group in groups:
    thresholds = []
    for block in group:
      block_thresholds = _thresholds(
        queries.embeddings,
        _put_band(bands[block], gallery[0], items, cameras, layout, block),
        block,
        # Rounded up to a power of 2, so that few programs are compiled.
        num_thresholds=1 << (sizes[block] - 1).bit_length(),
        nearest_only=nearest_only,
        layout=layout,
      )
      # Wait, so that only one band is in memory at a time.
      thresholds.append(jax.block_until_ready(block_thresholds))
    group_sizes = [sizes[block] for block in group]
    thresholds, counts = _join(
      thresholds, sizes=tuple(group_sizes), layout=layout
    )
    is_symmetric = is_self and len(groups) == 1
    for blocks, fraction in _divide_into_calls(len(group), is_symmetric):
      counts = _count(
        (queries[:2], items[:2], thresholds),
        counts,
        (group.start, np.cumsum([0, *group_sizes], dtype=np.int32), *blocks),
        is_symmetric=is_symmetric,
        layout=layout,
      )
      # Wait, so that signals are handled and the progress reported is real.
      jax.block_until_ready(counts)
      if progress:
        progress(fraction * len(group) / len(bands))
    yield from _ranks(thresholds, counts, sizes, group, queries, layout)


def _number_by_size(
  query_labels: np.ndarray, item_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Renumbers the labels by their number of items, the rarest first."""
  query_labels, item_labels = np.asarray(query_labels), np.asarray(item_labels)
  names, labels = np.unique(
    np.concatenate([query_labels, item_labels]), return_inverse=True
  )
  labels = np.split(labels, [len(query_labels)])
  sizes = np.bincount(labels[1], minlength=len(names))
  classes = np.empty(len(names), np.int32)
  classes[np.argsort(sizes, kind='stable')] = np.arange(len(names))
  return classes[labels[0]], classes[labels[1]]


def _sort(embeddings, classes: np.ndarray, layout: blocked.Layout) -> _Sorted:
  order = np.argsort(classes, kind='stable')
  padding = (0, -len(order) % (layout.block_size * layout.num_devices))
  order = np.pad(order, padding, constant_values=len(classes))
  classes = np.append(classes, np.int32(_PADDING))[order]
  return _Sorted(
    layout.take(embeddings, layout.deal(order)),
    layout.put(layout.deal(classes)),
    order,
    classes,
  )


def _find_bands(
  queries: _Sorted, items: _Sorted, layout: blocked.Layout, *, is_self: bool
) -> list[_Band]:
  """Finds the band of each block of queries, of all devices at a time."""
  # Padding has an empty range of items, inside the last query's band.
  classes = queries.sorted_classes[queries.sorted_classes != _PADDING]
  padding = (0, len(queries.order) - len(classes))
  starts = np.searchsorted(items.sorted_classes, classes, 'left')
  ends = np.searchsorted(items.sorted_classes, classes, 'right')
  ends = np.pad(ends, padding, constant_values=starts[-1])
  starts = np.pad(starts, padding, mode='edge')
  self_index = np.arange(len(starts)) if is_self else np.full(len(starts), -1)
  bands = []
  size = layout.num_devices * layout.block_size
  for begin in range(0, len(starts), size):
    rows = slice(begin, begin + size)
    blocks = (layout.num_devices, layout.block_size)
    first = starts[rows].reshape(blocks).min(axis=1)
    last = ends[rows].reshape(blocks).max(axis=1)
    bands.append(
      _Band(
        starts=starts[rows],
        ends=ends[rows],
        self_index=self_index[rows],
        first=first,
        length=max(int(np.max(last - first)), 1),
        num_positives=max(int(np.max((ends - starts)[rows])) - is_self, 1),
      )
    )
  return bands


def _group_blocks(sizes: list[int], layout: blocked.Layout) -> list[range]:
  """Groups consecutive blocks whose thresholds fit into memory together.

  Args:
    sizes: the number of thresholds per query of each block.
    layout: of the rows.
  """
  num_queries = layout.num_devices * layout.block_size
  groups, total = [range(0, 0)], 0
  for block, size in enumerate(sizes):
    if total and total + size * num_queries > _MAX_THRESHOLDS:
      groups.append(range(block, block))
      total = 0
    groups[-1] = range(groups[-1].start, block + 1)
    total += size * num_queries
  return groups


def _put_band(
  band: _Band,
  embeddings,
  items: _Sorted,
  cameras,
  layout: blocked.Layout,
  block: int,
) -> dict[str, jax.Array]:
  """Puts each device's band on it, with indices relative to the band."""
  num_blocks = -(-band.length // layout.block_size)
  length = layout.block_size << (num_blocks - 1).bit_length()
  indices = (band.first[:, None] + np.arange(length)).reshape(-1)
  indices = np.minimum(indices, len(items.order) - 1)
  offsets = np.repeat(band.first, layout.block_size)
  arrays = {
    'starts': band.starts - offsets,
    'ends': band.ends - offsets,
    'self_index': np.where(
      band.self_index < 0, length, band.self_index - offsets
    ),
  }
  if cameras is not None:
    rows = layout.num_devices * layout.block_size
    arrays['cameras'] = cameras[0][block * rows : (block + 1) * rows]
    arrays['item_cameras'] = cameras[1][indices]
  arrays = {
    name: layout.put(array.astype(np.int32)) for name, array in arrays.items()
  }
  return arrays | {'items': layout.take(embeddings, items.order[indices])}


@functools.partial(
  jax.jit, static_argnames=('num_thresholds', 'nearest_only', 'layout')
)
def _thresholds(queries, band, block, *, num_thresholds, nearest_only, layout):
  """Finds the similarities of a block of queries to their positives.

  Args:
    queries: float32 [num_rows, dim], on each device.
    band: of `_put_band`, on each device.
    block: int32 [], index of the block.
    num_thresholds: rows of the result.
    nearest_only: whether to keep only each query's largest similarity.
    layout: of the rows.

  Returns:
    float32 [num_thresholds, block_size] on each device, descending along each
    column, padded with -infinity.
  """
  specs = (layout.sharded, layout.sharded, blocked.REPLICATED)
  find = _largest_threshold if nearest_only else _all_thresholds
  find = functools.partial(find, num_thresholds=num_thresholds, layout=layout)
  return layout.on_each(find, specs, layout.sharded)(queries, band, block)


def _largest_threshold(queries, band, block, *, num_thresholds, layout):
  size = layout.block_size
  queries = blocked.get_block(queries, block, size)

  def add_block(index, largest):
    items = blocked.get_block(band['items'], index, size)
    similarities = blocked.similarities(items, queries)
    is_positive = _is_positive(band, index * size + jnp.arange(size)[:, None])
    similarities = jnp.where(is_positive, similarities, -jnp.inf)
    return jnp.maximum(largest, jnp.max(similarities, axis=0)[None, :])

  largest = jnp.full((num_thresholds, size), -jnp.inf)
  num_blocks = band['items'].shape[0] // size
  return jax.lax.fori_loop(0, num_blocks, add_block, largest)


def _all_thresholds(queries, band, block, *, num_thresholds, layout):
  size = layout.block_size
  queries = blocked.get_block(queries, block, size)
  # The band indices of each query's positives, skipping the query itself.
  indices = band['starts'][None, :] + jnp.arange(num_thresholds)[:, None]
  indices += indices >= band['self_index'][None, :]
  is_positive = _is_positive(band, indices)

  def add_block(index, thresholds):
    items = blocked.get_block(band['items'], index, size)
    similarities = blocked.similarities(items, queries)
    rows = indices - index * size
    found = jnp.take_along_axis(
      similarities, jnp.clip(rows, 0, size - 1), axis=0
    )
    is_in_block = (rows >= 0) & (rows < size)
    return jnp.where(is_in_block & is_positive, found, thresholds)

  thresholds = jnp.full((num_thresholds, size), -jnp.inf)
  num_blocks = band['items'].shape[0] // size
  thresholds = jax.lax.fori_loop(0, num_blocks, add_block, thresholds)
  return -jnp.sort(-thresholds, axis=0)


def _is_positive(band, indices):
  """Whether items of the band are positives of each query.

  Args:
    band: of `_put_band`.
    indices: int32 [n, block_size] or [n, 1], relative to the band.

  Returns:
    bool [n, block_size].
  """
  is_positive = indices >= band['starts'][None, :]
  is_positive &= indices < band['ends'][None, :]
  is_positive &= indices != band['self_index'][None, :]
  if 'cameras' in band:
    cameras = band['item_cameras'].at[indices].get(mode='clip')
    is_positive &= cameras != band['cameras'][None, :]
  return is_positive


@functools.partial(jax.jit, static_argnames=('sizes', 'layout'))
def _join(thresholds, *, sizes, layout):
  """Concatenates the thresholds of blocks, without their padding.

  Args:
    thresholds: of `_thresholds`, one array per block.
    sizes: rows to keep of each block.
    layout: of the rows.

  Returns:
    (thresholds, counts): float32, and int32 zeros to count in, both [sum of
    sizes, block_size] on each device.
  """

  def join(thresholds):
    joined = jnp.concatenate(
      [block[:size] for block, size in zip(thresholds, sizes)]
    )
    return joined, jnp.zeros(joined.shape, jnp.int32)

  return layout.on_each(join, (layout.sharded,), layout.sharded)(thresholds)


def _divide_into_calls(
  num_blocks: int, is_symmetric: bool
) -> Iterator[tuple[tuple[int, int], float]]:
  """Yields the range (start, stop) of blocks of a call, and its fraction."""
  size = max(_MIN_BLOCKS, -(-num_blocks // _MAX_CALLS))
  # On one device, each block is compared with itself and those after it. With
  # several, the cost is more even than this.
  costs = np.arange(num_blocks, 0, -1) if is_symmetric else np.ones(num_blocks)
  for start in range(0, num_blocks, size):
    blocks = (start, min(start + size, num_blocks))
    yield blocks, float(costs[slice(*blocks)].sum() / costs.sum())


@functools.partial(
  jax.jit, static_argnames=('is_symmetric', 'layout'), donate_argnums=1
)
def _count(rows, counts, blocks, *, is_symmetric, layout):
  """Counts the negatives that reach the thresholds of some blocks of queries.

  Args:
    rows: (queries, items, thresholds), sharded; queries and items are
      (embeddings, classes).
    counts: int32, of the shape of the thresholds, to add to.
    blocks: (first, offsets, start, stop): the index of the group's first block;
      int32 [blocks of the group + 1], the first threshold of each block; the
      blocks [start, stop) of the group to count for.
    is_symmetric: whether the queries are the items and the group has all
      blocks. One product of two blocks then counts for both.
    layout: of the rows.

  Returns:
    The updated counts.
  """
  count = functools.partial(
    _count_ring, is_symmetric=is_symmetric, layout=layout
  )
  specs = (layout.sharded, layout.sharded, blocked.REPLICATED)
  return layout.on_each(count, specs, layout.sharded)(rows, counts, blocks)


def _count_ring(rows, counts, blocks, *, is_symmetric, layout):
  """Counts on one device while the items of all devices pass it in a ring.

  In each step, a device compares its queries with the items that visit it, and
  hands these on to the device before it. On 4 devices:

    device                   0     1     2     3
    step 0, items of device  0     1     2     3
    step 1                   1     2     3     0
    step 2                   2     3     0     1
    step 3                   3     0     1     2   not if symmetric

  In the symmetric case the visitors bring their thresholds and counts, to which
  the products are added as well. After half of the ring every two devices have
  met, and the counts are shifted back home.
  """
  queries, items, thresholds = rows
  visitors, counts = items, (counts,)
  if is_symmetric:
    visitors = (*items, thresholds)
    counts = (*counts, jnp.zeros_like(counts[0]))

  def visit(step, state):
    counts, visitors = state
    counts = _count_visitors(
      step,
      (*queries, thresholds),
      visitors,
      counts,
      blocks,
      is_symmetric=is_symmetric,
      layout=layout,
    )
    return counts, visitors

  def shift_and_visit(step, state):
    (own_counts, *visitor_counts), visitors = state
    visitors, visitor_counts = layout.shift((visitors, visitor_counts), 1)
    return visit(step, ((own_counts, *visitor_counts), visitors))

  state = visit(0, (counts, visitors))
  num_steps = layout.num_devices
  if is_symmetric:
    num_steps = layout.num_devices // 2 + 1
  if num_steps > 1:
    state = jax.lax.fori_loop(1, num_steps, shift_and_visit, state)
  # There are no counts of visitors unless symmetric.
  (own_counts, *visitor_counts), _ = state
  return sum(layout.shift(visitor_counts, 1 - num_steps), own_counts)


def _count_visitors(
  step, rows, visitors, counts, blocks, *, is_symmetric, layout
):
  """Counts for the pairs of a device's blocks with those of a visiting device.

  In the symmetric case each pair of blocks is compared once. In the first step
  a device meets itself, and in the last step of an even ring opposite devices
  meet twice. Then pairs are divided like this (rows are blocks of this device,
  columns are blocks of the visitor):

    first step         last, lower device       last, upper device
    x  x  x  x         x  x  x  x               .  x  x  x
    .  x  x  x         .  x  x  x               .  .  x  x
    .  .  x  x         .  .  x  x               .  .  .  x
    .  .  .  x         .  .  .  x               .  .  .  .

  Args:
    step: of the ring.
    rows: (embeddings, classes, thresholds) of this device's queries.
    visitors: (embeddings, classes) or, if symmetric, the same as `rows`.
    counts: (those of this device,) and, if symmetric, those of the visitors.
    blocks: as in `_count`.
    is_symmetric: as in `_count`.
    layout: of the rows.

  Returns:
    The updated counts.
  """
  first, offsets, start, stop = blocks
  num_devices, size = layout.num_devices, layout.block_size
  is_last = 2 * step == num_devices
  is_upper = is_last & (layout.device_index() >= num_devices // 2)

  def first_visitor(block):
    if not is_symmetric:
      return 0
    return jnp.where(is_last | (step == 0), block + is_upper, 0)

  def compare_block(block, counts):
    queries = [blocked.get_block(x, first + block, size) for x in rows[:2]]

    def compare(visitor, counts):
      items = [blocked.get_block(x, visitor, size) for x in visitors[:2]]
      ranges = [(offsets[block], offsets[block + 1])]
      if is_symmetric:
        begin, end = offsets[visitor], offsets[visitor + 1]
        # A block paired with itself has been counted for as the queries'.
        is_same = (step == 0) & (visitor == block)
        ranges.append((begin, jnp.where(is_same, begin, end)))
      return _count_pair(
        queries, items, (*rows[2:], *visitors[2:]), counts, ranges
      )

    num_blocks = visitors[0].shape[0] // size
    return jax.lax.fori_loop(first_visitor(block), num_blocks, compare, counts)

  return jax.lax.fori_loop(start, stop, compare_block, counts)


def _count_pair(queries, items, thresholds, counts, ranges):
  """Counts for a pair of blocks from their one product.

  Args:
    queries, items: (embeddings, classes) of a block.
    thresholds: (those of the queries,) and, if symmetric, those of the items.
    counts: of the same shapes.
    ranges: (start, end) of the block in each of the thresholds.

  Returns:
    The updated counts.
  """
  similarities = _negative_similarities(queries, items)
  return tuple(
    _add_reached(similarities, *arrays, *bounds, axis=1 - side)
    for side, (*arrays, bounds) in enumerate(zip(thresholds, counts, ranges))
  )


def _negative_similarities(queries, items):
  """Returns the similarities of two blocks, -infinity within a class.

  The classes of a block are sorted: only blocks with overlapping ranges of
  classes can share one.
  """
  (queries, classes), (items, item_classes) = queries, items
  similarities = blocked.similarities(queries, items)
  overlaps = classes[-1] >= item_classes[0]
  overlaps &= item_classes[-1] >= classes[0]
  return jax.lax.cond(
    overlaps,
    lambda values: jnp.where(
      classes[:, None] == item_classes[None, :], -jnp.inf, values
    ),
    lambda values: values,
    similarities,
  )


def _add_reached(similarities, thresholds, counts, start, end, *, axis):
  """Adds to the counts of the thresholds [start, end) of a block.

  Few thresholds are compared one by one, each with all similarities. Of many,
  a binary search finds the largest threshold that each similarity reaches, and
  only this one is counted; `_ranks` takes the prefix sum, since the similarity
  reaches all smaller thresholds as well.

  Args:
    similarities: float32 [block_size, block_size].
    thresholds: float32 [num_thresholds, block_size], descending in each block.
    counts: int32 [num_thresholds, block_size].
    start, end: int32 [].
    axis: the axis of `similarities` along which the items lie.
  """

  def compare(counts):
    def add(index, counts):
      is_reached = similarities >= jnp.expand_dims(thresholds[index], axis)
      return counts.at[index].add(jnp.sum(is_reached, axis, dtype=jnp.int32))

    return jax.lax.fori_loop(start, end, add, counts)

  def search(counts):
    queries = jax.lax.broadcasted_iota(jnp.int32, similarities.shape, 1 - axis)

    def halve(_, bounds):
      low, high = bounds
      middle = (low + high) // 2
      is_reached = similarities >= thresholds[middle, queries]
      low = jnp.where(is_reached | (low == high), low, middle + 1)
      return low, jnp.where(is_reached, middle, high)

    low = jnp.full(similarities.shape, start)
    low, _ = jax.lax.fori_loop(
      0, 32 - jax.lax.clz(end - start), halve, (low, jnp.full_like(low, end))
    )
    # A similarity below all thresholds is not counted.
    index = jnp.where(low < end, low, counts.shape[0])
    return counts.at[index, queries].add(1, mode='drop')

  return jax.lax.cond(end - start > _MAX_COMPARED, search, compare, counts)


def _ranks(
  thresholds,
  counts,
  sizes: list[int],
  group: range,
  queries: _Sorted,
  layout: blocked.Layout,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the queries of each block and their ranks."""
  shape = (layout.num_devices, -1, layout.block_size)
  thresholds, counts = (
    multihost_utils.process_allgather(array, tiled=True).reshape(shape)
    for array in (thresholds, counts)
  )
  order = queries.order.reshape(-1, layout.num_devices, layout.block_size)
  is_query = order < np.sum(queries.sorted_classes != _PADDING)
  start = 0
  for block in group:
    rows = slice(start, start + sizes[block])
    start = rows.stop
    for device in range(layout.num_devices):
      is_positive = thresholds[device, rows].T > -np.inf
      num_negatives = counts[device, rows].T
      if sizes[block] > _MAX_COMPARED:
        num_negatives = np.cumsum(num_negatives, axis=1, dtype=np.int32)
      num_positives = np.arange(1, sizes[block] + 1, dtype=np.int32)
      ranks = np.where(is_positive, num_negatives + num_positives, 0)
      keep = is_query[block, device]
      if keep.any():
        yield order[block, device][keep], ranks[keep]
