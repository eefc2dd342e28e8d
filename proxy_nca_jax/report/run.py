"""The report of a run: one self-contained HTML page."""

import collections
import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from proxy_nca_jax import datasets, distances, retrieval
from proxy_nca_jax.evaluate import scores as scores_lib
from proxy_nca_jax.report import charts, literature, pages
from proxy_nca_jax.report import results as results_lib
from proxy_nca_jax.runtime import files

# How many items of each kind the report shows.
_NUM_QUERIES, _NUM_NEIGHBORS, _NUM_PROXIES = 6, 8, 6
_NUM_CONFUSIONS, _NUM_CLASSES_ON_MAP, _NUM_POINTS = 30, 40, 800
_NUM_PAIRS = 20_000
# Extra neighbors to search for where those of the query's class and camera,
# which the protocol ignores, are dropped.
_NUM_EXTRA_NEIGHBORS = 32


class Embedded(NamedTuple):
  """A split, or a subset of one, with its embeddings.

  Attributes:
    split: a split of the dataset.
    embeddings: float32 [len(split), dim].
  """

  split: datasets.Split
  embeddings: np.ndarray

  def image(self, index: int) -> Image.Image | None:
    """Returns an image; None if the split is one of vectors."""
    if self.split.vectors is not None:
      return None
    return Image.fromarray(self.split.image(index))

  def name(self, index: int) -> str:
    return self.split.class_names[self.split.labels[index]]


class _Neighbors(NamedTuple):
  """The nearest neighbors of each query.

  Attributes:
    queries: int [num_queries], indices into the split.
    items: int [num_queries, k], indices into the split, nearest first.
    distances: float32 [num_queries, k], Euclidean, on the unit sphere.
    is_correct: bool [num_queries, k], whether they have the query's label.
  """

  queries: np.ndarray
  items: np.ndarray
  distances: np.ndarray
  is_correct: np.ndarray


def write(
  path: str,
  *,
  results: Mapping[str, Any],
  config: Mapping[str, Any],
  overrides: Mapping[str, Any],
  facts: Mapping[str, str],
  rows: Sequence[Mapping[str, float]],
  test: Embedded,
  train: Embedded,
  proxies: np.ndarray | None,
) -> None:
  """Writes the report of a run.

  Args:
    path: the HTML file to write.
    results: the content of results.json.
    config: the config of the run, as nested dicts of JSON.
    overrides: {'group.field': value} of its differences from the defaults.
    facts: further facts to list, such as {'wall time': '0:10:00'}.
    rows: the rows of metrics.jsonl.
    test: the evaluated split.
    train: a sample of the train split, for the images nearest to proxies.
    proxies: float [num_train_classes, ..., dim]; None if the loss has no
      proxies of classes.
  """
  rng = np.random.default_rng(0)
  neighbors = _find_neighbors(test)
  sections = [
    ('Scores', _scores(results, config)),
    ('Training', _curves(rows)),
    ('Queries and their nearest neighbors', _queries(test, neighbors)),
    ('The embedding space', _map(test, rng)),
    ('Distances', _histograms(test, rng)),
    ('Most confused classes', _confusions(test, neighbors)),
  ]
  if results.get('verification'):
    sections.append(('Verification', _verification(results['verification'])))
  if proxies is not None:
    nearest = _proxies(train, proxies, rng)
    title = f'Proxies and their nearest {train.split.noun}'
    sections.append((title, nearest))
  sections.append(('The run', _about(results, config, overrides, facts)))
  if warning := results_lib.better_baselines(results):
    text = f'<p>{html.escape(warning)}</p>'
    sections.insert(0, ('Training did not pay', text))
  name = f'{config["dataset"]["name"]}, {config["loss"]["name"]}'
  with files.write_atomically(path) as file:
    file.write(pages.page(f'Report: {name}', sections))


def _unit(rows: np.ndarray) -> np.ndarray:
  return np.asarray(distances.unit_norm(np.asarray(rows, np.float32)))


