"""Exact ranks of positives by counting, block by block.

The rank of a positive is 1 + the positives before it + the negatives that are
at least as near. So a query's similarities to its positives are thresholds, and
counting the negatives that reach a threshold takes one comparison each, with
neither sort nor top-K. Rows are sorted by the size of their class, so that a
class is one band of rows and the queries of a block have about as many
thresholds. Where items search among themselves, the product of two blocks
serves both. Memory is one block of similarities, the thresholds and the counts.

Several devices are dealt the blocks in turn and pass theirs round. Counts are
whole numbers, whose sum has no order.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from proxy_nca_jax.retrieval import blocked


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
  """Ranks each query's positives in its gallery, block by block.

  Nearest is the largest inner product in float32: on the unit sphere the
  smallest distance.

  Args:
    embeddings: float [num_queries, dim], of unit norm.
    labels: int [num_queries].
    gallery: (float [num_items, dim], int [num_items]): what is searched. By
      default the queries themselves, each without itself, by its index.
    cameras: (int [num_queries], int [num_items]): items of the query's label
      and camera are left out, as in re-identification.
    nearest_only: ranks the nearest positive alone: all that Recall@K and the
      reciprocal rank need, and faster.
    mesh: the devices that share the rows, along `axis_name`; by default one
      device. Each process gives all rows and gets all ranks.
    axis_name: of the mesh.
    block_size: queries a block, rounded up to a multiple of 64; at most as
      many as there are on a device. It changes no result.
    progress: is called with each share of the work that is done; all of them
      are 1 together.

  Yields:
    (queries, ranks): int64 [at most block_size], rows of `embeddings`; int32
    [the same, most positives of these, or 1], the ranks of their positives from
    1, ascending, filled with 0. Every query comes once.
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
    cameras = tuple(
      np.append(of_rows, 0)[side.order]
      for of_rows, side in zip(cameras, (queries, items))
    )
  bands = _bands(queries, items, layout, is_self=is_self)
  numbers = [1 if nearest_only else band.number for band in bands]
  groups = _groups(numbers, layout)
  for group in groups:
    thresholds = []
    for block in group:
      of_block = _thresholds(
        queries.embeddings,
        _place_band(bands[block], gallery[0], items, cameras, layout, block),
        block,
        # Rounded up, so that few programs are compiled.
        number=1 << (numbers[block] - 1).bit_length(),
        nearest_only=nearest_only,
        layout=layout,
      )
      # So that one band is held at a time.
      thresholds.append(jax.block_until_ready(of_block))
    of_group = [numbers[block] for block in group]
    thresholds, counts = _join(
      thresholds, numbers=tuple(of_group), layout=layout
    )
    is_symmetric = is_self and len(groups) == 1
    for blocks, share in _calls(len(group), is_symmetric):
      counts = _count(
        (queries[:2], items[:2], thresholds),
        counts,
        (group.start, np.cumsum([0, *of_group], dtype=np.int32), *blocks),
        is_symmetric=is_symmetric,
        layout=layout,
      )
      # So that a signal is heard, and progress is what it says.
      jax.block_until_ready(counts)
      if progress:
        progress(share * len(group) / len(bands))
    yield from _ranks(thresholds, counts, numbers, group, queries, layout)


class _Sorted(NamedTuple):
  """Rows sorted by class, filled up to whole blocks, as many on each device.

  Attributes:
    embeddings: float32 [num_rows, dim], dealt to the devices.
    classes: int32 [num_rows], as `embeddings`.
    order: int64 [num_rows], ascending by class: where the rows come from; of
      the filling, the number of rows there are.
    sorted_classes: int32 [num_rows], as `order`; the filling's is the largest.
  """

  embeddings: jax.Array
  classes: jax.Array
  order: np.ndarray
  sorted_classes: np.ndarray


class _Band(NamedTuple):
  """Where the positives of the queries of a block lie among the items.

  The arrays are int32 [num_devices * block_size].

  Attributes:
    starts, ends: the first item of the query's class, and the one after.
    own: the query's own place, or -1.
    first: int [num_devices], the first item of the block's classes.
    length: items from there on to the last of these, on any device.
    number: the most positives of a query.
  """

  starts: np.ndarray
  ends: np.ndarray
  own: np.ndarray
  first: np.ndarray
  length: int
  number: int


# Thresholds of a block that are compared one by one; a comparison of all
# similarities took 0.25 ms on two CPU cores, and a search about 35 ms.
_MAX_COMPARED = 128
# Thresholds at once, in 64 MiB; the counts take as much.
_MAX_THRESHOLDS = 1 << 24
# Blocks of queries by one call: each passes the items round once, and more than
# a minute of a million items would be long to wait.
_MIN_BLOCKS, _MAX_CALLS = 8, 64
_FILLING = np.iinfo(np.int32).max


