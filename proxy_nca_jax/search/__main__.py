"""Searches, clusters and classifies pictures by a trained network.

python -m proxy_nca_jax.search index --workdir=RUN --images=DIR --index=FILE
python -m proxy_nca_jax.search query --index=FILE picture.jpg --k=10

Distances are Euclidean on the unit sphere, from 0 to 2: the square root of the
distance in the loss. Search is exact; from a million pictures on it uses FAISS
where that is installed, and says so.
"""

import argparse
import collections
import csv
import importlib.util
import json
import os
import sys
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from PIL import Image

from proxy_nca_jax import clustering, inference, losses, retrieval
from proxy_nca_jax import images as images_lib
from proxy_nca_jax.report import pages
from proxy_nca_jax.runtime import errors
from proxy_nca_jax.search import find
from proxy_nca_jax.search import index as index_lib

Rows = list[dict[str, str | int | float | None]]


def _load_embedder(
  content: index_lib.Content, workdir: str
) -> inference.Embedder:
  """Loads the network of an index, from another place if one is given."""
  embedder = inference.load(workdir or content.workdir)
  if embedder.digest != content.digest:
    raise ValueError(
      f'The network in {workdir or content.workdir!r} is not the one that the '
      'index is of: it has other weights or prepares pictures otherwise. Name '
      'the right one with --workdir, or make the index anew.'
    )
  return embedder


def make_index(arguments: argparse.Namespace) -> None:
  counts = index_lib.update(
    arguments.index,
    inference.load(arguments.workdir),
    arguments.images,
    workdir=arguments.workdir,
  )
  for name, reason in index_lib.read_errors(arguments.index):
    print(f'left out: {name}: {reason}')
  print(', '.join(f'{n:,} {name}' for name, n in counts._asdict().items()))


def query(arguments: argparse.Namespace) -> None:
  content = index_lib.read(arguments.index)
  embedder = _load_embedder(content, arguments.workdir)
  found = find.find_in_index(
    arguments.index, content, embedder(arguments.pictures), arguments.k
  )
  paths = content.paths
  rows = [
    {
      'query': picture,
      'rank': rank,
      'distance': float(distance),
      'picture': paths[number],
    }
    for picture, *neighbours in zip(arguments.pictures, *found)
    for rank, (distance, number) in enumerate(zip(*neighbours), 1)
  ]
  if arguments.html:
    with open(arguments.html, 'w', encoding='utf-8') as file:
      file.write(_page(rows))
  if arguments.output or not arguments.html:
    _write(rows, arguments.output)


def _page(rows: Rows) -> str:
  """Shows each query before its neighbours."""
  by_query = collections.defaultdict(list)
  for row in rows:
    by_query[row['query']].append(row)
  return pages.page(
    'Nearest pictures',
    [
      (
        os.path.basename(picture),
        pages.row(
          [pages.Card(_thumbnail(picture), 'query')]
          + [
            pages.Card(
              _thumbnail(row['picture']),
              f'{row["distance"]:.3f} {os.path.basename(row["picture"])}',
            )
            for row in neighbours
          ]
        ),
      )
      for picture, neighbours in by_query.items()
    ],
  )


def _thumbnail(path: str) -> str:
  try:
    with open(path, 'rb') as file:
      return pages.thumbnail(images_lib.decode(file.read()))
  except (OSError, ValueError):  # It is in the index, and gone.
    return pages.thumbnail(Image.new('RGB', (112, 112), 'gray'))


def cluster(arguments: argparse.Namespace) -> None:
  content = index_lib.read(arguments.index)
  points = find.project(content.embeddings)
  clusters = clustering.kmeans(
    points,
    num_clusters=arguments.clusters,
    key=jax.random.key(arguments.seed),
    init='k-means++',
  )
  assignments = np.asarray(clusters.assignments)
  centroids = np.asarray(clusters.centroids)[assignments]
  away = np.linalg.norm(points - centroids, axis=1)
  _write(
    [
      {
        'cluster': int(assignments[i]),
        'distance': float(away[i]),
        'picture': path,
      }
      for i, path in sorted(
        enumerate(content.paths), key=lambda x: (assignments[x[0]], away[x[0]])
      )
    ],
    arguments.output,
  )


def duplicates(arguments: argparse.Namespace) -> None:
  content = index_lib.read(arguments.index)
  points = find.project(content.embeddings)
  # |x - y|^2 = 2 - 2 x.y; the products' rounding is let in, then taken away.
  least = 1 - arguments.threshold**2 / 2 - 1e-6
  pairs = []
  with tqdm.tqdm(
    total=len(points), unit=' pictures', disable=None, leave=False, delay=1
  ) as bar:
    for number, more in retrieval.pairs_above(points, least):
      pairs.append(more)
      bar.update(number)
  pairs = np.concatenate(pairs)
  away = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
  paths = content.paths
  _write(
    [
      {'distance': float(away[i]), 'picture': paths[a], 'other': paths[b]}
      for i, (a, b) in sorted(enumerate(pairs), key=lambda x: away[x[0]])
      if away[i] < arguments.threshold
    ],
    arguments.output,
    columns=('distance', 'picture', 'other'),
  )


def classify(arguments: argparse.Namespace) -> None:
  content = index_lib.read(arguments.index)
  embedder = _load_embedder(content, arguments.workdir)
  queries = embedder(arguments.pictures)
  if arguments.by == 'proxies':
    labels, points = _proxies(embedder)
    found = find.find(queries, points, 1)
  else:
    labels = content.labels
    found = find.find_in_index(arguments.index, content, queries, arguments.k)
  rows = []
  for picture, away, numbers in zip(arguments.pictures, *found):
    # The most frequent; of as frequent ones the nearest, as they are counted.
    votes = collections.Counter(labels[number] for number in numbers)
    is_far = arguments.threshold is not None and away[0] > arguments.threshold
    rows.append(
      {
        'picture': picture,
        'class': None if is_far else votes.most_common(1)[0][0],
        'distance': float(away[0]),
      }
    )
  _write(rows, arguments.output)


