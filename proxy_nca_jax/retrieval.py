"""Exact ranks of every positive by counting, with neither sort nor top-K.

With the rows sorted by class, a query's positives are one band of columns. The
rank of a positive is 1 + the positives before it + the negatives that are at
least as near, which takes one comparison a negative; memory is one block of
similarities.
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
    block_size: int = 256,
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
    [the same, max_positives], the ranks of their positives from 1, ascending,
    filled with 0. Every query comes once.
  """
  chex.assert_rank([embeddings, labels], [2, 1])
  is_self = gallery is None
  queries = _sort_by_label(embeddings, labels)
  items = queries if is_self else _sort_by_label(*gallery)
  starts = np.searchsorted(items.labels, queries.labels, 'left')
  ends = np.searchsorted(items.labels, queries.labels, 'right')
  num_queries, num_items = len(queries.labels), len(items.labels)
  max_positives = max(int(np.max(ends - starts, initial=1)) - is_self, 1)
  own = np.arange(num_queries) if is_self else np.full(num_queries, num_items)
  if cameras is not None:
    cameras = cameras[0][queries.order], cameras[1][items.order]
  # The last block is moved back to full size: one compilation, and no matrix
  # product of another shape, whose rounding could differ.
  block_size = min(block_size, num_queries)
  for start in range(0, num_queries, block_size):
    first = min(start, num_queries - block_size)
    block = slice(first, first + block_size)
    ranks = _block_ranks(
      jax.lax.dynamic_slice_in_dim(queries.embeddings, first, block_size),
      items.embeddings,
      starts[block],
      ends[block],
      own[block],
      None if cameras is None else (cameras[0][block], cameras[1]),
      max_positives,
    )
    new = slice(start - first, None)
    yield queries.order[block][new], np.asarray(ranks)[new]


class _Sorted(NamedTuple):
  """Rows sorted by label: a class is one band of them."""

  embeddings: jax.Array
  labels: np.ndarray
  order: np.ndarray


def _sort_by_label(embeddings, labels) -> _Sorted:
  labels = np.asarray(labels)
  order = np.argsort(labels, kind='stable')
  return _Sorted(
    jnp.asarray(embeddings, jnp.float32)[order], labels[order], order
  )


@functools.partial(jax.jit, static_argnums=6)
def _block_ranks(queries, items, starts, ends, own, cameras, max_positives):
  """Ranks the positives of a block of queries.

  Args:
    queries, items: float32 [block, dim] and [num_items, dim].
    starts, ends: int [block], the band of each query's class in `items`.
    own: int [block], the query's own place in `items`, or beyond its end.
    cameras: None or int [block] and [num_items].
    max_positives: of any query.
  """
  starts, ends, own = starts[:, None], ends[:, None], own[:, None]
  similarities = jnp.dot(
    queries, items.T, precision=jax.lax.Precision.HIGHEST
  )
  columns = jnp.arange(items.shape[0])[None, :]
  is_negative = (columns < starts) | (columns >= ends)
  negatives = jnp.where(is_negative, similarities, -jnp.inf)

  place = jnp.arange(max_positives)[None, :]
  columns = starts + place
  columns += columns >= own
  exists = columns < ends
  columns = jnp.where(exists, columns, 0)
  if cameras is not None:
    exists &= cameras[1][columns] != cameras[0][:, None]
  positives = jnp.take_along_axis(similarities, columns, axis=1)
  positives = -jnp.sort(-jnp.where(exists, positives, -jnp.inf), axis=1)

  def negatives_before(positive):
    return jnp.sum(negatives >= positive[:, None], axis=1, dtype=jnp.int32)

  before = jax.lax.map(negatives_before, positives.T).T
  ranks = before + 1 + place.astype(jnp.int32)
  # The sort brought those that exist to the front.
  return jnp.where(place < jnp.sum(exists, axis=1, keepdims=True), ranks, 0)
