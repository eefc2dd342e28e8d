"""Scores of a split: embed it, rank it, cluster it."""

import functools
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
    is_query: np.ndarray | None = None,
    cameras: np.ndarray | None = None,
) -> dict[str, float]:
  """Scores embeddings by retrieval and by clustering.

  Embeddings are projected to the unit sphere, so that Euclidean distance and
  cosine rank alike. There are three protocols:

  * Each item queries all others, by default: CUB, Cars, SOP.
  * Queries search a gallery, with `is_query`: In-Shop.
  * Re-identification, with `cameras` besides: pictures of the query's class and
    camera are left out of its gallery. Its scores are CMC@K, which is Recall@K,
    and mAP; nothing is clustered, for one class stands for everyone else:
    Market-1501.

  Args:
    embeddings: float [num_items, dim].
    labels: int [num_items].
    recall_at: the K of Recall@K.
    kmeans_iterations: at most so many.
    seed: of k-means.
    is_query: bool [num_items]; the gallery is the rest.
    cameras: int [num_items].

  Returns:
    'recall@K', 'map@r', 'r_precision' and 'nmi', or 'cmc@K' and 'map', in
    [0, 1]; NMI is of k-means with as many clusters as there are labels. And the
    counts 'num_queries', 'queries_without_match' and 'num_classes'. Queries
    without match are in no mean.

  Raises:
    ValueError: if no query has a match, or an embedding is not finite.
  """
  embeddings = _project_to_sphere(embeddings)
  labels = np.asarray(labels)
  if is_query is None:
    queries, gallery = slice(None), None
    cameras = None if cameras is None else (cameras, cameras)
  else:
    queries, items = np.flatnonzero(is_query), np.flatnonzero(~is_query)
    gallery = (embeddings[items], labels[items])
    cameras = None if cameras is None else (cameras[queries], cameras[items])
  if not len(labels[queries]):
    raise ValueError('There is no query: nothing can be scored.')
  score_fns = _score_fns(recall_at, is_reidentification=cameras is not None)
  scores = {name: [] for name in score_fns}
  for _, ranks in retrieval.positive_ranks(
    embeddings[queries], labels[queries], gallery=gallery, cameras=cameras
  ):
    for name, score_fn in score_fns.items():
      scores[name].append(score_fn(ranks))
  scores = {name: np.concatenate(parts) for name, parts in scores.items()}
  every_query = next(iter(scores.values()))
  without_match = int(np.isnan(every_query).sum())
  if without_match == len(every_query):
    raise ValueError(
      f'None of the {len(every_query)} queries has another item of its class '
      'to find: add pictures, so that a class has at least two.'
    )
  num_classes = len(np.unique(labels))
  scores = {name: _mean(values) for name, values in scores.items()}
  if cameras is None:
    clusters, _ = clustering.kmeans(
      embeddings,
      num_clusters=num_classes,
      key=jax.random.key(seed),
      max_iterations=kmeans_iterations,
    )
    scores['nmi'] = metrics.normalized_mutual_information(
      labels, np.asarray(clusters)
    )
  return scores | {
    'num_queries': len(every_query) - without_match,
    'queries_without_match': without_match,
    'num_classes': num_classes,
  }


def _project_to_sphere(embeddings: np.ndarray) -> jax.Array:
  """Gives each row unit norm, whatever its scale; rows of 0 stay 0."""
  if not np.all(np.isfinite(embeddings)):
    raise ValueError('Some embeddings are not finite: nothing can be ranked.')
  largest = np.max(np.abs(embeddings), axis=1, keepdims=True, initial=0)
  embeddings = embeddings / np.where(largest > 0, largest, 1)
  norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
  return jnp.asarray(embeddings / np.where(norms > 0, norms, 1))


def _score_fns(
    recall_at: tuple[int, ...], *, is_reidentification: bool
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """The scores of a protocol, each a function of ranks."""
  title = 'cmc' if is_reidentification else 'recall'
  first = {
    f'{title}@{k}': functools.partial(metrics.recall_at_k, k=k)
    for k in recall_at
  }
  if is_reidentification:
    return first | {'map': metrics.average_precision}
  return first | {
    'map@r': metrics.map_at_r, 'r_precision': metrics.r_precision
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
