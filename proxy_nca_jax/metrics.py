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
  Manning et al., Introduction to Information Retrieval, chapter 16 (NMI)
"""

import numpy as np


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


def _within_r(ranks: np.ndarray, num_positives: np.ndarray) -> np.ndarray:
  return (ranks > 0) & (ranks <= num_positives[:, None])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  with np.errstate(invalid='ignore'):
    return np.divide(numerator, denominator, dtype=np.float64)


def normalized_mutual_information(
    labels: np.ndarray, clusters: np.ndarray
) -> float:
  """NMI = 2 I(labels; clusters) / (H(labels) + H(clusters)), in [0, 1].

  The arithmetic mean of the entropies, as the formula of Proxy-NCA and most
  later papers; two partitions of one part each agree: 1.

  Args:
    labels: int [num_points].
    clusters: int [num_points].

  Returns:
    The score, a float.

  Raises:
    ValueError: if the lengths differ or there is no point.
  """
  labels, clusters = np.asarray(labels), np.asarray(clusters)
  if labels.shape != clusters.shape or labels.ndim != 1 or not labels.size:
    raise ValueError(
      'labels and clusters must be two vectors of one length, at least 1; got '
      f'shapes {labels.shape} and {clusters.shape}.'
    )
  _, labels, label_sizes = _number(labels)
  _, clusters, cluster_sizes = _number(clusters)
  entropies = _entropy(label_sizes) + _entropy(cluster_sizes)
  if entropies == 0:
    return 1.0
  cells, _, cell_sizes = _number(
    labels.astype(np.int64) * len(cluster_sizes) + clusters
  )
  rows, columns = np.divmod(cells, len(cluster_sizes))
  expected = label_sizes[rows] * cluster_sizes[columns] / labels.size
  information = np.sum(
    cell_sizes / labels.size * np.log(cell_sizes / expected)
  )
  return float(np.clip(2 * information / entropies, 0, 1))


def _number(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the distinct values, each value's number, and float64 counts."""
  distinct, numbers, counts = np.unique(
    values, return_inverse=True, return_counts=True
  )
  return distinct, numbers, counts.astype(np.float64)


def _entropy(sizes: np.ndarray) -> float:
  shares = sizes / sizes.sum()
  return float(-np.sum(shares * np.log(shares)))
