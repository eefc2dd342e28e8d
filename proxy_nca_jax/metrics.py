"""Metrics of retrieval and clustering, from ranks or assignments alone.

Retrieval: `ranks: int [num_queries, max_positives]` holds in each row the ranks
of the query's positives in its gallery, from 1, ascending; rows with fewer
positives are filled with 0. A positive's rank counts the negatives that are at
least as near as it: ties count against the query. Positives that tie with each
other take consecutive ranks. Functions return one score a query, NaN for a
query that has no positive, so that a `nanmean` leaves it out.

Clustering: `labels` and `clusters` are int [num_points] of any values. Computed
in float64 on the host from the non-zero cells of the contingency table.

References:
  Musgrave et al., A Metric Learning Reality Check, ECCV 2020,
    https://arxiv.org/abs/2003.08505 (R-precision, MAP@R)
  Manning et al., Introduction to Information Retrieval, chapter 16 (NMI,
    purity, pairs)
"""

from typing import NamedTuple

import numpy as np
from scipy import special


def recall_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
  """1 where any positive is among the k nearest, else 0; float64 [queries].

  With the gallery of re-identification this is the CMC at rank k.
  """
  first = ranks[:, 0]
  return np.where(first > 0, first <= k, np.nan)


def r_precision(ranks: np.ndarray) -> np.ndarray:
  """The share of positives among the R nearest, R the query's positives."""
  num_positives = np.sum(ranks > 0, axis=1)
  found = np.sum(_within_r(ranks, num_positives), axis=1)
  return _ratio(found, num_positives)


def map_at_r(ranks: np.ndarray) -> np.ndarray:
  """Mean average precision at R: 1/R sum_{i<=R} [i is a hit] precision@i."""
  num_positives = np.sum(ranks > 0, axis=1)
  order = np.arange(1, ranks.shape[1] + 1)
  precisions = order / np.maximum(ranks, 1)
  hits = _within_r(ranks, num_positives)
  return _ratio(np.sum(precisions * hits, axis=1), num_positives)


def average_precision(ranks: np.ndarray) -> np.ndarray:
  """The mean over all positives of the precision at each one's rank."""
  num_positives = np.sum(ranks > 0, axis=1)
  order = np.arange(1, ranks.shape[1] + 1)
  precisions = np.where(ranks > 0, order / np.maximum(ranks, 1), 0)
  return _ratio(np.sum(precisions, axis=1), num_positives)


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
  """1 / the rank of the nearest positive; float64 [queries]."""
  first = ranks[:, 0]
  return np.where(first > 0, 1 / np.maximum(first, 1), np.nan)


def _within_r(ranks: np.ndarray, num_positives: np.ndarray) -> np.ndarray:
  return (ranks > 0) & (ranks <= num_positives[:, None])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  with np.errstate(invalid='ignore'):
    return np.divide(numerator, denominator, dtype=np.float64)


class _Contingency(NamedTuple):
  """The non-zero cells of a table of labels by clusters.

  Attributes:
    sizes: int64 [num_cells], points in each cell.
    rows, columns: int64 [num_cells], the cell's label and cluster.
    label_sizes, cluster_sizes: int64, the sums over columns and over rows.
  """

  sizes: np.ndarray
  rows: np.ndarray
  columns: np.ndarray
  label_sizes: np.ndarray
  cluster_sizes: np.ndarray

  @property
  def num_points(self) -> int:
    return int(self.label_sizes.sum())


def _contingency(labels: np.ndarray, clusters: np.ndarray) -> _Contingency:
  labels, clusters = np.asarray(labels), np.asarray(clusters)
  if labels.shape != clusters.shape or labels.ndim != 1 or not labels.size:
    raise ValueError(
      'labels and clusters must be two vectors of one length, at least 1; got '
      f'shapes {labels.shape} and {clusters.shape}.'
    )
  _, labels, label_sizes = _number(labels)
  _, clusters, cluster_sizes = _number(clusters)
  num_clusters = len(cluster_sizes)
  cells, _, sizes = _number(labels.astype(np.int64) * num_clusters + clusters)
  rows, columns = np.divmod(cells, num_clusters)
  return _Contingency(sizes, rows, columns, label_sizes, cluster_sizes)


