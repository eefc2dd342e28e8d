"""Scores of a split: embed it, rank it, cluster it."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from proxy_nca_jax import clustering, metrics, retrieval


def embed(
    embed_fn: Callable[[dict[str, np.ndarray]], jax.Array],
    batches: Iterable[dict[str, np.ndarray]],
) -> np.ndarray:
  """Embeds all batches; rows whose mask is False are left out.

  Args:
    embed_fn: maps a batch to float [batch, dim].
    batches: with 'mask' bool [batch] and 'id' int32 [batch].

  Returns:
    float32 [num_records, dim], in the order of the ids.
  """
  rows, ids = [], []
  for batch in batches:
    rows.append(np.asarray(embed_fn(batch), np.float32)[batch['mask']])
    ids.append(batch['id'][batch['mask']])
  return np.concatenate(rows)[np.argsort(np.concatenate(ids))]


def evaluate(
    embeddings: np.ndarray,
    labels: np.ndarray,
    *,
    recall_at: tuple[int, ...],
    kmeans_iterations: int,
    seed: int,
) -> dict[str, float]:
  """Scores embeddings by retrieval among themselves and by clustering.

  Each item queries all others. Embeddings are projected to the unit sphere, so
  that Euclidean distance and cosine rank alike. NMI is of k-means with as many
  clusters as there are labels.

  Args:
    embeddings: float [num_items, dim].
    labels: int [num_items].
    recall_at: the K of Recall@K.
    kmeans_iterations: at most so many.
    seed: of k-means.

  Returns:
    'recall@K', 'map@r', 'r_precision', 'nmi', in [0, 1], and the counts
    'num_queries', 'queries_without_match' and 'num_classes'. Queries without
    match are in no mean.

  Raises:
    ValueError: if no query has a match, or an embedding is not finite.
  """
  if not np.all(np.isfinite(embeddings)):
    raise ValueError('Some embeddings are not finite: nothing can be ranked.')
  largest = np.max(np.abs(embeddings), axis=1, keepdims=True, initial=0)
  embeddings = embeddings / np.where(largest > 0, largest, 1)
  norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
  embeddings = jnp.asarray(embeddings / np.where(norms > 0, norms, 1))
  scores = {f'recall@{k}': [] for k in recall_at} | {
    'map@r': [], 'r_precision': []
  }
  for _, ranks in retrieval.positive_ranks(embeddings, labels):
    for k in recall_at:
      scores[f'recall@{k}'].append(metrics.recall_at_k(ranks, k))
    scores['map@r'].append(metrics.map_at_r(ranks))
    scores['r_precision'].append(metrics.r_precision(ranks))
  scores = {name: np.concatenate(parts) for name, parts in scores.items()}
  without_match = int(np.isnan(scores['map@r']).sum())
  if without_match == len(labels):
    raise ValueError(
      f'None of the {len(labels)} test items has another of its class: add '
      'pictures, so that a class has at least two.'
    )
  num_classes = len(np.unique(labels))
  clusters, _ = clustering.kmeans(
    embeddings,
    num_clusters=num_classes,
    key=jax.random.key(seed),
    max_iterations=kmeans_iterations,
  )
  return {
    **{name: _mean(values) for name, values in scores.items()},
    'nmi': metrics.normalized_mutual_information(labels, np.asarray(clusters)),
    'num_queries': len(labels) - without_match,
    'queries_without_match': without_match,
    'num_classes': num_classes,
  }


def _mean(values: np.ndarray) -> float:
  """The mean of what is not NaN; the exact sum does not depend on the order."""
  values = values[~np.isnan(values)]
  return math.fsum(values) / len(values)


def format_table(results: dict[str, dict[str, float]]) -> str:
  """Formats the scores of several embeddings as percent, a row each."""
  names = [
    name
    for name, value in next(iter(results.values())).items()
    if isinstance(value, float)
  ]
  rows = [['', *names]] + [
    [title.replace('_', ' '), *(f'{100 * scores[name]:.2f}' for name in names)]
    for title, scores in results.items()
  ]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join(
    '  '.join([row[0].ljust(widths[0])] + [
      cell.rjust(width) for cell, width in zip(row[1:], widths[1:])
    ])
    for row in rows
  )
