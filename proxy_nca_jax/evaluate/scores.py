"""Scores of embeddings: retrieval, clustering, and confidence intervals."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from proxy_nca_jax import clustering, masks, metrics, retrieval
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.runtime import signals

# Arguments of `score` that are fields of `config.evaluation` and flags.
SETTINGS = (
  'recall_at',
  'precision_at',
  'nearest_only',
  'kmeans_iterations',
  'kmeans_start',
  'kmeans_num_starts',
)


def score(
  embeddings: np.ndarray,
  labels: np.ndarray,
  *,
  is_query: np.ndarray | None = None,
  cameras: np.ndarray | None = None,
  recall_at: Sequence[int] = (1, 2, 4, 8),
  precision_at: Sequence[int] = (),
  nearest_only: bool = False,
  kmeans_iterations: int = 20,
  kmeans_start: str = 'random',
  kmeans_num_starts: int = 1,
  seed: int = 0,
  num_resamples: int = 0,
  per_class: bool = False,
  mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
  """Scores embeddings by retrieval and by clustering.

  Embeddings are projected to the unit sphere, where Euclidean distance and
  cosine similarity rank alike. There are three protocols:

  * By default each item queries all others: CUB, Cars, SOP.
  * With `is_query`, queries search a gallery: In-Shop.
  * Re-identification, with `cameras` as well: gallery items with the query's
    label and camera are ignored. The scores are CMC@K, which equals Recall@K,
    and mAP. Nothing is clustered, because one label stands for all distractors:
    Market-1501.

  Args:
    embeddings: float [num_items, dim]. A row of zeros has similarity 0 to every
      other.
    labels: int or text [num_items].
    is_query: bool [num_items], or integers 0 and 1; the others are the gallery.
    cameras: int [num_items], camera ids.
    recall_at: the K of Recall@K.
    precision_at: the K of Precision@K and mAP@K.
    nearest_only: computes only Recall@K and MRR, which is faster.
    kmeans_iterations: most Lloyd iterations of k-means; 0 skips clustering.
    kmeans_start: initialization of k-means, 'random' or 'k-means++'.
    kmeans_num_starts: runs of k-means; the one of least inertia is scored.
    seed: seed of k-means and of the bootstrap.
    num_resamples: bootstrap resamples of the classes, for confidence intervals;
      0 skips them.
    per_class: whether to return the scores of each class as well.
    mesh: the devices that share the work; by default one.

  Returns:
    Scores, as floats: 'recall@K', 'map@r', 'r_precision', 'mrr', 'map', 'nmi',
    'ami', 'ari', 'f1' and 'purity', or for re-identification 'cmc@K', 'map' and
    'mrr'. They are fractions in [0, 1], except that 'ami' and 'ari' can be
    negative. k-means has as many clusters as there are labels.

    Where classes differ in size, 'recall@1_head', 'recall@1_middle' and
    'recall@1_tail': Recall@1 of queries of the largest, middle and smallest
    third of the classes, by gallery items per class.

    Counts, as ints: 'num_queries', 'queries_without_match', 'num_classes' and
    'zero_embeddings'. Queries without a match, such as the only item of a
    class, are left out of every mean.

    With `per_class`, 'per_class': {label, as a text: its number of queries and
    the means of their scores}.

    With `num_resamples`, 'intervals': the bounds of the central 95% of each
    retrieval score over the resamples.

  Raises:
    ValueError: if shapes or types do not fit, an argument is out of range, an
      embedding is not finite, or no query has a match.
  """
  if (
    not recall_at or min(*recall_at, *precision_at, 1) < 1 or num_resamples < 0
  ):
    raise ValueError(
      f'recall_at ({recall_at}) and precision_at ({precision_at}) must hold '
      f'integers of at least 1, and num_resamples ({num_resamples}) must not '
      'be negative.'
    )
  if precision_at and nearest_only:
    raise ValueError(
      'precision_at needs the ranks of all positives, which nearest_only does '
      'not compute.'
    )
  names = np.unique(np.asarray(labels)).tolist() if per_class else ()
  embeddings, labels, num_zeros = prepare(
    embeddings, labels, is_query=is_query, cameras=cameras
  )
  if is_query is not None:
    is_query = np.asarray(masks.as_mask(is_query, name='is_query'))
  if cameras is not None:
    cameras = encode_labels(cameras, name='Cameras')
  signals.check_on_all()
  if mesh is not None and mesh.size == 1:
    mesh = None
  over = {'mesh': mesh, 'axis_name': mesh_lib.AXIS}
  per_query, query_labels = _score_queries(
    embeddings,
    labels,
    is_query,
    cameras,
    _score_fns(recall_at, precision_at, cameras is not None, nearest_only),
    nearest_only=nearest_only,
    **over,
  )
  has_match = ~np.isnan(next(iter(per_query.values())))
  if not has_match.any():
    raise ValueError(
      f'None of the {len(has_match)} queries has another item of its class '
      'to find: add items, so that a class has at least two.'
    )
  per_query = {name: each[has_match] for name, each in per_query.items()}
  # fsum is exact: the result does not depend on the order of the queries.
  scores = {
    name: math.fsum(each) / len(each) for name, each in per_query.items()
  }
  if cameras is None:
    searched = labels if is_query is None else labels[~is_query]
    scores |= _by_frequency(
      per_query['mrr'] == 1, query_labels[has_match], searched
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
  if per_class:
    scores['per_class'] = _by_class(per_query, query_labels[has_match], names)
  if num_resamples:
    scores['intervals'] = _intervals(
      per_query, query_labels[has_match], num_resamples, seed
    )
  return scores


def prepare(
  embeddings: np.ndarray, labels: np.ndarray, **others: np.ndarray | None
) -> tuple[jax.Array, np.ndarray, int]:
  """Checks embeddings and labels, and projects embeddings to the unit sphere.

  Args:
    embeddings: float [num_items, dim].
    labels: int or text [num_items].
    **others: further values [num_items], of which the shape is checked.

  Returns:
    float32 [num_items, dim]; int64 [num_items], the labels numbered from 0; and
    the number of embeddings of 0.

  Raises:
    ValueError: if shapes or types do not fit, or an embedding is not finite.
  """
  labels = encode_labels(labels)
  _check_shapes(embeddings, labels, **others)
  unit, num_zeros = _project_to_sphere(embeddings)
  return unit, labels, num_zeros


def encode_labels(labels: np.ndarray, *, name: str = 'Labels') -> np.ndarray:
  """Numbers the distinct labels from 0, in ascending order.

  Args:
    labels: integers or texts [...]; floats if they hold integers exactly.
    name: what the labels are, for messages.

  Returns:
    int64 [...].

  Raises:
    ValueError: if labels are of another type, NaN, or floats so large that they
      may have merged different integers.
  """
  labels = np.asarray(labels)
  if labels.dtype.kind not in 'biuUSfO':
    raise ValueError(f'{name} must be integers or texts; got {labels.dtype}.')
  if labels.dtype.kind == 'f' and not np.all(np.abs(labels) < 2**53):
    raise ValueError(
      f'{name} are {labels.dtype} and some are not finite or not below 2^53, '
      'where floats merge different integers: give integers of one type.'
    )
  return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


def _check_shapes(embeddings, labels, **others) -> None:
  if np.ndim(embeddings) != 2 or not np.size(embeddings):
    raise ValueError(
      'Embeddings must be a matrix of at least one row and one column; got '
      f'shape {np.shape(embeddings)}.'
    )
  if not hasattr(embeddings, 'dtype'):
    embeddings = np.asarray(embeddings)
  dtype = embeddings.dtype
  if jnp.issubdtype(dtype, jnp.complexfloating):
    raise ValueError('Embeddings must be real numbers; got complex ones.')
  # bfloat16 is a number to JAX, but not to NumPy.
  if dtype.kind != 'b' and not jnp.issubdtype(dtype, jnp.number):
    raise ValueError(f'Embeddings must be real numbers; got {dtype}.')
  for name, values in {'labels': labels, **others}.items():
    if values is not None and np.shape(values) != (len(embeddings),):
      raise ValueError(
        f'There are {len(embeddings)} embeddings, so {name} must have shape '
        f'({len(embeddings)},); got {np.shape(values)}.'
      )


# Rows in float64 at a time.
_CHUNK = 4096


def _project_to_sphere(embeddings: np.ndarray) -> tuple[jax.Array, int]:
  """Scales each row to unit norm; returns the number of rows of 0 as well."""
  unit = np.empty(np.shape(embeddings), np.float32)
  num_zeros = 0
  for begin in range(0, len(unit), _CHUNK):
    rows = np.asarray(embeddings[begin : begin + _CHUNK], np.float64)
    if not np.all(np.isfinite(rows)):
      raise ValueError('Some embeddings are not finite and cannot be ranked.')
    # Dividing by the largest entry first avoids overflow of the squares.
    largest = np.max(np.abs(rows), axis=1, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit[begin : begin + _CHUNK] = rows / np.where(norms > 0, norms, 1)
    num_zeros += int(np.sum(largest == 0))
  return jnp.asarray(unit), num_zeros


def _score_fns(
  recall_at: Sequence[int],
  precision_at: Sequence[int],
  is_reidentification: bool,
  nearest_only: bool,
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """Returns the scores of a protocol, each a function of ranks."""
  title = 'cmc' if is_reidentification else 'recall'
  fns = {
    f'{title}@{k}': functools.partial(metrics.recall_at_k, k=k)
    for k in recall_at
  }
  for k in precision_at:
    fns[f'precision@{k}'] = functools.partial(metrics.precision_at_k, k=k)
    fns[f'map@{k}'] = functools.partial(metrics.map_at_k, k=k)
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
        f'There are {len(queries)} queries and {len(items)} gallery items: '
        'scores need at least one of each.'
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


def _by_class(
  per_query: Mapping[str, np.ndarray],
  labels: np.ndarray,
  names: Sequence[str | int],
) -> dict[str, dict[str, float]]:
  """Returns the number of queries and the mean of each score, by class."""
  classes, indices, sizes = np.unique(
    labels, return_inverse=True, return_counts=True
  )
  means = {
    name: np.bincount(indices, each) / sizes for name, each in per_query.items()
  }
  return {
    str(names[label]): {
      'num_queries': int(size),
      **{name: float(each[row]) for name, each in means.items()},
    }
    for row, (label, size) in enumerate(zip(classes, sizes))
  }


def _by_frequency(
  is_hit: np.ndarray, labels: np.ndarray, searched: np.ndarray
) -> dict[str, float]:
  """Returns Recall@1 of the largest, middle and smallest third of the classes.

  Classes of equal size are in the same part, the smaller one, so parts can
  differ in size. A part without a query has no score, and none has one if all
  classes have one size.

  Args:
    is_hit: bool [num_queries], whether the nearest item is a positive.
    labels: int [num_queries].
    searched: int [num_items], labels of the gallery.
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
  """Scores the clusters of k-means against the labels."""
  with tqdm.tqdm(
    total=n_init * max_iterations,
    desc='clustering',
    unit='update',
    disable=None,
    leave=False,
    delay=1,
  ) as bar:

    def progress(num_updates):
      signals.check_on_all()
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
  """Returns the central 95% of each mean under a bootstrap over classes.

  Queries of a class are correlated, so whole classes are resampled; the gallery
  stays (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
  13).
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


def score_names(scores: Mapping[str, object]) -> list[str]:
  """Returns the names of the scores in a result, which also holds counts."""
  return [name for name, value in scores.items() if isinstance(value, float)]


def format_table(results: Mapping[str, Mapping]) -> str:
  """Formats scores in percent: a row per score, a column per result.

  The bounds of a confidence interval follow its score.
  """

  def cell(scores, name):
    low, high = scores.get('intervals', {}).get(name, (None, None))
    bounds = '' if low is None else f' [{100 * low:.2f}, {100 * high:.2f}]'
    value = scores.get(name)
    return '' if value is None else f'{100 * value:.2f}{bounds}'

  names = score_names(next(iter(results.values())))
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
