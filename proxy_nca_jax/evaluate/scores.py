"""Scores of a split: embed it, rank it, cluster it.

python -m proxy_nca_jax.evaluate --embeddings=x.npy --labels=y.npy

scores embeddings from anywhere; --help tells the rest.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from proxy_nca_jax import clustering, metrics, retrieval
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.runtime import signals


def score(
  embeddings: np.ndarray,
  labels: np.ndarray,
  *,
  is_query: np.ndarray | None = None,
  cameras: np.ndarray | None = None,
  recall_at: Sequence[int] = (1, 2, 4, 8),
  nearest_only: bool = False,
  kmeans_iterations: int = 20,
  kmeans_start: str = 'random',
  kmeans_num_starts: int = 1,
  seed: int = 0,
  num_resamples: int = 0,
  mesh: jax.sharding.Mesh | None = None,
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
    embeddings: float [num_items, dim]. One of zeros is as similar to any other
      as its opposite: 0.
    labels: int [num_items].
    is_query: bool [num_items]; the gallery is the rest.
    cameras: int [num_items].
    recall_at: the K of Recall@K.
    nearest_only: ranks the nearest positives alone, and gives no score that
      needs all.
    kmeans_iterations: at most so many; 0 is no clustering.
    kmeans_start: as `clustering.kmeans` has it.
    kmeans_num_starts: likewise.
    seed: of k-means and of the intervals.
    num_resamples: draws of as many classes with replacement, for intervals.
    mesh: the devices that share the work; by default one.

  Returns:
    'recall@K', 'map@r', 'r_precision', 'mrr', 'map', 'nmi', 'ami', 'ari', 'f1'
    and 'purity', or 'cmc@K', 'map' and 'mrr', in [0, 1] but for 'ami' and 'ari'
    which chance may bring below; the clusters are of k-means with as many as
    there are labels. And the counts 'num_queries', 'queries_without_match',
    'num_classes' and 'zero_embeddings'. Queries without match, such as those
    alone in their class, are in no mean. With `num_resamples`, 'intervals' maps
    each score of retrieval to the bounds of its central 95% over the draws.
    Where classes differ in size, 'recall@1_head', 'recall@1_middle' and
    'recall@1_tail' are of the queries of the largest, middle and smallest
    thirds of the classes, by the items of each that are searched.

  Raises:
    ValueError: if lengths differ, a number cannot be, there is no query or none
      with a match, or an embedding is not finite.
  """
  if not recall_at or min(recall_at) < 1 or num_resamples < 0:
    raise ValueError(
      f'recall_at ({recall_at}) must hold numbers of at least 1, and '
      f'num_resamples ({num_resamples}) must not be negative.'
    )
  labels = np.asarray(labels)
  _check_lengths(embeddings, labels, is_query=is_query, cameras=cameras)
  embeddings, num_zeros = _project_to_sphere(embeddings)
  signals.check()
  if mesh is not None and mesh.size == 1:
    mesh = None
  over = {'mesh': mesh, 'axis_name': mesh_lib.AXIS}
  of_queries, query_labels = _score_queries(
    embeddings,
    labels,
    is_query,
    cameras,
    _score_fns(recall_at, cameras is not None, nearest_only),
    nearest_only=nearest_only,
    **over,
  )
  has_match = ~np.isnan(next(iter(of_queries.values())))
  if not has_match.any():
    raise ValueError(
      f'None of the {len(has_match)} queries has another item of its class '
      'to find: add pictures, so that a class has at least two.'
    )
  of_queries = {name: each[has_match] for name, each in of_queries.items()}
  # The exact sum does not depend on the order.
  scores = {
    name: math.fsum(each) / len(each) for name, each in of_queries.items()
  }
  if cameras is None:
    searched = labels if is_query is None else labels[~is_query]
    scores |= _by_frequency(
      of_queries['mrr'] == 1, query_labels[has_match], searched
    )
  num_classes = len(np.unique(labels))
  if cameras is None and kmeans_iterations:
    scores |= _score_clusters(
      embeddings,
      labels,
      num_clusters=num_classes,
      key=jax.random.key(seed),
      init=kmeans_start,
      n_init=kmeans_num_starts,
      max_iterations=kmeans_iterations,
      **over,
    )
  scores |= {
    'num_queries': int(has_match.sum()),
    'queries_without_match': int((~has_match).sum()),
    'num_classes': num_classes,
    'zero_embeddings': num_zeros,
  }
  if num_resamples:
    scores['intervals'] = _intervals(
      of_queries, query_labels[has_match], num_resamples, seed
    )
  return scores