def _number(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the distinct values, each value's number, and int64 counts."""
  return np.unique(values, return_inverse=True, return_counts=True)


def _entropy(sizes: np.ndarray) -> float:
  shares = sizes / sizes.sum()
  return float(-np.sum(shares * np.log(shares)))


def _information(table: _Contingency) -> float:
  """I(labels; clusters) in nats."""
  expected = table.label_sizes[table.rows] * (
    table.cluster_sizes[table.columns] / table.num_points
  )
  shares = table.sizes / table.num_points
  return float(np.sum(shares * np.log(table.sizes / expected)))


_AVERAGES = {
  'arithmetic': lambda a, b: (a + b) / 2,
  'geometric': lambda a, b: float(np.sqrt(a * b)),
  'max': max,
  'min': min,
}


def _mean_entropy(table: _Contingency, average: str) -> float:
  if average not in _AVERAGES:
    raise ValueError(
      f'Unknown average {average!r}: choose one of {", ".join(_AVERAGES)}.'
    )
  return _AVERAGES[average](
    _entropy(table.label_sizes), _entropy(table.cluster_sizes)
  )


def normalized_mutual_information(
  labels: np.ndarray, clusters: np.ndarray, *, average: str = 'arithmetic'
) -> float:
  """NMI = I(labels; clusters) / mean(H(labels), H(clusters)), in [0, 1].

  The arithmetic mean is that of the formula of Proxy-NCA and most later papers;
  ProxyNCA++ takes the geometric one. Two partitions of one part each agree: 1;
  one of them with a partition of several shares no information: 0.

  Args:
    labels: int [num_points].
    clusters: int [num_points].
    average: 'arithmetic', 'geometric', 'max' or 'min', of the two entropies.

  Returns:
    The score, a float.

  Raises:
    ValueError: if the lengths differ or there is no point.
  """
  table = _contingency(labels, clusters)
  mean = _mean_entropy(table, average)
  if len(table.label_sizes) == len(table.cluster_sizes) == 1:
    return 1.0
  information = _information(table)
  if mean == 0 or information <= 0:
    return 0.0
  return min(information / mean, 1.0)


def adjusted_mutual_information(
  labels: np.ndarray, clusters: np.ndarray, *, average: str = 'arithmetic'
) -> float:
  """AMI = (I - E[I]) / (mean(H(labels), H(clusters)) - E[I]), at most 1.

  E[I] is of partitions of the same sizes drawn at random, whose scores are 0 on
  average (Vinh et al., ICML 2009, https://doi.org/10.1145/1553374.1553511).
  If E[I] is the mean entropy, as with one partition of single points and the
  average 'min', the score is 0.

  Args:
    labels: int [num_points].
    clusters: int [num_points].
    average: as for `normalized_mutual_information`.

  Returns:
    The score, a float.

  Raises:
    ValueError: if the lengths differ or there is no point.
  """
  table = _contingency(labels, clusters)
  mean = _mean_entropy(table, average)
  num_labels, num_clusters = len(table.label_sizes), len(table.cluster_sizes)
  # One part each, or each point a part: the only partition of these sizes.
  if num_labels == num_clusters and num_labels in (1, table.num_points):
    return 1.0
  expected = _expected_information(table)
  # Where chance alone reaches the most there is, nothing can be adjusted.
  if abs(mean - expected) < 1e-12 * max(mean, 1):
    return 0.0
  return (_information(table) - expected) / (mean - expected)


def _expected_information(table: _Contingency) -> float:
  """E[I] under the hypergeometric model, a term for each pair of sizes.

  Sizes repeat: 22,634 classes of Stanford Online Products have 11 of them.
  """
  n = table.num_points
  rows = zip(*np.unique(table.label_sizes, return_counts=True))
  columns = list(zip(*np.unique(table.cluster_sizes, return_counts=True)))
  total = 0.0
  for a, num_a in rows:
    for b, num_b in columns:
      both = np.arange(max(0, a + b - n), min(a, b) + 1)
      information = special.xlogy(both / n, both * (n / (a * b)))
      probability = _hypergeometric(both, a, b, n)
      total += num_a * num_b * np.sum(information * probability)
  return float(total)


def _hypergeometric(both: np.ndarray, a: int, b: int, n: int) -> np.ndarray:
  """P(both) for all its values, from the ratios of neighbours.

  Factorials of n would cancel to 10 digits at n = 60,502.
  """
  k = both[:-1]
  steps = np.log((a - k) * (b - k)) - np.log((k + 1) * (n - a - b + k + 1))
  log_weights = np.concatenate([[0.0], np.cumsum(steps)])
  weights = np.exp(log_weights - log_weights.max())
  return weights / weights.sum()


def _pairs(table: _Contingency) -> tuple[int, int, int, int]:
  """Counts pairs: (alike in both, in labels, in clusters, all), exactly."""

  def count(sizes):
    return sum(size * (size - 1) // 2 for size in sizes.tolist())

  n = table.num_points
  return (
    count(table.sizes),
    count(table.label_sizes),
    count(table.cluster_sizes),
    n * (n - 1) // 2,
  )


def adjusted_rand_index(labels: np.ndarray, clusters: np.ndarray) -> float:
  """ARI: the share of pairs treated alike, adjusted for chance, at most 1.

  (both - E) / ((in_labels + in_clusters) / 2 - E), E = in_labels * in_clusters
  / all (Hubert and Arabie, 1985).

  Args:
    labels: int [num_points].
    clusters: int [num_points].

  Returns:
    The score, a float; 1 for partitions that agree.

  Raises:
    ValueError: if the lengths differ or there is no point.
  """
  both, in_labels, in_clusters, every = _pairs(_contingency(labels, clusters))
  if both == in_labels == in_clusters:
    return 1.0
  # Whole numbers until the last division.
  expected = 2 * in_labels * in_clusters
  return (2 * every * both - expected) / (
    every * (in_labels + in_clusters) - expected
  )


def pairwise_f1(labels: np.ndarray, clusters: np.ndarray) -> float:
  """F1 of the pairs that share a cluster as guesses of those of one label.

  2 both / (in_labels + in_clusters), in [0, 1]; 1 if no pair shares anything.

  Args:
    labels: int [num_points].
    clusters: int [num_points].

  Returns:
    The score, a float.

  Raises:
    ValueError: if the lengths differ or there is no point.
  """
  both, in_labels, in_clusters, _ = _pairs(_contingency(labels, clusters))
  if in_labels + in_clusters == 0:
    return 1.0
  return 2 * both / (in_labels + in_clusters)


def purity(labels: np.ndarray, clusters: np.ndarray) -> float:
  """The share of points with the most frequent label of their cluster.

  Args:
    labels: int [num_points].
    clusters: int [num_points].

  Returns:
    The score, a float in (0, 1].

  Raises:
    ValueError: if the lengths differ or there is no point.
  """
  table = _contingency(labels, clusters)
  largest = np.zeros(len(table.cluster_sizes), np.int64)
  np.maximum.at(largest, table.columns, table.sizes)
  return int(largest.sum()) / table.num_points