def _number_by_size(
  query_labels: np.ndarray, item_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Numbers the classes from the smallest in the gallery to the largest."""
  query_labels, item_labels = np.asarray(query_labels), np.asarray(item_labels)
  names, labels = np.unique(
    np.concatenate([query_labels, item_labels]), return_inverse=True
  )
  labels = np.split(labels, [len(query_labels)])
  sizes = np.bincount(labels[1], minlength=len(names))
  numbers = np.empty(len(names), np.int32)
  numbers[np.argsort(sizes, kind='stable')] = np.arange(len(names))
  return numbers[labels[0]], numbers[labels[1]]


def _sort(embeddings, classes: np.ndarray, layout: blocked.Layout) -> _Sorted:
  order = np.argsort(classes, kind='stable')
  filling = (0, -len(order) % (layout.block_size * layout.num_devices))
  order = np.pad(order, filling, constant_values=len(classes))
  classes = np.append(classes, np.int32(_FILLING))[order]
  return _Sorted(
    layout.take(embeddings, layout.deal(order)),
    layout.place(layout.deal(classes)),
    order,
    classes,
  )


def _bands(
  queries: _Sorted, items: _Sorted, layout: blocked.Layout, *, is_self: bool
) -> list[_Band]:
  """Finds the positives of each block of queries, or of one on each device."""
  # The filling has no positives, where the last query begins.
  classes = queries.sorted_classes[queries.sorted_classes != _FILLING]
  filling = (0, len(queries.order) - len(classes))
  starts = np.searchsorted(items.sorted_classes, classes, 'left')
  ends = np.searchsorted(items.sorted_classes, classes, 'right')
  ends = np.pad(ends, filling, constant_values=starts[-1])
  starts = np.pad(starts, filling, mode='edge')
  own = np.arange(len(starts)) if is_self else np.full(len(starts), -1)
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
        own=own[rows],
        first=first,
        length=max(int(np.max(last - first)), 1),
        number=max(int(np.max((ends - starts)[rows])) - is_self, 1),
      )
    )
  return bands


def _groups(numbers: list[int], layout: blocked.Layout) -> list[range]:
  """Divides blocks so that the thresholds of a group fit into memory."""
  rows = layout.num_devices * layout.block_size
  groups, total = [range(0, 0)], 0
  for block, number in enumerate(numbers):
    if total and total + number * rows > _MAX_THRESHOLDS:
      groups.append(range(block, block))
      total = 0
    groups[-1] = range(groups[-1].start, block + 1)
    total += number * rows
  return groups


def _place_band(
  band: _Band,
  embeddings,
  items: _Sorted,
  cameras,
  layout: blocked.Layout,
  block: int,
) -> dict[str, jax.Array]:
  """Gives each device the items of the classes of its block of queries."""
  num_blocks = -(-band.length // layout.block_size)
  length = layout.block_size << (num_blocks - 1).bit_length()
  places = (band.first[:, None] + np.arange(length)).reshape(-1)
  places = np.minimum(places, len(items.order) - 1)
  offsets = np.repeat(band.first, layout.block_size)
  arrays = {
    'starts': band.starts - offsets,
    'ends': band.ends - offsets,
    'own': np.where(band.own < 0, length, band.own - offsets),
  }
  if cameras is not None:
    rows = layout.num_devices * layout.block_size
    arrays['cameras'] = cameras[0][block * rows : (block + 1) * rows]
    arrays['item_cameras'] = cameras[1][places]
  arrays = {
    name: layout.place(array.astype(np.int32)) for name, array in arrays.items()
  }
  return arrays | {'items': layout.take(embeddings, items.order[places])}


@functools.partial(
  jax.jit, static_argnames=('number', 'nearest_only', 'layout')
)
def _thresholds(queries, band, block, *, number, nearest_only, layout):
  """The similarities of a block of queries to their positives.

  Args:
    queries: float32 [num_rows, dim], on each device.
    band: of `_place_band`, on each device.
    block: of the queries.
    number: the most positives, rounded up.
    nearest_only: whether only the first is wanted.
    layout: of the rows.

  Returns:
    float32 [number, block_size] on each device, descending, then -infinity.
  """
  size = layout.block_size
  shape = (number, size)

  def local(rows, block):
    queries, band = rows
    queries = blocked.block(queries, block, size)
    starts, ends, own = (
      band[name][None, :] for name in ('starts', 'ends', 'own')
    )

    def is_positive(columns):
      exists = (columns >= starts) & (columns < ends) & (columns != own)
      if 'cameras' in band:
        cameras = band['item_cameras'].at[columns].get(mode='clip')
        exists &= cameras != band['cameras'][None, :]
      return exists

    def find_nearest(index, nearest):
      items = blocked.block(band['items'], index, size)
      similarities = blocked.similarities(items, queries)
      columns = index * size + jnp.arange(size)[:, None]
      similarities = jnp.where(is_positive(columns), similarities, -jnp.inf)
      return jnp.maximum(nearest, jnp.max(similarities, axis=0)[None, :])

    columns = starts + jnp.arange(number)[:, None]
    columns += columns >= own

    def gather(index, positives):
      items = blocked.block(band['items'], index, size)
      similarities = blocked.similarities(items, queries)
      places = columns - index * size
      found = jnp.take_along_axis(
        similarities, jnp.clip(places, 0, size - 1), axis=0
      )
      is_here = (places >= 0) & (places < size) & is_positive(columns)
      return jnp.where(is_here, found, positives)

    num_blocks = band['items'].shape[0] // size
    positives = jax.lax.fori_loop(
      0,
      num_blocks,
      find_nearest if nearest_only else gather,
      jnp.full(shape, -jnp.inf),
    )
    return positives if nearest_only else -jnp.sort(-positives, axis=0)

  return layout.on_each(local)((queries, band), block)


@functools.partial(jax.jit, static_argnames=('numbers', 'layout'))
def _join(thresholds, *, numbers, layout):
  """Joins the thresholds of blocks, of each its number.

  Returns:
    The thresholds float32, and counts of 0, int32, both [sum of numbers,
    block_size] on each device.
  """

  def local(thresholds, _):
    joined = jnp.concatenate(
      [block[:number] for block, number in zip(thresholds, numbers)]
    )
    return joined, jnp.zeros(joined.shape, jnp.int32)

  return layout.on_each(local)(thresholds, ())


def _calls(
  num_blocks: int, is_symmetric: bool
) -> Iterator[tuple[tuple[int, int], float]]:
  """Yields (first, last + 1) of the blocks of a call, and its share of all."""
  size = max(_MIN_BLOCKS, -(-num_blocks // _MAX_CALLS))
  # Each meets those from itself on; what several devices do is evener.
  costs = np.arange(num_blocks, 0, -1) if is_symmetric else np.ones(num_blocks)
  for first in range(0, num_blocks, size):
    blocks = (first, min(first + size, num_blocks))
    yield blocks, float(costs[slice(*blocks)].sum() / costs.sum())


@functools.partial(
  jax.jit, static_argnames=('is_symmetric', 'layout'), donate_argnums=1
)
def _count(rows, counts, shared, *, is_symmetric, layout):
  """Counts the negatives that reach the thresholds of some blocks of queries.

  Args:
    rows: (queries, items, thresholds) on each device; queries and items are
      (embeddings, classes).
    counts: int32, as the thresholds; those of the blocks before.
    shared: the block of the first thresholds; where the thresholds of each
      block begin, and where the last ones end; the first block to count for and
      the one after the last, from 0 at the first thresholds.
    is_symmetric: whether the queries are the items, all of them. Then the
      product of two blocks serves both.
    layout: of the rows.

  Returns:
    The counts, as given, with those of these blocks.
  """
  local = functools.partial(
    _count_around, is_symmetric=is_symmetric, layout=layout
  )
  return layout.on_each(local)((*rows, counts), shared)


def _count_around(rows, shared, *, is_symmetric, layout):
  """Counts on one device, which the items of all others visit in turn.

  In the symmetric case they bring their thresholds and take home their counts,
  having met every device once: half of the way round is enough.
  """
  queries, items, thresholds, counts = rows
  first, offsets, *blocks = shared
  num_devices, size = layout.num_devices, layout.block_size
  num_item_blocks = items[0].shape[0] // size
  device = 0 if num_devices == 1 else jax.lax.axis_index(layout.axis_name)

  def shift(values, steps):
    ring = [(i, (i - steps) % num_devices) for i in range(num_devices)]
    return jax.lax.ppermute(values, layout.axis_name, ring)

  def first_block(step, block):
    """Of the visitors; a pair is met once, at home or opposite even twice."""
    if not is_symmetric:
      return 0
    is_opposite = 2 * step == num_devices
    later = is_opposite & (device >= num_devices // 2)
    return jnp.where(is_opposite | (step == 0), block + later, 0)

  def visit(step, counts, visitors):
    others, other_counts = visitors

    def compare(block, counts):
      rows = [blocked.block(array, first + block, size) for array in queries]

      def add_pair(other, counts):
        counts, other_counts = counts
        columns = [blocked.block(array, other, size) for array in others[:2]]
        similarities = _negative_similarities(rows, columns)
        counts = _add_reached(
          similarities,
          thresholds,
          counts,
          offsets[block],
          offsets[block + 1],
          axis=1,
        )
        if is_symmetric:
          start, end = offsets[other], offsets[other + 1]
          is_same = (step == 0) & (other == block)
          end = jnp.where(is_same, start, end)
          other_counts = _add_reached(
            similarities, others[2], other_counts, start, end, axis=0
          )
        return counts, other_counts

      return jax.lax.fori_loop(
        first_block(step, block), num_item_blocks, add_pair, counts
      )

    counts, other_counts = jax.lax.fori_loop(
      *blocks, compare, (counts, other_counts)
    )
    return counts, (others, other_counts)

  visitors = (items, 0)
  if is_symmetric:
    visitors = ((*items, thresholds), jnp.zeros_like(counts))
  counts, visitors = visit(0, counts, visitors)
  num_steps = num_devices // 2 + 1 if is_symmetric else num_devices
  if num_steps > 1:
    counts, visitors = jax.lax.fori_loop(
      1,
      num_steps,
      lambda step, state: visit(step, state[0], shift(state[1], 1)),
      (counts, visitors),
    )
  if is_symmetric:
    counts += (
      visitors[1] if num_devices == 1 else shift(visitors[1], 1 - num_steps)
    )
  return counts


def _negative_similarities(queries, items):
  """The similarities of two blocks, -infinity within a class.

  Classes are sorted: blocks whose ranges of classes are apart share none.
  """
  (queries, classes), (items, item_classes) = queries, items
  similarities = blocked.similarities(queries, items)
  may_share = classes[-1] >= item_classes[0]
  may_share &= item_classes[-1] >= classes[0]
  return jax.lax.cond(
    may_share,
    lambda values: jnp.where(
      classes[:, None] == item_classes[None, :], -jnp.inf, values
    ),
    lambda values: values,
    similarities,
  )


def _add_reached(similarities, thresholds, counts, start, end, *, axis):
  """Adds to the counts of the thresholds [start, end) of a block.

  Few thresholds are compared one by one, with all similarities at once. Where
  there are many, each similarity is sought among them and counted at the first
  that it reaches; `positive_ranks` adds up, for it reaches those after as well.

  Args:
    similarities: float32 [block_size, block_size].
    thresholds: float32 [num_thresholds, block_size], descending in each block.
    counts: int32 [num_thresholds, block_size].
    start, end: int32 [].
    axis: of `similarities` along which the items lie, not the queries.
  """

  def compare(counts):
    def add(index, counts):
      reached = similarities >= jnp.expand_dims(thresholds[index], axis)
      return counts.at[index].add(jnp.sum(reached, axis, dtype=jnp.int32))

    return jax.lax.fori_loop(start, end, add, counts)

  def search(counts):
    rows = jax.lax.broadcasted_iota(jnp.int32, similarities.shape, 1 - axis)

    def halve(_, bounds):
      low, high = bounds
      middle = (low + high) // 2
      is_reached = similarities >= thresholds[middle, rows]
      low = jnp.where(is_reached | (low == high), low, middle + 1)
      return low, jnp.where(is_reached, middle, high)

    low = jnp.full(similarities.shape, start)
    low, _ = jax.lax.fori_loop(
      0, 32 - jax.lax.clz(end - start), halve, (low, jnp.full_like(low, end))
    )
    # What reaches no threshold is nowhere.
    place = jnp.where(low < end, low, counts.shape[0])
    return counts.at[place, rows].add(1, mode='drop')

  return jax.lax.cond(end - start > _MAX_COMPARED, search, compare, counts)


def _ranks(
  thresholds,
  counts,
  numbers: list[int],
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
  is_row = order < np.sum(queries.sorted_classes != _FILLING)
  start = 0
  for block in group:
    rows = slice(start, start + numbers[block])
    start = rows.stop
    for device in range(layout.num_devices):
      exists = thresholds[device, rows].T > -np.inf
      negatives = counts[device, rows].T
      if numbers[block] > _MAX_COMPARED:
        negatives = np.cumsum(negatives, axis=1, dtype=np.int32)
      place = np.arange(1, numbers[block] + 1, dtype=np.int32)
      ranks = np.where(exists, negatives + place, 0)
      keep = is_row[block, device]
      if keep.any():
        yield order[block, device][keep], ranks[keep]