def _find_neighbors(test: Embedded) -> _Neighbors:
  """Finds the nearest items by the scores' protocol, without the query."""
  split, embeddings = test.split, _unit(test.embeddings)
  queries = gallery = np.arange(len(embeddings))
  k = min(_NUM_NEIGHBORS, len(embeddings) - 1)
  if split.is_query is None:
    _, indices = retrieval.nearest(embeddings, k)
  else:
    queries, gallery = (
      np.flatnonzero(rows) for rows in (split.is_query, ~split.is_query)
    )
    extra = 0 if split.cameras is None else _NUM_EXTRA_NEIGHBORS
    k = min(k + extra, len(gallery))
    _, indices = retrieval.nearest(
      embeddings[queries], k, gallery=embeddings[gallery]
    )
  items = gallery[np.asarray(indices)]
  if split.cameras is not None:
    is_ignored = (split.labels[items] == split.labels[queries][:, None]) & (
      split.cameras[items] == split.cameras[queries][:, None]
    )
    order = np.argsort(is_ignored, axis=1, kind='stable')[:, :_NUM_NEIGHBORS]
    items = np.take_along_axis(items, order, axis=1)
  return _Neighbors(
    queries,
    items,
    retrieval.neighbor_distances(embeddings[queries], embeddings, items),
    split.labels[items] == split.labels[queries][:, None],
  )


