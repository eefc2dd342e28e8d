"""Exact ranks of every positive by counting, with neither sort nor top-K.

The rank of a positive is 1 + the positives before it + the negatives that are
at least as near. So a query's similarities to its positives are thresholds, and
counting the negatives that reach a threshold takes one comparison each. Rows
are sorted by the size of their class, so that a class is one band of rows and
the queries of a block have about as many thresholds. Where items search among
themselves, the product of two blocks serves both. Memory is one block of
similarities, the thresholds and the counts.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


def positive_ranks(
    embeddings: chex.Array,
    labels: np.ndarray,
    *,
    gallery: tuple[chex.Array, np.ndarray] | None = None,
    cameras: tuple[np.ndarray, np.ndarray] | None = None,
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
    block_size: queries a block. It changes no result but through the rounding
      of the similarities.

  Yields:
    (queries, ranks): int64 [at most block_size], rows of `embeddings`; int32
    [the same, most positives of these], the ranks of their positives from 1,
    ascending, filled with 0. Every query comes once.
  """
  chex.assert_rank([embeddings, labels], [2, 1])
  is_self = gallery is None
  query_classes, item_classes = _number_by_size(
    labels, labels if is_self else gallery[1]
  )
  queries = _sort(embeddings, query_classes, block_size)
  items = queries if is_self else _sort(gallery[0], item_classes, block_size)
  if cameras is not None:
    cameras = (cameras[0][queries.order], cameras[1][items.order])
  thresholds = [
    _thresholds(queries, items, first, block_size, cameras, is_self)
    for first in range(0, len(queries.order), block_size)
  ]
  numbers = [len(rows) for rows in thresholds]
  offsets = np.concatenate([[0], np.cumsum(numbers)]).astype(np.int32)
  thresholds = jnp.concatenate(thresholds)
  counts = jnp.zeros(thresholds.shape, jnp.int32)
  for block in range(len(numbers)):
    counts = _count(
      counts,
      thresholds,
      offsets,
      block,
      queries[:2],
      items[:2],
      block_size=block_size,
      is_self=is_self,
    )
  for block, number in enumerate(numbers):
    rows = slice(offsets[block], offsets[block + 1])
    exists = np.asarray(thresholds[rows]).T > -np.inf
    place = np.arange(1, number + 1, dtype=np.int32)
    negatives = np.asarray(counts[rows]).T
    if number > _MAX_COMPARED:
      negatives = np.cumsum(negatives, axis=1, dtype=np.int32)
    ranks = np.where(exists, negatives + place, 0)
    order = queries.order[block * block_size : (block + 1) * block_size]
    yield order, ranks[: len(order)]


class _Sorted(NamedTuple):
  """Rows sorted by class, filled up to whole blocks.

  Attributes:
    embeddings: float32 [num_rows, dim].
    classes: int32 [num_rows], ascending; in the filling larger than any class.
    order: int64 [at most num_rows], where the rows come from.
  """

  embeddings: jax.Array
  classes: np.ndarray
  order: np.ndarray


# Thresholds of a block that are compared one by one; a comparison of all
# similarities took 0.25 ms on two CPU cores, and a search about 35 ms.
_MAX_COMPARED = 128
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


def _sort(embeddings, classes: np.ndarray, block_size: int) -> _Sorted:
  order = np.argsort(classes, kind='stable')
  # No block is smaller than others: a product of another shape may be rounded
  # differently.
  filling = (0, -len(order) % block_size)
  embeddings = jnp.asarray(embeddings, jnp.float32)[order]
  return _Sorted(
    jnp.pad(embeddings, (filling, (0, 0))),
    np.pad(classes[order], filling, constant_values=_FILLING),
    order,
  )