def _proxies(embedder: inference.Embedder) -> tuple[list[str], np.ndarray]:
  """Returns the class and the place of each proxy."""
  name = embedder.config.loss.name
  if not losses.NEEDS[name].has_labelled_proxies:
    raise ValueError(
      f'The loss of this run ({name}) learned no proxies of classes: use '
      '--by=neighbours.'
    )
  proxies = np.asarray(embedder.params['proxies'])
  num_centers = 1 if proxies.ndim == 2 else proxies.shape[1]
  labels = np.repeat(embedder.class_names, num_centers).tolist()
  return labels, proxies.reshape(-1, proxies.shape[-1])


def export(arguments: argparse.Namespace) -> None:
  """Writes the embeddings of an index to a file of arrays or columns."""
  content = index_lib.read(arguments.index)
  if arguments.output.endswith('.npz'):
    np.savez(
      arguments.output,
      embeddings=content.embeddings,
      pictures=np.array(content.paths),
      labels=np.array(content.labels),
    )
  elif arguments.output.endswith('.parquet'):
    if not importlib.util.find_spec('pyarrow'):
      raise ValueError('Parquet needs pyarrow: pip install pyarrow.')
    import pyarrow
    from pyarrow import parquet

    columns = {
      'picture': content.paths,
      'label': content.labels,
      'embedding': pyarrow.FixedSizeListArray.from_arrays(
        content.embeddings.reshape(-1), content.embeddings.shape[1]
      ),
    }
    parquet.write_table(pyarrow.table(columns), arguments.output)
  else:
    raise ValueError(
      f'--output ({arguments.output!r}) must end with .npz or .parquet.'
    )


def _write(rows: Rows, output: str, columns: Sequence[str] = ()) -> None:
  """Writes a table to a .csv or .json file, or as CSV to stdout."""
  columns = columns or list(rows[0])
  if output.endswith('.json'):
    with open(output, 'w', encoding='utf-8') as file:
      json.dump(rows, file, indent=2, ensure_ascii=False)
      file.write('\n')
  elif output.endswith('.csv'):
    with open(output, 'w', encoding='utf-8', newline='') as file:
      _write_csv(rows, columns, file)
  elif output:
    raise ValueError(f'--output ({output!r}) must end with .csv or .json.')
  else:
    _write_csv(rows, columns, sys.stdout)


def _write_csv(rows: Rows, columns: Sequence[str], file) -> None:
  writer = csv.DictWriter(file, columns, lineterminator='\n')
  writer.writeheader()
  for row in rows:
    writer.writerow(
      {
        name: f'{value:.4f}' if isinstance(value, float) else value
        for name, value in row.items()
      }
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m proxy_nca_jax.search',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def add(name, work, text):
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(work=work)
    command.add_argument('--index', required=True, metavar='FILE')
    return command

  made = add(
    'index',
    make_index,
    'Embed a folder, or what is new or changed in it since. A stopped one goes '
    'on; what is no picture is reported and left out.',
  )
  made.add_argument(
    '--workdir',
    required=True,
    metavar='RUN',
    help='of a run, or the folder of a saved embedder',
  )
  made.add_argument(
    '--images', required=True, metavar='DIR', help='the folder of pictures'
  )
  asked = add('query', query, 'Find the nearest pictures of the index.')
  asked.add_argument(
    '--html', metavar='FILE', default='', help='a page of them'
  )
  sorted_in = add(
    'classify',
    classify,
    'Find the class of pictures, by folders of the index or learned proxies.',
  )
  sorted_in.add_argument(
    '--by',
    choices=('neighbours', 'proxies'),
    default='neighbours',
    help='the most frequent folder of the --k nearest pictures, or the class '
    'of the nearest proxy',
  )
  sorted_in.add_argument(
    '--threshold',
    type=_non_negative,
    metavar='DISTANCE',
    help='farther than this is none of the classes',
  )
  for command, k in ((asked, 10), (sorted_in, 1)):
    command.add_argument('pictures', nargs='+', metavar='PICTURE')
    command.add_argument(
      '--k', type=_positive, default=k, help=f'{k} by default'
    )
    command.add_argument(
      '--workdir',
      default='',
      metavar='RUN',
      help='where the network of the index lies now, if not where it was',
    )
  grouped = add('cluster', cluster, 'Group the pictures of the index: k-means.')
  grouped.add_argument('--clusters', type=_positive, required=True)
  grouped.add_argument('--seed', type=int, default=0)
  paired = add('duplicates', duplicates, 'List the pairs that are near.')
  paired.add_argument(
    '--threshold',
    type=_non_negative,
    required=True,
    metavar='DISTANCE',
    help='pairs nearer than this',
  )
  for command in (asked, sorted_in, grouped, paired):
    command.add_argument(
      '--output',
      default='',
      metavar='FILE.csv|.json',
      help='by default CSV on stdout',
    )
  written = add('export', export, 'Write the embeddings of the index.')
  written.add_argument('--output', required=True, metavar='FILE.npz|.parquet')
  return parser.parse_args(arguments)


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f'{value} must be at least 1')
  return value


def _non_negative(text: str) -> float:
  value = float(text)
  if not value >= 0:
    raise argparse.ArgumentTypeError(f'{value} must not be negative')
  return value


def main(arguments: Sequence[str] | None = None) -> None:
  arguments = _parse(arguments)
  with errors.in_one_line(stopped='Stopped. The same command goes on.'):
    arguments.work(arguments)


if __name__ == '__main__':
  main()