def _scores(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  """Returns a table of the run's scores, followed by published ones."""
  name = config['model']['name']
  network = f'{name}, {config["model"]["embedding_dim"]}'
  networks = {'pretrained': f'{name}, without a head'}
  networks |= {'raw_pixels': '', 'as_given': ''}
  titles = [title for title in results_lib.COLUMNS if title in results]
  names = scores_lib.score_names(results['trained'])
  ours = [
    [
      f'this run, {title.replace("_", " ")}',
      networks.get(title, network),
      *map(results[title].get, names),
      'measured here',
    ]
    for title in titles
  ]
  theirs = [
    [row.name, row.network, *map(row.scores.get, names), row.source]
    for row in literature.PUBLISHED.get(config['dataset']['name'], ())
  ]
  header = ['method', 'network', *names, 'source']
  note = 'In percent, on classes not seen in training'
  if num_shared := results['dataset'].get('shared_classes', 0):
    note = f'In percent, on test classes, of which training saw {num_shared}'
  if 'seen_classes' in results:
    note += ', except for seen classes'
  note += '.'
  if theirs:
    note += (
      ' Published results come from other code; some are the best of several '
      'evaluations on the test classes.'
    )
  return f'<p>{note}</p>' + pages.table(header, ours + theirs)


def _curves(rows: Sequence[Mapping[str, float]]) -> str:
  series = {}
  losses = [(row['step'], row['loss']) for row in rows if 'loss' in row]
  if losses:
    series['loss'] = {'loss': tuple(zip(*losses))}
  # The classes that were evaluated during training.
  is_validated = any(
    name.startswith('validation.') for row in rows for name in row
  )
  scored = ('validation',) if is_validated else ('untrained', 'test')
  scores = collections.defaultdict(list)
  for row in rows:
    for name, value in row.items():
      title, _, score = name.partition('.')
      if title in scored and re.fullmatch(r'(recall|cmc)@\d+|nmi', score):
        scores[score].append((row['step'], 100 * value))
  if scores:
    series[f'percent on {scored[-1]} classes'] = {
      name: tuple(zip(*values)) for name, values in scores.items()
    }
  return (
    '<div class="charts">'
    + ''.join(
      charts.lines(
        each, title=f'{label} against steps', x_label='steps', y_label=label
      )
      for label, each in series.items()
    )
    + '</div>'
  )


def _queries(test: Embedded, neighbors: _Neighbors) -> str:
  """Returns the best, typical and worst queries, of distinct classes."""
  # By precision; of equal ones, near correct neighbors first, near wrong ones
  # last.
  precision = neighbors.is_correct.mean(axis=1)
  distance = neighbors.distances.mean(axis=1)
  order = np.lexsort(
    [np.where(precision > 0.5, distance, -distance), -precision]
  )
  middle = np.argsort(np.abs(np.arange(len(order)) - len(order) // 2))
  kinds = {'Best': order, 'Typical': order[middle], 'Worst': order[::-1]}
  parts, seen = [], set()
  for title, candidates in kinds.items():
    parts.append(f'<h3>{title}</h3>')
    num_shown = 0
    for row in candidates:
      label = test.split.labels[neighbors.queries[row]]
      if label in seen:
        continue
      seen.add(label)
      parts.append(_query(test, neighbors, row))
      num_shown += 1
      if num_shown == _NUM_QUERIES // 2:
        break
  return ''.join(parts)


def _query(test: Embedded, neighbors: _Neighbors, row: int) -> str:
  query = neighbors.queries[row]
  cards = [_card(test, query, f'query: {test.name(query)}')]
  for item, distance, is_correct in zip(
    neighbors.items[row], neighbors.distances[row], neighbors.is_correct[row]
  ):
    caption = f'{test.name(item)} ({distance:.2f})'
    cards.append(_card(test, item, caption, bool(is_correct)))
  return pages.row(cards)


def _card(embedded, index, caption, is_correct=None) -> pages.Card:
  image = embedded.image(index)
  source = pages.thumbnail(image) if image else ''
  return pages.Card(source, caption, is_correct)


def _map(test: Embedded, rng: np.random.Generator) -> str:
  """Returns a t-SNE map of a random sample of classes."""
  # Imported here, since it takes two seconds that only reports need.
  from sklearn import manifold

  labels = test.split.labels
  classes = rng.permutation(test.split.num_classes)[:_NUM_CLASSES_ON_MAP]
  members = np.flatnonzero(np.isin(labels, classes))
  members = np.sort(rng.permutation(members)[:_NUM_POINTS])
  embeddings = _unit(test.embeddings[members])
  # Van der Maaten's default of 30, limited by the number of points.
  perplexity = min(30, (len(embeddings) - 1) / 3)
  positions = manifold.TSNE(
    perplexity=perplexity,
    init='pca' if len(embeddings) > 2 else 'random',
    random_state=0,
  ).fit_transform(embeddings)
  num_classes = len(np.unique(labels[members]))
  noun = test.split.noun
  title = f't-SNE map of {len(members)} {noun} of {num_classes} classes'
  shown = 'image' if noun == 'images' else 'class'
  note = f'<p>{title}; hover over a point to see its {shown}.</p>'
  return note + pages.points(
    positions,
    labels[members].tolist(),
    [test.name(i) for i in members],
    [test.image(i) for i in members],
    title=title,
  )


def _histograms(test: Embedded, rng: np.random.Generator) -> str:
  embeddings, labels = _unit(test.embeddings), test.split.labels
  a, b = rng.integers(len(labels), size=(2, 20 * _NUM_PAIRS))
  # Positive pairs are rare, so they are sampled separately: a random member of
  # the class of each `a`.
  order = np.argsort(labels, kind='stable')
  starts = np.searchsorted(labels[order], labels[a])
  sizes = np.bincount(labels)[labels[a]]
  positives = order[starts + rng.integers(sizes)]
  series = {}
  for name, others, keep in (
    ('same class', positives, positives != a),
    ('different classes', b, labels[a] != labels[b]),
  ):
    rows = np.flatnonzero(keep)[:_NUM_PAIRS]
    if len(rows):
      series[name] = np.linalg.norm(
        embeddings[a[rows]] - embeddings[others[rows]], axis=1
      )
  return charts.histograms(
    series,
    title=f'Distances between pairs of {test.split.noun}',
    x_label='distance',
  )


def _verification(result: Mapping[str, Any]) -> str:
  """Shows error rates by distance threshold: `evaluate.verify`."""
  distances, fmr, fnmr = zip(*result['curve'])
  rows = [
    (
      f'{100 * point["fmr"]:g}%',
      f'{point["fnmr"]:.2%}',
      f'{point["distance"]:.3f}',
    )
    for point in result['operating_points']
  ]
  eer = f'{result["eer"]:.2%}'
  rows.append((eer, eer, f'{result["eer_distance"]:.3f} (equal error rate)'))
  return (
    '<p>Two images are accepted as one class if their distance is at most a '
    'threshold. FMR is the fraction of accepted pairs among the '
    f'{result["num_impostor"]:,} of two classes, FNMR the fraction of rejected '
    f'pairs among the {result["num_genuine"]:,} of one.</p>'
    + pages.table(('FMR', 'FNMR', 'distance'), rows)
    + charts.lines(
      {
        'FMR': (distances, 100 * np.array(fmr)),
        'FNMR': (distances, 100 * np.array(fnmr)),
      },
      title='Error rates by distance threshold',
      x_label='distance threshold',
      y_label='percent of pairs',
    )
  )


def _confusions(test: Embedded, neighbors: _Neighbors) -> str:
  labels = test.split.labels
  queries, nearest = labels[neighbors.queries], labels[neighbors.items[:, 0]]
  sizes = np.bincount(queries, minlength=test.split.num_classes)
  pairs = collections.Counter(
    (a, b) for a, b in zip(queries.tolist(), nearest.tolist()) if a != b
  )
  names = test.split.class_names
  rows = [
    (names[a], names[b], count, count / int(sizes[a]))
    for (a, b), count in pairs.most_common(_NUM_CONFUSIONS)
  ]
  if not rows:
    return '<p>None: the nearest neighbor of every query is correct.</p>'
  return '<p>How often the nearest neighbor has another class.</p>' + (
    pages.table(('class', 'confused with', 'queries', '% of its queries'), rows)
  )


def _proxies(
  train: Embedded, proxies: np.ndarray, rng: np.random.Generator
) -> str:
  """Returns a random sample of proxies with their nearest train images."""
  present = np.unique(train.split.labels)
  chosen = np.sort(rng.permutation(present)[:_NUM_PROXIES])
  centers = _unit(proxies[chosen].reshape(len(chosen), -1, proxies.shape[-1]))
  embeddings, parts = _unit(train.embeddings), []
  for label, class_centers in zip(chosen, centers):
    distances_to_proxy = np.linalg.norm(embeddings - class_centers[0], axis=1)
    nearest = np.argsort(distances_to_proxy)[:_NUM_NEIGHBORS]
    parts.append(
      f'<h3>{html.escape(train.split.class_names[label])}</h3>'
      + pages.row(
        _card(
          train,
          i,
          f'{train.name(i)} ({distances_to_proxy[i]:.2f})',
          bool(train.split.labels[i] == label),
        )
        for i in nearest
      )
    )
  note = (
    f'The nearest of {len(embeddings):,} train {train.split.noun}. If a class '
    'has several proxies, its first one is shown.'
  )
  return f'<p>{note}</p>' + ''.join(parts)


def _about(results, config, overrides, facts) -> str:
  weights = results.get('weights') or {}
  if weights.get('from'):
    facts = {
      'initial weights': weights['from'],
      'license of these': weights.get('license') or 'unknown',
      **facts,
    }
  facts = {
    'steps': results['step'],
    'devices': results['devices'],
    **facts,
    **results['versions'],
  }
  return (
    pages.table(
      ('fact', 'value'), [(name, str(value)) for name, value in facts.items()]
    )
    + '<h3>Differences from the default configuration</h3>'
    + pages.table(
      ('field', 'value'),
      [(name, json.dumps(value)) for name, value in sorted(overrides.items())],
    )
    + '<details><summary>Complete configuration</summary><pre>'
    + html.escape(json.dumps(config, indent=2))
    + '</pre></details>'
  )
