"""Exact ranks of every positive by counting, with neither sort nor top-K.

With the rows sorted by class, a query's positives are one band of columns. The
rank of a positive is 1 + the positives before it + the negatives that are at
least as near, which takes one comparison a negative; memory is one block of
similarities.
"""

import functools
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np


def positive_ranks(
    embeddings: chex.Array, labels: np.ndarray, *, block_size: int = 256
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Ranks each item's positives among all other items, block by block.

  Nearest is the largest inner product in float32: on the unit sphere the
  smallest distance. The item itself is left out by its index.

  Args:
    embeddings: float [num_items, dim], of unit norm.
    labels: int [num_items].
    block_size: queries a block. It changes no result but through the rounding
      of the similarities.

  Yields:
    (queries, ranks): int64 [at most block_size], rows of `embeddings`; int32
    [the same, max_positives], the ranks of their positives from 1, ascending,
    filled with 0. Every item is a query once.
  """
  chex.assert_rank([embeddings, labels], [2, 1])
  labels = np.asarray(labels)
  order = np.argsort(labels, kind='stable')
  labels = labels[order]
  num_items = len(labels)
  starts = np.searchsorted(labels, labels, 'left')
  ends = np.searchsorted(labels, labels, 'right')
  max_positives = max(int(np.max(ends - starts, initial=1)) - 1, 1)
  gallery = jnp.asarray(embeddings, jnp.float32)[order]
  # The last block is moved back to full size: one compilation, and no matrix
  # product of another shape, whose rounding could differ.
  block_size = min(block_size, num_items)
  for start in range(0, num_items, block_size):
    first = min(start, num_items - block_size)
    ranks = _block_ranks(
      gallery, starts, ends, first, block_size, max_positives
    )
    new = slice(start - first, None)
    yield order[first : first + block_size][new], np.asarray(ranks)[new]


@functools.partial(jax.jit, static_argnums=(4, 5))
def _block_ranks(gallery, starts, ends, first, block_size, max_positives):
  """Ranks the positives of the queries [first, first + block_size)."""
  queries = jax.lax.dynamic_slice_in_dim(gallery, first, block_size)
  starts = jax.lax.dynamic_slice_in_dim(starts, first, block_size)[:, None]
  ends = jax.lax.dynamic_slice_in_dim(ends, first, block_size)[:, None]
  own = first + jnp.arange(block_size)[:, None]
  similarities = jnp.dot(
    queries, gallery.T, precision=jax.lax.Precision.HIGHEST
  )
  columns = jnp.arange(gallery.shape[0])[None, :]
  is_negative = (columns < starts) | (columns >= ends)
  negatives = jnp.where(is_negative, similarities, -jnp.inf)

  columns = starts + jnp.arange(max_positives)[None, :]
  columns += columns >= own
  exists = columns < ends
  positives = jnp.take_along_axis(
    similarities, jnp.where(exists, columns, 0), axis=1
  )
  positives = -jnp.sort(-jnp.where(exists, positives, -jnp.inf), axis=1)

  def negatives_before(positive):
    return jnp.sum(negatives >= positive[:, None], axis=1, dtype=jnp.int32)

  before = jax.lax.map(negatives_before, positives.T).T
  ranks = before + 1 + jnp.arange(max_positives, dtype=jnp.int32)[None, :]
  # The columns that exist come first in `exists`, as they do after the sort.
  num_positives = jnp.sum(exists, axis=1, keepdims=True)
  return jnp.where(
    jnp.arange(max_positives)[None, :] < num_positives, ranks, 0
  )
