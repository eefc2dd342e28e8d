"""Metrics of retrieval and clustering, computed from ranks or assignments.

Retrieval: each row of `ranks: int [num_queries, max_positives]` holds the ranks
of a query's positives in its gallery, from 1, ascending, padded with 0. The
rank of a positive counts all negatives that are at least as near: ties count
against the query. Positives that tie with each other have consecutive ranks.
Functions return float64 [num_queries], the score of each query, or NaN if it
has no positive, so that `np.nanmean` ignores it.

Clustering: `labels` and `clusters` are int [num_points], of any values. Scores
are computed on the host in float64, from the nonzero cells of the contingency
table.

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
  """Returns 1 if any of the k nearest items is a positive, else 0.

  With a gallery, as in re-identification, its mean is the CMC at rank k.
  """
  first = ranks[:, 0]
  return np.where(first > 0, first <= k, np.nan)


def r_precision(ranks: np.ndarray) -> np.ndarray:
  """Returns the precision at R, the number of the query's positives."""
  num_positives = np.sum(ranks > 0, axis=1)
  num_hits = np.sum(_within_r(ranks, num_positives), axis=1)
  return _ratio(num_hits, num_positives)


def map_at_r(ranks: np.ndarray) -> np.ndarray:
  """Returns MAP@R = 1/R sum_{i<=R} [item i is a positive] precision@i."""
  num_positives = np.sum(ranks > 0, axis=1)
  order = np.arange(1, ranks.shape[1] + 1)
  precisions = order / np.maximum(ranks, 1)
  hits = _within_r(ranks, num_positives)
  return _ratio(np.sum(precisions * hits, axis=1), num_positives)


def average_precision(ranks: np.ndarray) -> np.ndarray:
  """Returns the mean over all positives of the precision at their ranks."""
  num_positives = np.sum(ranks > 0, axis=1)
  order = np.arange(1, ranks.shape[1] + 1)
  precisions = np.where(ranks > 0, order / np.maximum(ranks, 1), 0)
  return _ratio(np.sum(precisions, axis=1), num_positives)


def precision_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
  """Returns the fraction of positives among the k nearest items."""
  num_positives = np.sum(ranks > 0, axis=1)
  num_hits = np.sum((ranks > 0) & (ranks <= k), axis=1)
  return np.where(num_positives > 0, num_hits / k, np.nan)


def map_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
  """Returns mAP@k, the average precision of the k nearest items.

  With R positives it is 1 / min(R, k) sum_{i<=k} [item i is a positive]
  precision@i, which is 1 if the nearest items are all positives.
  """
  num_positives = np.sum(ranks > 0, axis=1)
  order = np.arange(1, ranks.shape[1] + 1)
  precisions = order / np.maximum(ranks, 1)
  hits = (ranks > 0) & (ranks <= k)
  return _ratio(np.sum(precisions * hits, axis=1), np.minimum(num_positives, k))


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
  """Returns 1 / the rank of the nearest positive."""
  first = ranks[:, 0]
  return np.where(first > 0, 1 / np.maximum(first, 1), np.nan)


def _within_r(ranks: np.ndarray, num_positives: np.ndarray) -> np.ndarray:
  return (ranks > 0) & (ranks <= num_positives[:, None])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  with np.errstate(invalid='ignore'):
    return np.divide(numerator, denominator, dtype=np.float64)


class _Contingency(NamedTuple):
  """The nonzero cells of the table of labels by clusters.

  Attributes:
    sizes: int64 [num_cells], number of points in each cell.
    rows, columns: int64 [num_cells], indices of the cell's label and cluster.
    label_sizes: int64 [num_labels], number of points with each label.
    cluster_sizes: int64 [num_clusters], number of points in each cluster.
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
      'labels and clusters must be nonempty vectors of the same length; got '
      f'shapes {labels.shape} and {clusters.shape}.'
    )
  _, labels, label_sizes = _unique(labels)
  _, clusters, cluster_sizes = _unique(clusters)
  num_clusters = len(cluster_sizes)
  cells, _, sizes = _unique(labels.astype(np.int64) * num_clusters + clusters)
  rows, columns = np.divmod(cells, num_clusters)
  return _Contingency(sizes, rows, columns, label_sizes, cluster_sizes)


def _unique(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the distinct values, each value's index in them, and counts."""
  return np.unique(values, return_inverse=True, return_counts=True)


def _entropy(sizes: np.ndarray) -> float:
  fractions = sizes / sizes.sum()
  return float(-np.sum(fractions * np.log(fractions)))