def _check_lengths(embeddings, labels, **others) -> None:
  if np.ndim(embeddings) != 2 or not np.size(embeddings):
    raise ValueError(
      'Embeddings must be a matrix of at least one row and one column; got '
      f'shape {np.shape(embeddings)}.'
    )
  for name, values in {'labels': labels, **others}.items():
    if values is not None and np.shape(values) != (len(embeddings),):
      raise ValueError(
        f'There are {len(embeddings)} embeddings, so {name} must have shape '
        f'({len(embeddings)},); got {np.shape(values)}.'
      )


def _project_to_sphere(embeddings: np.ndarray) -> tuple[jax.Array, int]:
  """Gives each row unit norm, whatever its scale; counts the rows of 0."""
  unit = np.empty(np.shape(embeddings), np.float32)
  num_zeros = 0
  for begin in range(0, len(unit), _CHUNK):
    rows = np.asarray(embeddings[begin : begin + _CHUNK], np.float64)
    if not np.all(np.isfinite(rows)):
      raise ValueError('Some embeddings are not finite: nothing can be ranked.')
    largest = np.max(np.abs(rows), axis=1, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit[begin : begin + _CHUNK] = rows / np.where(norms > 0, norms, 1)
    num_zeros += int(np.sum(largest == 0))
  return jnp.asarray(unit), num_zeros


# Rows in float64 at once.
_CHUNK = 4096


def _score_fns(
  recall_at: Sequence[int], is_reidentification: bool, nearest_only: bool
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """The scores of a protocol, each a function of ranks."""
  title = 'cmc' if is_reidentification else 'recall'
  fns = {
    f'{title}@{k}': functools.partial(metrics.recall_at_k, k=k)
    for k in recall_at
  }
  if not nearest_only and not is_reidentification:
    fns |= {'map@r': metrics.map_at_r, 'r_precision': metrics.r_precision}
  fns['mrr'] = metrics.reciprocal_rank
  if not nearest_only:
    fns['map'] = metrics.average_precision
  return fns


def _score_queries(
  embeddings, labels, is_query, cameras, score_fns, **kwargs
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Returns float64 [num_queries] of each score, and the queries' labels."""
  if is_query is None:
    queries, gallery = np.arange(len(labels)), None
    cameras = None if cameras is None else (cameras, cameras)
  else:
    queries, items = np.flatnonzero(is_query), np.flatnonzero(~is_query)
    if not len(queries) or not len(items):
      raise ValueError(
        f'There are {len(queries)} queries and {len(items)} items to search: '
        'nothing can be scored.'
      )
    gallery = (embeddings[items], labels[items])
    cameras = None if cameras is None else (cameras[queries], cameras[items])
    embeddings, labels = embeddings[queries], labels[queries]
  parts = {name: [] for name in score_fns}
  order = []
  with tqdm.tqdm(
    total=1,
    desc='ranking',
    disable=None,
    leave=False,
    delay=1,
    bar_format='{l_bar}{bar}| {elapsed}<{remaining}',
  ) as bar:
    for rows, ranks in retrieval.positive_ranks(
      embeddings,
      labels,
      gallery=gallery,
      cameras=cameras,
      progress=bar.update,
      **kwargs,
    ):
      order.append(rows)
      for name, score_fn in score_fns.items():
        parts[name].append(score_fn(ranks))
  scores = {name: np.concatenate(values) for name, values in parts.items()}
  return scores, labels[np.concatenate(order)]


def _by_frequency(
  is_hit: np.ndarray, labels: np.ndarray, searched: np.ndarray
) -> dict[str, float]:
  """Recall@1 of the largest, middle and smallest thirds of the classes.

  Classes of equal size are of one part, the smaller; a part without a query is
  left out, and all are where sizes do not differ.

  Args:
    is_hit: bool [num_queries].
    labels: int [num_queries].
    searched: int [num_items], the labels of what is searched.
  """
  classes, sizes = np.unique(searched, return_counts=True)
  if sizes.min() == sizes.max():
    return {}
  low, high = np.quantile(sizes, (1 / 3, 2 / 3), method='lower')
  sizes = sizes[np.searchsorted(classes, labels)]
  parts = {
    'head': sizes > high,
    'middle': (sizes > low) & (sizes <= high),
    'tail': sizes <= low,
  }
  return {
    f'recall@1_{name}': float(np.mean(is_hit[part]))
    for name, part in parts.items()
    if part.any()
  }


def _score_clusters(
  embeddings, labels, *, n_init: int, max_iterations: int, **settings
) -> dict[str, float]:
  """Compares the clusters of `clustering.kmeans` with the labels."""
  with tqdm.tqdm(
    total=n_init * max_iterations,
    desc='clustering',
    unit='update',
    disable=None,
    leave=False,
    delay=1,
  ) as bar:

    def progress(num_updates):
      signals.check()
      bar.update(num_updates)

    clusters = clustering.kmeans(
      embeddings,
      n_init=n_init,
      max_iterations=max_iterations,
      progress=progress,
      **settings,
    )
  clusters = np.asarray(clusters.assignments)
  return {
    'nmi': metrics.normalized_mutual_information(labels, clusters),
    'ami': metrics.adjusted_mutual_information(labels, clusters),
    'ari': metrics.adjusted_rand_index(labels, clusters),
    'f1': metrics.pairwise_f1(labels, clusters),
    'purity': metrics.purity(labels, clusters),
  }


def _intervals(
  scores: Mapping[str, np.ndarray],
  labels: np.ndarray,
  num_resamples: int,
  seed: int,
) -> dict[str, tuple[float, float]]:
  """The central 95% of each mean over draws of classes with replacement.

  Queries of a class are alike, so classes are drawn, with all their queries;
  the gallery stays (Efron and Tibshirani, An Introduction to the Bootstrap,
  1993, chapter 13).
  """
  _, classes = np.unique(labels, return_inverse=True)
  sizes = np.bincount(classes)
  sums = np.stack(
    [np.bincount(classes, weights=each) for each in scores.values()], axis=1
  )
  rng = np.random.default_rng(seed)
  means = np.empty((num_resamples, len(scores)))
  for mean in means:
    draws = np.bincount(
      rng.integers(len(sizes), size=len(sizes)), minlength=len(sizes)
    )
    mean[:] = draws @ sums / (draws @ sizes)
  bounds = np.quantile(means, (0.025, 0.975), axis=0).T.tolist()
  return {name: tuple(pair) for name, pair in zip(scores, bounds)}


def format_table(results: Mapping[str, Mapping]) -> str:
  """Formats scores as percent: a row each, a column for each embeddings.

  Where there are intervals, their bounds follow the score.
  """

  def cell(scores, name):
    low, high = scores.get('intervals', {}).get(name, (None, None))
    bounds = '' if low is None else f' [{100 * low:.2f}, {100 * high:.2f}]'
    value = scores.get(name)
    return '' if value is None else f'{100 * value:.2f}{bounds}'

  names = [
    name
    for name, value in next(iter(results.values())).items()
    if isinstance(value, float)
  ]
  rows = [['', *(title.replace('_', ' ') for title in results)]] + [
    [name, *(cell(scores, name) for scores in results.values())]
    for name in names
  ]
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join(
    '  '.join(
      [name.ljust(widths[0])]
      + [text.rjust(width) for text, width in zip(cells, widths[1:])]
    )
    for name, *cells in rows
  )
