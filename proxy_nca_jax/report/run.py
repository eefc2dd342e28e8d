"""What a run found, as one page of HTML that opens anywhere, offline."""

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
from proxy_nca_jax.runtime import files

# What a page shows of each kind.
_NUM_QUERIES, _NUM_NEIGHBOURS, _NUM_PROXIES = 6, 8, 6
_NUM_CONFUSIONS, _NUM_CLASSES_ON_MAP, _NUM_POINTS = 30, 40, 800
_NUM_PAIRS = 20_000


class Embedded(NamedTuple):
  """A split, or some of it, with its embeddings.

  Attributes:
    split: of the data set.
    embeddings: float32 [len(split), dim].
  """

  split: datasets.Split
  embeddings: np.ndarray

  def image(self, index: int) -> Image.Image:
    return Image.fromarray(self.split.image(index))

  def name(self, index: int) -> str:
    return self.split.class_names[self.split.labels[index]]


class _Neighbours(NamedTuple):
  """The nearest items of each query.

  Attributes:
    queries: int [num_queries], numbers of items.
    items: int [num_queries, k], likewise, nearest first.
    distances: float [num_queries, k].
    is_right: bool [num_queries, k], whether they are of the query's class.
  """

  queries: np.ndarray
  items: np.ndarray
  distances: np.ndarray
  is_right: np.ndarray


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
    path: of the file.
    results: the content of results.json.
    config: of the run, as nested dicts of JSON.
    overrides: what of it differs from the defaults, {'group.field': value}.
    facts: what else to tell of it, as its wall time.
    rows: of metrics.jsonl.
    test: what was measured.
    train: some of what was learned from.
    proxies: float [num_classes, ..., dim], of the train classes; None if the
      loss has none of classes.
  """
  rng = np.random.default_rng(0)
  found = _find_neighbours(test)
  sections = [
    ('Scores', _scores(results, config)),
    ('Training', _curves(rows)),
    ('Queries and their nearest neighbours', _queries(test, found)),
    ('The embedding space', _map(test, rng)),
    ('Distances', _histograms(test, rng)),
    ('Classes most confused', _confusions(test, found)),
  ]
  if proxies is not None:
    nearest = _proxies(train, proxies, rng)
    sections.append(('Nearest images to a proxy', nearest))
  sections.append(('The run', _about(results, config, overrides, facts)))
  name = f'{config["dataset"]["name"]}, {config["loss"]["name"]}'
  with files.write_atomically(path) as file:
    file.write(pages.page(f'Report: {name}', sections))


def _unit(rows: np.ndarray) -> np.ndarray:
  return np.asarray(distances.unit_norm(np.asarray(rows, np.float32)))


def _find_neighbours(test: Embedded) -> _Neighbours:
  """Finds the nearest items as the scores do: no query finds itself."""
  split, points = test.split, _unit(test.embeddings)
  queries = gallery = np.arange(len(points))
  k = min(_NUM_NEIGHBOURS, len(points) - 1)
  if split.is_query is None:
    _, found = retrieval.nearest(points, k)
  else:
    queries, gallery = (
      np.flatnonzero(rows) for rows in (split.is_query, ~split.is_query)
    )
    # Of pictures of the same class and camera, which do not count, there may
    # be some before.
    extra = 0 if split.cameras is None else 32
    k = min(k + extra, len(gallery))
    _, found = retrieval.nearest(points[queries], k, gallery=points[gallery])
  items = gallery[np.asarray(found)]
  if split.cameras is not None:
    counts = (split.labels[items] != split.labels[queries][:, None]) | (
      split.cameras[items] != split.cameras[queries][:, None]
    )
    order = np.argsort(~counts, axis=1, kind='stable')[:, :_NUM_NEIGHBOURS]
    items = np.take_along_axis(items, order, axis=1)
  away = retrieval.neighbor_distances(points[queries], points, items)
  is_right = split.labels[items] == split.labels[queries][:, None]
  return _Neighbours(queries, items, away, is_right)


def _scores(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  """The table of the run's scores, above those that are published."""
  network = f'{config["model"]["name"]}, {config["model"]["embedding_dim"]}'
  titles = [
    title
    for title in (
      'selected',
      'trained',
      'seen_classes',
      'untrained',
      'raw_pixels',
    )
    if title in results
  ]
  names = scores_lib.score_names(results['trained'])
  ours = [
    [
      f'this run, {title.replace("_", " ")}',
      '' if title == 'raw_pixels' else network,
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
  note = 'Percent, on classes that training did not see.'
  if theirs:
    note += ' Published results are of other code, and some are the best on '
    note += 'the test classes.'
  return f'<p>{note}</p>' + pages.table(header, ours + theirs)


def _curves(rows: Sequence[Mapping[str, float]]) -> str:
  series = {}
  losses = [(row['step'], row['loss']) for row in rows if 'loss' in row]
  if losses:
    series['loss'] = {'loss': tuple(zip(*losses))}
  # Of the classes that were scored while training.
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


def _queries(test: Embedded, found: _Neighbours) -> str:
  """The best, typical and worst queries, of different classes."""
  # Sure and right first, sure and wrong last.
  precision = found.is_right.mean(axis=1)
  away = found.distances.mean(axis=1)
  order = np.lexsort([np.where(precision > 0.5, away, -away), -precision])
  middle = np.argsort(np.abs(np.arange(len(order)) - len(order) // 2))
  kinds = {'Best': order, 'Typical': order[middle], 'Worst': order[::-1]}
  parts, seen = [], set()
  for title, candidates in kinds.items():
    parts.append(f'<h3>{title}</h3>')
    number = 0
    for row in candidates:
      label = test.split.labels[found.queries[row]]
      if label in seen:
        continue
      seen.add(label)
      parts.append(_query(test, found, row))
      number += 1
      if number == _NUM_QUERIES // 2:
        break
  return ''.join(parts)


def _query(test: Embedded, found: _Neighbours, row: int) -> str:
  query = found.queries[row]
  cards = [_card(test, query, f'query: {test.name(query)}')]
  for item, away, is_right in zip(
    found.items[row], found.distances[row], found.is_right[row]
  ):
    cards.append(
      _card(test, item, f'{test.name(item)} ({away:.2f})', bool(is_right))
    )
  return pages.row(cards)


def _card(embedded, index, caption, is_right=None) -> pages.Card:
  return pages.Card(pages.thumbnail(embedded.image(index)), caption, is_right)


def _map(test: Embedded, rng: np.random.Generator) -> str:
  """A t-SNE of some classes."""
  # It takes two seconds, for which runs without a report need not wait.
  from sklearn import manifold

  labels = test.split.labels
  classes = rng.permutation(test.split.num_classes)[:_NUM_CLASSES_ON_MAP]
  members = np.flatnonzero(np.isin(labels, classes))
  members = np.sort(rng.permutation(members)[:_NUM_POINTS])
  points = _unit(test.embeddings[members])
  # Van der Maaten's default, as far as there are points for it.
  perplexity = min(30, (len(points) - 1) / 3)
  places = manifold.TSNE(
    perplexity=perplexity,
    init='pca' if len(points) > 2 else 'random',
    random_state=0,
  ).fit_transform(points)
  number = len(np.unique(labels[members]))
  title = f'Map of {len(members)} images of {number} classes'
  return f'<p>{title} (t-SNE); a pointer shows the image.</p>' + pages.points(
    places,
    labels[members].tolist(),
    [test.name(i) for i in members],
    [test.image(i) for i in members],
    title=title,
  )


def _histograms(test: Embedded, rng: np.random.Generator) -> str:
  points, labels = _unit(test.embeddings), test.split.labels
  a, b = rng.integers(len(labels), size=(2, 20 * _NUM_PAIRS))
  # Pairs of the same class are rare among all: they are drawn by class.
  order = np.argsort(labels, kind='stable')
  starts = np.searchsorted(labels[order], labels[a])
  sizes = np.bincount(labels)[labels[a]]
  mate = order[starts + rng.integers(sizes)]
  series = {}
  for name, others, keep in (
    ('the same class', mate, mate != a),
    ('different classes', b, labels[a] != labels[b]),
  ):
    rows = np.flatnonzero(keep)[:_NUM_PAIRS]
    away = np.linalg.norm(points[a[rows]] - points[others[rows]], axis=1)
    if len(away):
      series[name] = away
  return charts.histograms(
    series, title='Distances of pairs of images', x_label='distance'
  )


def _confusions(test: Embedded, found: _Neighbours) -> str:
  labels = test.split.labels
  queries, nearest = labels[found.queries], labels[found.items[:, 0]]
  sizes = np.bincount(queries, minlength=test.split.num_classes)
  pairs = collections.Counter(
    (a, b) for a, b in zip(queries.tolist(), nearest.tolist()) if a != b
  )
  names = test.split.class_names
  rows = [
    (names[a], names[b], number, number / int(sizes[a]))
    for (a, b), number in pairs.most_common(_NUM_CONFUSIONS)
  ]
  if not rows:
    return '<p>None: the nearest neighbour of each query is right.</p>'
  return '<p>How often the nearest neighbour is of another class.</p>' + (
    pages.table(('class', 'taken for', 'queries', '% of its queries'), rows)
  )


def _proxies(
  train: Embedded, proxies: np.ndarray, rng: np.random.Generator
) -> str:
  """Some proxies with the nearest of the images that were embedded."""
  present = np.unique(train.split.labels)
  chosen = np.sort(rng.permutation(present)[:_NUM_PROXIES])
  centers = _unit(proxies[chosen].reshape(len(chosen), -1, proxies.shape[-1]))
  points, parts = _unit(train.embeddings), []
  for label, points_of_class in zip(chosen, centers):
    away = np.linalg.norm(points - points_of_class[0], axis=1)
    nearest = np.argsort(away)[:_NUM_NEIGHBOURS]
    parts.append(
      f'<h3>{html.escape(train.split.class_names[label])}</h3>'
      + pages.row(
        _card(
          train,
          i,
          f'{train.name(i)} ({away[i]:.2f})',
          bool(train.split.labels[i] == label),
        )
        for i in nearest
      )
    )
  note = (
    f'Among {len(points):,} of the images that were learned from. Of several '
    'proxies of a class, the first.'
  )
  return f'<p>{note}</p>' + ''.join(parts)


def _about(results, config, overrides, facts) -> str:
  facts = {
    'steps': results['step'],
    'devices': results['devices'],
    **facts,
    **results['versions'],
  }
  return (
    pages.table(
      ('what', 'value'), [(name, str(value)) for name, value in facts.items()]
    )
    + '<h3>What differs from the defaults</h3>'
    + pages.table(
      ('field', 'value'),
      [(name, json.dumps(value)) for name, value in sorted(overrides.items())],
    )
    + '<details><summary>The whole configuration</summary><pre>'
    + html.escape(json.dumps(config, indent=2))
    + '</pre></details>'
  )