def _thresholds(
    queries: _Sorted, items: _Sorted, first: int, block_size: int, cameras,
    is_self: bool,
) -> jax.Array:
  """The similarities of a block of queries to their positives.

  Returns:
    float32 [most positives of these queries, block_size], descending, then
    -infinity.
  """
  rows = slice(first, first + block_size)
  classes = queries.classes[rows]
  starts = np.searchsorted(items.classes, classes, 'left')
  ends = np.searchsorted(items.classes, classes, 'right')
  starts = np.where(classes == _FILLING, starts[0], starts)
  ends = np.where(classes == _FILLING, starts, ends)
  own = np.full(block_size, len(items.classes))
  if is_self:
    own = np.arange(first, first + block_size)
  if cameras is not None:
    mine = cameras[0][rows]
    cameras = np.pad(mine, (0, block_size - len(mine))), cameras[1]
  number = max(int(np.max(ends - starts)) - is_self, 1)
  thresholds = _block_thresholds(
    jax.lax.dynamic_slice_in_dim(queries.embeddings, first, block_size),
    items.embeddings,
    starts,
    ends,
    own,
    cameras,
    block_size=block_size,
    # Rounded up, so that few programs are compiled.
    number=1 << (number - 1).bit_length(),
  )
  return thresholds[:number]


@functools.partial(jax.jit, static_argnames=('block_size', 'number'))
def _block_thresholds(
    queries, items, starts, ends, own, cameras, *, block_size, number
):
  """Gathers from the blocks of items that hold the queries' classes."""
  place = jnp.arange(number)[None, :]
  columns = starts[:, None] + place
  columns += columns >= own[:, None]
  exists = columns < ends[:, None]
  if cameras is not None:
    exists &= cameras[1].at[columns].get(mode='clip') != cameras[0][:, None]

  def gather(block, positives):
    similarities = _similarities(
      queries,
      jax.lax.dynamic_slice_in_dim(items, block * block_size, block_size),
    )
    local = columns - block * block_size
    found = jnp.take_along_axis(
      similarities, jnp.clip(local, 0, block_size - 1), axis=1
    )
    is_here = (local >= 0) & (local < block_size)
    return jnp.where(exists & is_here, found, positives)

  positives = jax.lax.fori_loop(
    jnp.min(starts) // block_size,
    (jnp.max(ends) - 1) // block_size + 1,
    gather,
    jnp.full(columns.shape, -jnp.inf),
  )
  positives = -jnp.sort(-positives, axis=1)
  return positives.T


def _similarities(queries, items):
  return jnp.dot(queries, items.T, precision=jax.lax.Precision.HIGHEST)


@functools.partial(
  jax.jit, static_argnames=('block_size', 'is_self'), donate_argnames='counts'
)
def _count(
    counts, thresholds, offsets, block, queries, items, *, block_size, is_self
):
  """Adds the negatives that reach the thresholds of a block of queries.

  Args:
    counts: int32 [num_thresholds, block_size].
    thresholds: float32 [num_thresholds, block_size].
    offsets: int32 [num_blocks + 1], where each block's thresholds begin.
    block: of the queries.
    queries, items: (embeddings, classes), whole blocks.
    block_size: rows of a block.
    is_self: whether the queries are the items. Then only blocks from `block` on
      are compared, and each pair adds to the counts of both.
  """

  def slice_block(rows, index):
    return [
      jax.lax.dynamic_slice_in_dim(array, index * block_size, block_size)
      for array in rows
    ]

  embeddings, classes = slice_block(queries, block)

  def add_pair(other, counts):
    other_embeddings, other_classes = slice_block(items, other)
    similarities = _similarities(embeddings, other_embeddings)
    is_negative = classes[:, None] != other_classes[None, :]
    is_negative &= (other_classes != _FILLING)[None, :]
    similarities = jnp.where(is_negative, similarities, -jnp.inf)

    start, end = offsets[block], offsets[block + 1]
    add_reached = functools.partial(_add_reached, similarities, thresholds)
    counts = add_reached(counts, start, end, axis=1)
    if is_self:
      start, end = offsets[other], offsets[other + 1]
      end = jnp.where(other == block, start, end)
      counts = add_reached(counts, start, end, axis=0)
    return counts

  num_blocks = items[0].shape[0] // block_size
  first = block if is_self else 0
  return jax.lax.fori_loop(first, num_blocks, add_pair, counts)


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
