"""Verification: whether two items are of one class, by their similarity.

A pair of items of one class is genuine, any other is an impostor. A threshold t
accepts the pairs whose similarity is at least t:

  FMR(t)   false match rate, the fraction of impostor pairs that t accepts
  FNMR(t)  false non-match rate, the fraction of genuine pairs that t rejects

TAR and FAR of other papers are 1 - FNMR and FMR. There are num_items^2 / 2
pairs, too many to sort. A radix selection finds the thresholds: one pass counts
the pairs by the upper bits of their float32 similarity, a second by the lower
bits in the bins where a threshold lies. Results are exact, in memory that does
not depend on the number of pairs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from proxy_nca_jax import blocked

# Bins of the first pass: 512 from a similarity of 0.5 to 1.
_LOW_BITS = 14
_NUM_BINS = 2 ** (32 - _LOW_BITS)
_NUM_LOW = 2**_LOW_BITS
# Pairs that are converted to bins at a time.
_CHUNK = 2**20


class Verification(NamedTuple):
  """Error rates over all pairs; a similarity is an inner product.

  Attributes:
    eer: equal error rate, the mean of FMR and FNMR at the threshold where they
      differ least.
    eer_threshold: that similarity.
    fnmr: {rate: the FNMR of `thresholds[rate]`}.
    thresholds: {rate: the smallest similarity with an FMR of at most `rate`}.
    num_genuine: number of genuine pairs.
    num_impostor: number of impostor pairs.
    curve: float64 [num_points, 3], (threshold, FMR, FNMR) by ascending
      threshold, from (FMR, FNMR) = (1, 0) to (0, 1); each point is exact.
  """

  eer: float
  eer_threshold: float
  fnmr: dict[float, float]
  thresholds: dict[float, float]
  num_genuine: int
  num_impostor: int
  curve: np.ndarray


def verification(
  points: chex.Array,
  labels: chex.Array,
  *,
  fmr: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
  block_size: int = 2048,
) -> Verification:
  """Computes exact error rates of verification over all pairs of items.

  Args:
    points: float [num_items, dim], finite; unit vectors for cosine similarity.
    labels: int [num_items].
    fmr: false match rates in (0, 1) at which to report the FNMR. Those below 1
      / num_impostor are left out: these pairs cannot tell them from 0.
    block_size: block_size^2 similarities are held at a time.

  Raises:
    ValueError: if there is no genuine or no impostor pair.
  """
  chex.assert_rank([points, labels], [2, 1])
  labels = np.asarray(labels)
  order = np.argsort(labels, kind='stable')
  points, labels = blocked.as_float32(points)[order], labels[order]
  # Items of a class are adjacent, from its first to before its end.
  ends = np.searchsorted(labels, labels, side='right')
  pairs = functools.partial(_pairs, points, ends, block_size)
  upper = _count(pairs, _upper_bits, _NUM_BINS)[:, _BITS_OF_BIN]
  totals = upper.sum(axis=1)
  if not totals.all():
    raise ValueError(
      f'Verification compares pairs of one class with pairs of two; there are '
      f'{totals[0]} and {totals[1]}: add items.'
    )
  accepted = _at_least(upper)
  bins = {
    rate: _first(accepted[1] <= rate * totals[1]) - 1
    for rate in fmr
    if rate * totals[1] >= 1
  }
  eer_bin = _first(_excess(accepted, totals) >= 0) - 1
  refined = sorted({*bins.values(), eer_bin})
  lower = _count(
    pairs, functools.partial(_lower_bins, refined), len(refined) * _NUM_LOW
  ).reshape(2, len(refined), _NUM_LOW)

  def at_least(number):
    """Pairs accepted by each threshold in a bin, [2, _NUM_LOW + 1]."""
    counts = _at_least(lower[:, refined.index(number)])
    return accepted[:, number + 1, None] + counts

  fnmr, thresholds = {}, {}
  for rate, number in bins.items():
    counts = at_least(number)
    low = _first(counts[1] <= rate * totals[1])
    fnmr[rate] = float(1 - counts[0, low] / totals[0])
    thresholds[rate] = _value(number, low)
  counts = at_least(eer_bin)
  excess = _excess(counts, totals)
  low = _first(excess >= 0)
  if -excess[low - 1] < excess[low]:
    low -= 1
  genuine, impostor = counts[:, low] / totals
  edges = np.flatnonzero(upper.any(axis=0))
  edges = np.append(edges, edges[-1] + 1)
  rates = accepted[:, edges] / totals[:, None]
  return Verification(
    eer=float(1 - genuine + impostor) / 2,
    eer_threshold=_value(eer_bin, low),
    fnmr=fnmr,
    thresholds=thresholds,
    num_genuine=int(totals[0]),
    num_impostor=int(totals[1]),
    curve=np.stack(
      [[_value(edge, 0) for edge in edges], rates[1], 1 - rates[0]], axis=1
    ),
  )


def _at_least(counts: np.ndarray) -> np.ndarray:
  """Returns the sums from each bin to the last, and 0: [..., num_bins + 1]."""
  sums = np.cumsum(counts[..., ::-1], axis=-1)[..., ::-1]
  return np.concatenate([sums, np.zeros_like(sums[..., :1])], axis=-1)


def _excess(accepted: np.ndarray, totals: np.ndarray) -> np.ndarray:
  """Returns FNMR - FMR, which ascends with the threshold, from -1 to 1."""
  return 1 - accepted[0] / totals[0] - accepted[1] / totals[1]


def _first(is_reached: np.ndarray) -> int:
  """Returns the index of the first True of False, ..., True, ...."""
  return int(np.argmax(is_reached))


def _count(pairs, bins, num_bins: int) -> np.ndarray:
  """Counts genuine and impostor pairs by bin, int64 [2, num_bins].

  Args:
    pairs: yields (kind, similarities), as `_pairs` does.
    bins: maps the bits of similarities to bins; it may leave some out.
    num_bins: number of bins.
  """
  counts = np.zeros((2, num_bins), np.int64)
  for kind, similarities in pairs():
    bits = similarities.reshape(-1).view(np.uint32)
    for begin in range(0, len(bits), _CHUNK):
      chunk = bins(bits[begin : begin + _CHUNK])
      counts[kind] += np.bincount(chunk, minlength=num_bins)
  return counts


# The bits of a float32 ascend with its value once the sign bit of positive
# values is set and all bits of negative ones are inverted. Then the upper bits
# are those of a bin; these are the bits as they are, by bin.
_BITS_OF_BIN = np.concatenate(
  [np.arange(_NUM_BINS)[: _NUM_BINS // 2 - 1 : -1], np.arange(_NUM_BINS // 2)]
)


def _upper_bits(bits: np.ndarray) -> np.ndarray:
  return bits >> _LOW_BITS


def _lower_bins(refined: Sequence[int], bits: np.ndarray) -> np.ndarray:
  """Returns the lower bits of the pairs in some bins, after their position.

  Args:
    refined: the bins.
    bits: uint32 [num_pairs].

  Returns:
    int64 [num_refined_pairs], position * _NUM_LOW + the ordered lower bits.
  """
  positions = np.full(_NUM_BINS, -1, np.int8)
  positions[_BITS_OF_BIN[refined]] = np.arange(len(refined))
  position = positions[bits >> _LOW_BITS]
  is_refined = np.flatnonzero(position >= 0)
  bits, position = bits[is_refined], position[is_refined].astype(np.int64)
  low = bits & (_NUM_LOW - 1)
  low = np.where(bits >> 31, _NUM_LOW - 1 - low, low)
  return position * _NUM_LOW + low


def _value(upper: int, low: int) -> float:
  """Returns the float32 of an upper and a lower bin."""
  ordered = (upper << _LOW_BITS) + low
  bits = ordered - 2**31 if ordered >= 2**31 else 2**32 - 1 - ordered
  return float(np.uint32(bits).view(np.float32))


def _pairs(
  points: chex.Array, ends: np.ndarray, block_size: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (0, similarities of genuine pairs) and (1, those of impostors).

  Args:
    points: float32 [num_items, dim], sorted by class.
    ends: int [num_items], the index after the last item of each one's class.
    block_size: items per block.
  """
  size = min(block_size, blocked.round_up(len(points)))
  starts = range(0, len(points), size)
  blocks = [
    blocked.take(points, np.arange(first, first + size)) for first in starts
  ]
  for first_row, queries in zip(starts, blocks):
    rows = np.arange(first_row, min(first_row + size, len(points)))
    for first_column, items in zip(starts, blocks):
      if first_column < first_row:
        continue
      columns = np.arange(first_column, min(first_column + size, len(points)))
      similarities = np.asarray(_similarities(queries, items))
      similarities = similarities[: len(rows), : len(columns)]
      if first_column >= ends[rows[-1]]:
        yield 1, similarities
        continue
      is_impostor = columns >= ends[rows, None]
      yield 1, similarities[is_impostor]
      yield 0, similarities[~is_impostor & (columns > rows[:, None])]


@jax.jit
def _similarities(queries, items):
  similarities = blocked.similarities(queries, items)
  # -0, whose bits are not those of 0.
  return jnp.where(similarities == 0, 0, similarities)