def _information(table: _Contingency) -> float:
  """Returns the mutual information I(labels; clusters) in nats."""
  expected = table.label_sizes[table.rows] * (
    table.cluster_sizes[table.columns] / table.num_points
  )
  fractions = table.sizes / table.num_points
  return float(np.sum(fractions * np.log(table.sizes / expected)))


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

  Proxy-NCA and most later papers use the arithmetic mean, ProxyNCA++ the
  geometric one. Two partitions with a single part each agree and score 1; a
  single part against several scores 0.

  Args:
    labels: int [num_points].
    clusters: int [num_points].
    average: the mean of the entropies: 'arithmetic', 'geometric', 'max' or
      'min'.

  Returns:
    The score, a float.

  Raises:
    ValueError: if the lengths differ or are 0, or the average is unknown.
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

  E[I] is the expectation over random partitions with the same sizes, so that
  these score 0 on average (Vinh et al., ICML 2009,
  https://doi.org/10.1145/1553374.1553511). If E[I] equals the mean entropy, as
  with the average 'min' and a cluster per point, the score is 0.

  Args:
    labels: int [num_points].
    clusters: int [num_points].
    average: as for `normalized_mutual_information`.

  Returns:
    The score, a float.

  Raises:
    ValueError: if the lengths differ or are 0, or the average is unknown.
  """
  table = _contingency(labels, clusters)
  mean = _mean_entropy(table, average)
  num_labels, num_clusters = len(table.label_sizes), len(table.cluster_sizes)
  # A single part, or a part per point: there is no other such partition.
  if num_labels == num_clusters and num_labels in (1, table.num_points):
    return 1.0
  expected = _expected_information(table)
  # Chance reaches the maximum: the denominator is 0 up to rounding.
  if abs(mean - expected) < 1e-12 * max(mean, 1):
    return 0.0
  return (_information(table) - expected) / (mean - expected)


def _expected_information(table: _Contingency) -> float:
  """Returns E[I] under the hypergeometric model.

  All pairs of a label and a cluster with the same sizes have the same term: the
  22,634 classes of Stanford Online Products have 11 distinct sizes.
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
  """Returns P(both) of all its values, from the ratios of successive ones.

  Log factorials of n would leave 10 correct digits at n = 60,502.
  """
  k = both[:-1]
  steps = np.log((a - k) * (b - k)) - np.log((k + 1) * (n - a - b + k + 1))
  log_weights = np.concatenate([[0.0], np.cumsum(steps)])
  weights = np.exp(log_weights - log_weights.max())
  return weights / weights.sum()


def _pairs(table: _Contingency) -> tuple[int, int, int, int]:
  """Counts pairs of points that share (both, a label, a cluster), and all."""

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
  """ARI: the agreement on pairs, adjusted for chance, at most 1.

  (both - E) / ((in_labels + in_clusters) / 2 - E), where in_labels, in_clusters
  and both count the pairs of points that share a label, a cluster, and both,
  and E = in_labels * in_clusters / all pairs (Hubert and Arabie, 1985).

  Args:
    labels: int [num_points].
    clusters: int [num_points].

  Returns:
    The score, a float; 1 for partitions that agree.

  Raises:
    ValueError: if the lengths differ or are 0.
  """
  both, in_labels, in_clusters, total = _pairs(_contingency(labels, clusters))
  if both == in_labels == in_clusters:
    return 1.0
  # Exact integers until the division.
  expected = 2 * in_labels * in_clusters
  return (2 * total * both - expected) / (
    total * (in_labels + in_clusters) - expected
  )


def pairwise_f1(labels: np.ndarray, clusters: np.ndarray) -> float:
  """F1 of the pairs that share a cluster as predictions of a shared label.

  2 both / (in_labels + in_clusters), in [0, 1], in the notation of
  `adjusted_rand_index`; 1 if no pair shares a label or a cluster.

  Args:
    labels: int [num_points].
    clusters: int [num_points].

  Returns:
    The score, a float.

  Raises:
    ValueError: if the lengths differ or are 0.
  """
  both, in_labels, in_clusters, _ = _pairs(_contingency(labels, clusters))
  if in_labels + in_clusters == 0:
    return 1.0
  return 2 * both / (in_labels + in_clusters)


def purity(labels: np.ndarray, clusters: np.ndarray) -> float:
  """The fraction of points with the most frequent label of their cluster.

  Args:
    labels: int [num_points].
    clusters: int [num_points].

  Returns:
    The score, a float in (0, 1].

  Raises:
    ValueError: if the lengths differ or are 0.
  """
  table = _contingency(labels, clusters)
  largest = np.zeros(len(table.cluster_sizes), np.int64)
  np.maximum.at(largest, table.columns, table.sizes)
  return int(largest.sum()) / table.num_points
