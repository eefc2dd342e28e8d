"""Exact ranks of positives by counting, and nearest neighbours, block by block.

The rank of a positive is 1 + the positives before it + the negatives that are
at least as near. So a query's similarities to its positives are thresholds, and
counting the negatives that reach a threshold takes one comparison each, with
neither sort nor top-K. Rows are sorted by the size of their class, so that a
class is one band of rows and the queries of a block have about as many
thresholds. Where items search among themselves, the product of two blocks
serves both. Memory is one block of similarities, the thresholds and the counts.

Several devices are dealt the blocks in turn and pass theirs round. Counts are
whole numbers, whose sum has no order. Blocks have a multiple of 64 rows: on
CPUs a product of fewer than 16 is rounded differently, larger ones alike,
wherever their rows lie.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec


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
    block_size: queries a block, rounded up to a multiple of 64. It changes no
      result.

  Yields:
    (queries, ranks): int64 [at most block_size], rows of `embeddings`; int32
    [the same, most positives of these, or 1], the ranks of their positives from
    1, ascending, filled with 0. Every query comes once.
  """
  chex.assert_rank([embeddings, labels], [2, 1])
  is_self = gallery is None
  layout = _Layout(mesh, axis_name, -(-block_size // 64) * 64)
  embeddings = _as_float32(embeddings)
  if is_self:
    gallery = (embeddings, labels)
  else:
    gallery = (_as_float32(gallery[0]), gallery[1])
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
    thresholds, counts = _count(
      queries[:2],
      items[:2],
      thresholds,
      group.start,
      numbers=tuple(numbers[block] for block in group),
      is_symmetric=is_self and len(groups) == 1,
      layout=layout,
    )
    yield from _ranks(thresholds, counts, numbers, group, queries, layout)


class _Layout(NamedTuple):
  """How rows lie on devices: block b is the (b // n)-th of device b % n."""

  mesh: jax.sharding.Mesh | None
  axis_name: str | None
  block_size: int

  @property
  def num_devices(self) -> int:
    return 1 if self.mesh is None else self.mesh.shape[self.axis_name]

  def deal(self, rows: np.ndarray) -> np.ndarray:
    """Brings sorted rows into the order of the devices."""
    blocks = rows.reshape(-1, self.num_devices, self.block_size)
    return blocks.swapaxes(0, 1).reshape(-1)

  def place(self, rows: np.ndarray) -> jax.Array:
    """Divides rows among the devices."""
    if self.mesh is None:
      return jax.device_put(rows)
    sharding = NamedSharding(self.mesh, PartitionSpec(self.axis_name))
    rows = np.asarray(rows)
    return jax.make_array_from_callback(
      rows.shape, sharding, lambda index: rows[index]
    )

  def take(self, rows: jax.Array | np.ndarray, order: np.ndarray) -> jax.Array:
    """Places the rows in this order; an order beyond them is a filling of NaN.

    A similarity to NaN reaches no threshold.
    """
    if isinstance(rows, jax.Array):
      return self.place(_take(rows, order))
    taken = np.empty((len(order), *rows.shape[1:]), rows.dtype)
    np.take(rows, order, axis=0, mode='clip', out=taken)
    taken[order >= len(rows)] = np.nan
    return self.place(taken)

  def on_each(self, fn, *, is_shared: bool = False):
    """Maps (rows of a device, what all share) to rows, or to what all share."""
    if self.mesh is None:
      return fn
    rows = PartitionSpec(self.axis_name)
    return jax.shard_map(
      fn,
      mesh=self.mesh,
      in_specs=(rows, PartitionSpec()),
      out_specs=PartitionSpec() if is_shared else rows,
      check_vma=False,
    )


def _as_float32(rows: chex.Array) -> jax.Array | np.ndarray:
  """Leaves rows where they are: another copy of all of them is memory."""
  if isinstance(rows, jax.Array):
    return rows.astype(jnp.float32)
  return np.asarray(rows, np.float32)


@jax.jit
def _take(rows, order):
  return rows.at[order].get(mode='fill', fill_value=jnp.nan)


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


def _sort(embeddings, classes: np.ndarray, layout: _Layout) -> _Sorted:
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
    queries: _Sorted, items: _Sorted, layout: _Layout, *, is_self: bool
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


def _groups(numbers: list[int], layout: _Layout) -> list[range]:
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
    band: _Band, embeddings, items: _Sorted, cameras, layout: _Layout,
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
    name: layout.place(array.astype(np.int32))
    for name, array in arrays.items()
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
    queries = _block(queries, block, size)
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
      similarities = _similarities(_block(band['items'], index, size), queries)
      columns = index * size + jnp.arange(size)[:, None]
      similarities = jnp.where(is_positive(columns), similarities, -jnp.inf)
      return jnp.maximum(nearest, jnp.max(similarities, axis=0)[None, :])

    columns = starts + jnp.arange(number)[:, None]
    columns += columns >= own

    def gather(index, positives):
      similarities = _similarities(_block(band['items'], index, size), queries)
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


def _block(rows, index, size):
  return jax.lax.dynamic_slice_in_dim(rows, index * size, size)


def _similarities(queries, items):
  return jnp.dot(queries, items.T, precision=jax.lax.Precision.HIGHEST)


@functools.partial(
  jax.jit, static_argnames=('numbers', 'is_symmetric', 'layout')
)
def _count(
    queries, items, thresholds, first, *, numbers, is_symmetric, layout
):
  """Counts the negatives that reach the thresholds of blocks of queries.

  Args:
    queries, items: (embeddings, classes), on each device.
    thresholds: for each block float32 [at least its number, block_size], on
      each device.
    first: the block of the first thresholds.
    numbers: of thresholds, of each block.
    is_symmetric: whether the queries are the items, all of them. Then the
      product of two blocks serves both.
    layout: of the rows.

  Returns:
    The thresholds and int32 counts, both [sum of numbers, block_size] on each
    device.
  """
  offsets = jnp.cumsum(jnp.array((0, *numbers), jnp.int32))
  count = functools.partial(
    _count_around, is_symmetric=is_symmetric, layout=layout
  )

  def local(rows, shared):
    queries, items, thresholds = rows
    thresholds = jnp.concatenate(
      [block[:number] for block, number in zip(thresholds, numbers)]
    )
    return thresholds, count(queries, items, thresholds, *shared)

  return layout.on_each(local)((queries, items, thresholds), (first, offsets))


def _count_around(
    queries, items, thresholds, first, offsets, *, is_symmetric, layout
):
  """Counts on one device, which the items of all others visit in turn.

  In the symmetric case they bring their thresholds and take home their counts,
  having met every device once: half of the way round is enough.
  """
  num_devices, size = layout.num_devices, layout.block_size
  num_query_blocks = len(offsets) - 1
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
      rows = [_block(array, first + block, size) for array in queries]

      def add_pair(other, counts):
        counts, other_counts = counts
        columns = [_block(array, other, size) for array in others[:2]]
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
      0, num_query_blocks, compare, (counts, other_counts)
    )
    return counts, (others, other_counts)

  counts = jnp.zeros(thresholds.shape, jnp.int32)
  visitors = ((*items, thresholds), counts) if is_symmetric else (items, 0)
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
    counts += visitors[1] if num_devices == 1 else shift(
      visitors[1], 1 - num_steps
    )
  return counts


def _negative_similarities(queries, items):
  """The similarities of two blocks, -infinity within a class.

  Classes are sorted: blocks whose ranges of classes are apart share none.
  """
  (queries, classes), (items, item_classes) = queries, items
  similarities = _similarities(queries, items)
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
    thresholds, counts, numbers: list[int], group: range, queries: _Sorted,
    layout: _Layout,
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
      result but an approximate one.

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
  share = -(-num_items // num_devices)
  layout = _Layout(mesh, axis_name, -(-min(block_size, share) // 64) * 64)
  filling = -num_items % (num_devices * layout.block_size)
  items = layout.take(
    _as_float32(gallery), np.arange(num_items + filling)
  )
  queries = jnp.asarray(queries, jnp.float32)
  num_queries, dim = queries.shape
  queries = jnp.pad(queries, ((0, -num_queries % _QUERIES), (0, 0)))
  similarities, indices = _nearest(
    items,
    queries.reshape(-1, _QUERIES, dim),
    num_items,
    k=k,
    is_self=is_self,
    recall_target=recall_target,
    layout=layout,
  )
  return tuple(
    rows.reshape(-1, k)[:num_queries] for rows in (similarities, indices)
  )


# Queries at once: with the default blocks, 8 MiB of similarities.
_QUERIES = 256


@functools.partial(
  jax.jit, static_argnames=('k', 'is_self', 'recall_target', 'layout')
)
def _nearest(items, queries, num_items, *, k, is_self, recall_target, layout):
  """Returns (similarities, indices) [num_blocks, _QUERIES, k]."""
  size = layout.block_size
  if recall_target is None:
    top_k = jax.lax.top_k
  else:
    top_k = functools.partial(
      jax.lax.approx_max_k, recall_target=recall_target
    )

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
        similarities = _similarities(queries, _block(items, index, size))
        first = device * num_rows + index * size
        places = first + jnp.arange(size)[None, :]
        is_searched = places < num_items
        if is_self:
          is_searched &= places != own[:, None]
        new, place = top_k(
          jnp.where(is_searched, similarities, -jnp.inf), min(k, size)
        )
        return merge(*best, new, first + place)

      best = (
        jnp.full((_QUERIES, k), -jnp.inf), jnp.zeros((_QUERIES, k), jnp.int32)
      )
      best = jax.lax.fori_loop(0, num_rows // size, add_block, best)
      if layout.num_devices > 1:
        # Devices hold the items in order: so do their results.
        best = jax.lax.all_gather(best, layout.axis_name, axis=1, tiled=True)
        best = merge(*(rows[:, :0] for rows in best), *best)
      return best

    own = jnp.arange(queries.shape[0] * _QUERIES).reshape(-1, _QUERIES)
    return jax.lax.map(search, (queries, own))

  return layout.on_each(local, is_shared=True)(items, (queries, num_items))


def pairs_above(
    points: chex.Array, threshold: float, *, block_size: int = 2048
) -> np.ndarray:
  """Finds all pairs whose inner product in float32 is at least a threshold.

  Args:
    points: float [num_points, dim].
    threshold: of the products.
    block_size: points whose products are held at once, squared.

  Returns:
    int64 [num_pairs, 2], each pair once and ascending, in order.
  """
  chex.assert_rank(points, 2)
  points = _as_float32(points)
  size = min(block_size, -(-len(points) // 64) * 64)
  blocks = [
    _take(points, np.arange(first, first + size))
    for first in range(0, len(points), size)
  ]
  pairs = [np.zeros((0, 2), np.int64)]
  for row, queries in enumerate(blocks):
    for column in range(row, len(blocks)):
      # The rows after the last are not a number, and reach nothing.
      found = np.asarray(_reach(queries, blocks[column], threshold))
      if row == column:
        found = np.triu(found, 1)
      pairs.append(np.argwhere(found) + size * np.array([row, column]))
  pairs = np.concatenate(pairs)
  return pairs[np.lexsort(pairs.T[::-1])]


@jax.jit
def _reach(queries, items, threshold):
  return _similarities(queries, items) >= threshold
