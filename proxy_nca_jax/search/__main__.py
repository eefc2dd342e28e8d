"""Searches, clusters and classifies images with a trained network.

  %(prog)s index --workdir=RUN --images=DIR --index=FILE
  %(prog)s query --index=FILE image.jpg --k=10

Distances are Euclidean distances on the unit sphere, from 0 to 2: the square
root of the distance in the loss. Search is exact; above a million images it is
approximate if FAISS is installed, and says so.
"""

import argparse
import collections
import contextlib
import csv
import importlib.util
import json
import os
import sqlite3
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
import tqdm
from PIL import Image

from proxy_nca_jax import (
  clustering,
  configuration,
  features,
  inference,
  losses,
  models,
  retrieval,
  warm_start,
)
from proxy_nca_jax import images as images_lib
from proxy_nca_jax.report import pages
from proxy_nca_jax.runtime import errors, files, folders
from proxy_nca_jax.search import find
from proxy_nca_jax.search import index as index_lib

# Rounding error of an inner product of unit vectors, with a margin.
_PRODUCT_TOLERANCE = 1e-6
# Pairs whose distances are computed at a time: 64 MiB at 512 dimensions.
_PAIRS_PER_CHUNK = 2**14

# The columns of the files keep the names of their first version, such as
# 'picture', since other programs read them.
Rows = Iterable[dict[str, str | int | float | None]]


def _load_embedder(
  content: index_lib.Content, workdir: str
) -> inference.Embedder:
  """Loads the network of an index, from `workdir` if given."""
  embedder = inference.load(workdir or content.workdir)
  if embedder.digest != content.digest:
    raise ValueError(
      f'The network in {workdir or content.workdir!r} is not the one that made '
      'the index: it has other weights or another preprocessing. Name the '
      'right one with --workdir, or create a new index.'
    )
  if embedder.dim != content.embeddings.shape[1]:
    raise ValueError(
      f'The index holds embeddings of {content.embeddings.shape[1]} '
      f'dimensions, and its network has {embedder.dim}: create a new index.'
    )
  return embedder


def make_index(arguments: argparse.Namespace) -> None:
  embedder = inference.load(arguments.workdir)
  if embedder.vector_dim:
    raise ValueError(
      f'The network of {arguments.workdir!r} takes vectors, and an index is of '
      'files of images. In Python, proxy_nca_jax.load(RUN)(vectors) embeds '
      'vectors.'
    )
  counts, skipped = index_lib.update(
    arguments.index,
    embedder,
    arguments.images,
    workdir=arguments.workdir,
    known_embeddings=_stored_embeddings(
      embedder, arguments.workdir, arguments.images
    ),
  )
  skipped = [*index_lib.read_errors(arguments.index), *skipped.items()]
  for name, reason in skipped[: errors.MAX_NAMED]:
    print(f'skipped {name}: {reason}')
  if len(skipped) > errors.MAX_NAMED:
    path = f'{arguments.index}.skipped.txt'
    with files.write_atomically(path) as file:
      file.writelines(f'{name}: {reason}\n' for name, reason in skipped)
    kinds = errors.count_kinds(reason for _, reason in skipped)
    print(f'skipped in all: {kinds}. {path} lists them.')
  print(', '.join(f'{n:,} {name}' for name, n in counts._asdict().items()))


def _stored_embeddings(
  embedder: inference.Embedder, workdir: str, root: str
) -> dict[str, np.ndarray]:
  """Returns embeddings by file, if features of these images are stored.

  That is so after a run on this folder that did not train its backbone.
  """
  config, run = embedder.config, configuration.read_run(workdir)
  is_frozen = not config.num_steps and not config.num_epochs
  if not run or not run.get('weights_digest') or not is_frozen:
    return {}
  if os.path.realpath(config.dataset.root) != os.path.realpath(root):
    return {}
  rows = features.read_by_file(config, run['weights_digest'])
  if not rows:
    return {}
  embeddings = warm_start.project(
    models.create_model(config),
    embedder.params['head'],
    np.stack(list(rows.values())),
  )
  return dict(zip(rows, embeddings))


def query(arguments: argparse.Namespace) -> None:
  content = index_lib.read(arguments.index)
  embedder = _load_embedder(content, arguments.workdir)
  distances, indices = find.find_in_index(
    arguments.index, content, embedder(arguments.images), arguments.k
  )
  paths = content.escaped_paths
  rows = [
    {
      'query': folders.escape(image),
      'rank': rank,
      'distance': float(distance),
      'picture': paths[index],
    }
    for image, *neighbors in zip(arguments.images, distances, indices)
    for rank, (distance, index) in enumerate(zip(*neighbors), 1)
  ]
  if arguments.html:
    with files.write_atomically(arguments.html) as file:
      file.write(_page(rows))
  if arguments.output or not arguments.html:
    _write(rows, arguments.output)


def _page(rows: Rows) -> str:
  """Returns an HTML page with each query followed by its neighbors."""
  by_query = collections.defaultdict(list)
  for row in rows:
    by_query[row['query']].append(row)
  return pages.page(
    'Nearest images',
    [
      (
        os.path.basename(query_path),
        pages.row(
          [pages.Card(_thumbnail(query_path), 'query')]
          + [
            pages.Card(
              _thumbnail(row['picture']),
              f'{row["distance"]:.3f} {os.path.basename(row["picture"])}',
            )
            for row in neighbors
          ]
        ),
      )
      for query_path, neighbors in by_query.items()
    ],
  )


def _thumbnail(path: str) -> str:
  """Returns the thumbnail of an image, by its escaped path; gray if missing."""
  try:
    encoded = folders.read_file(folders.unescape(path))
    return pages.thumbnail(images_lib.decode(encoded))
  except (OSError, ValueError, MemoryError):
    return pages.thumbnail(Image.new('RGB', (112, 112), 'gray'))


def cluster(arguments: argparse.Namespace) -> None:
  content = index_lib.read(arguments.index)
  embeddings = find.normalize(content.embeddings)
  clusters = clustering.kmeans(
    embeddings,
    num_clusters=arguments.clusters,
    key=jax.random.key(arguments.seed),
    init='k-means++',
  )
  assignments = np.asarray(clusters.assignments)
  centroids = np.asarray(clusters.centroids)[assignments]
  distances = np.linalg.norm(embeddings - centroids, axis=1)
  paths = content.escaped_paths
  _write(
    [
      {
        'cluster': int(assignments[i]),
        'distance': float(distances[i]),
        'picture': paths[i],
      }
      # By cluster, then by distance to its centroid.
      for i in np.lexsort([distances, assignments])
    ],
    arguments.output,
  )


def duplicates(arguments: argparse.Namespace) -> None:
  content = index_lib.read(arguments.index)
  embeddings = find.normalize(content.embeddings)
  # |x - y|^2 = 2 - 2 x.y on the unit sphere. The tolerance admits pairs whose
  # product is rounded down; their exact distances decide below.
  min_product = 1 - arguments.threshold**2 / 2 - _PRODUCT_TOLERANCE
  with _sorted_pairs(embeddings, min_product, arguments.threshold) as pairs:
    paths = content.escaped_paths
    _write(
      (
        {'distance': distance, 'picture': paths[i], 'other': paths[j]}
        for distance, i, j in pairs
      ),
      arguments.output,
      columns=('distance', 'picture', 'other'),
    )


@contextlib.contextmanager
def _sorted_pairs(
  embeddings: np.ndarray, min_product: float, threshold: float
) -> Iterator[Iterator[tuple[float, int, int]]]:
  """Finds pairs below a distance and sorts them, in bounded memory.

  There may be as many as num_images^2 / 2. A temporary database on disk takes
  them as they are found and sorts them.

  Args:
    embeddings: float32 [num_images, dim], of unit length.
    min_product: smallest inner product of a pair to consider.
    threshold: pairs are at a smaller distance than this.

  Yields:
    Pairs (distance, i, j), i < j, by distance, then by i and j.

  Raises:
    OSError: if the disk of temporary files is full.
  """
  try:
    with contextlib.closing(sqlite3.connect('')) as database:
      database.execute(
        'CREATE TABLE pairs (distance REAL, i INTEGER, j INTEGER)'
      )
      with tqdm.tqdm(
        total=len(embeddings),
        unit=' images',
        disable=None,
        leave=False,
        delay=1,
      ) as bar:
        for num_rows, block in retrieval.pairs_above(embeddings, min_product):
          for start in range(0, len(block), _PAIRS_PER_CHUNK):
            pairs = block[start : start + _PAIRS_PER_CHUNK]
            distances = np.linalg.norm(
              embeddings[pairs[:, 0]] - embeddings[pairs[:, 1]], axis=1
            )
            is_near = distances < threshold
            database.executemany(
              'INSERT INTO pairs VALUES (?, ?, ?)',
              zip(distances[is_near].tolist(), *pairs[is_near].T.tolist()),
            )
          bar.update(num_rows)
      yield database.execute('SELECT * FROM pairs ORDER BY distance, i, j')
  except sqlite3.Error as error:
    raise OSError(
      f'The pairs cannot be sorted on disk: {errors.one_line(error)}.'
    ) from error


def classify(arguments: argparse.Namespace) -> None:
  content = index_lib.read(arguments.index)
  embedder = _load_embedder(content, arguments.workdir)
  queries = embedder(arguments.images)
  if arguments.by == 'proxies':
    labels, proxies = _labelled_proxies(embedder)
    distances, indices = find.find(queries, proxies, 1)
  else:
    labels = content.labels
    distances, indices = find.find_in_index(
      arguments.index, content, queries, arguments.k
    )
  rows = []
  for image, *neighbors in zip(arguments.images, distances, indices):
    label, distance, share = _vote(labels, *neighbors)
    is_unknown = (
      arguments.threshold is not None and distance > arguments.threshold
    )
    row = {
      'picture': folders.escape(image),
      'class': None if is_unknown else label,
      'distance': distance,
    }
    if arguments.by != 'proxies':
      row['votes'] = share
    rows.append(row)
  _write(rows, arguments.output)


def _vote(
  labels: Sequence[str], distances: np.ndarray, indices: np.ndarray
) -> tuple[str, float, float]:
  """Returns the most frequent label of the neighbors of an image.

  Args:
    labels: the label of each item, [num_items].
    distances: float [k], ascending.
    indices: int [k], in [0, num_items).

  Returns:
    The label, the distance of its nearest item, and its fraction of the votes.
  """
  voters = [labels[index] for index in indices]
  # Counter keeps the order of insertion, so the nearest label wins a tie.
  ((label, num_votes),) = collections.Counter(voters).most_common(1)
  return label, float(distances[voters.index(label)]), num_votes / len(voters)


def _labelled_proxies(
  embedder: inference.Embedder,
) -> tuple[list[str], np.ndarray]:
  """Returns the class names and the proxies, float32 [num_proxies, dim]."""
  name = embedder.config.loss.name
  if not losses.LOSSES[name].has_class_proxies:
    raise ValueError(
      f'The loss of this run ({name}) has no proxies of classes: use '
      '--by=neighbours.'
    )
  proxies = np.asarray(embedder.params['proxies'])
  num_centers = 1 if proxies.ndim == 2 else proxies.shape[1]
  labels = np.repeat(embedder.class_names, num_centers).tolist()
  return labels, proxies.reshape(-1, proxies.shape[-1])


def export(arguments: argparse.Namespace) -> None:
  """Writes the embeddings of an index as NumPy arrays or as a Parquet table."""
  content = index_lib.read(arguments.index)
  if arguments.output.endswith('.npz'):
    with files.write_atomically(arguments.output, 'wb') as file:
      np.savez(
        file,
        embeddings=content.embeddings,
        pictures=np.array(content.escaped_paths),
        labels=np.array(content.labels),
      )
  elif arguments.output.endswith('.parquet'):
    if not importlib.util.find_spec('pyarrow'):
      raise ValueError('Parquet needs pyarrow: pip install pyarrow.')
    import pyarrow
    from pyarrow import parquet

    columns = {
      'picture': content.escaped_paths,
      'label': content.labels,
      'embedding': pyarrow.FixedSizeListArray.from_arrays(
        content.embeddings.reshape(-1), content.embeddings.shape[1]
      ),
    }
    with files.write_atomically(arguments.output, 'wb') as file:
      parquet.write_table(pyarrow.table(columns), file)
  else:
    raise ValueError(
      f'--output ({arguments.output!r}) must end with .npz or .parquet.'
    )


def serve(arguments: argparse.Namespace) -> None:
  missing = [
    name
    for name in ('starlette', 'uvicorn')
    if not importlib.util.find_spec(name)
  ]
  if missing:
    raise ValueError(f'serve needs: pip install {" ".join(missing)}.')
  from proxy_nca_jax.search import serve as serve_lib

  content = index_lib.read(arguments.index)
  serve_lib.serve(
    arguments.index,
    content,
    _load_embedder(content, arguments.workdir),
    host=arguments.host,
    port=arguments.port,
    max_megabytes=arguments.max_megabytes,
  )


def _write(rows: Rows, output: str, columns: Sequence[str] = ()) -> None:
  """Writes a table to a .csv or .json file, or as CSV to stdout if ''.

  Args:
    rows: the rows, of equal columns; with `columns`, they may be an iterator,
      and one row at a time is in memory.
    output: the file to write.
    columns: the columns; by default those of the first row.
  """
  columns = columns or list(rows[0])
  if output.endswith('.json'):
    with files.write_atomically(output) as file:
      encoder = json.JSONEncoder(indent=2, ensure_ascii=False)
      separator = '[\n'
      for row in rows:
        file.write(separator + textwrap.indent(encoder.encode(row), '  '))
        separator = ',\n'
      file.write('[]\n' if separator == '[\n' else '\n]\n')
  elif output.endswith('.csv'):
    with files.write_atomically(output, newline='') as file:
      _write_csv(rows, columns, file)
  elif output:
    raise ValueError(f'--output ({output!r}) must end with .csv or .json.')
  else:
    _write_csv(rows, columns, sys.stdout)


def _write_csv(rows: Iterable[dict], columns: Sequence[str], file) -> None:
  writer = csv.DictWriter(file, columns, lineterminator='\n')
  writer.writeheader()
  for row in rows:
    writer.writerow(
      {
        name: f'{value:.4f}' if isinstance(value, float) else value
        for name, value in row.items()
      }
    )


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog=prog,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def add(name, work, text):
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(work=work)
    command.add_argument(
      '--index', required=True, metavar='FILE', help='the index file'
    )
    return command

  index_command = add(
    'index',
    make_index,
    'Create or update an index of a folder: embed its new and changed images. '
    'A stopped update resumes; unreadable files are listed and skipped.',
  )
  index_command.add_argument(
    '--workdir',
    required=True,
    metavar='RUN',
    help='workdir of a run, or folder of a saved embedder',
  )
  index_command.add_argument(
    '--images',
    required=True,
    metavar='DIR',
    help='folder of images, searched recursively',
  )
  query_command = add('query', query, 'Find the nearest images in the index.')
  query_command.add_argument(
    '--html',
    metavar='FILE',
    default='',
    help='write an HTML page of the images',
  )
  classify_command = add(
    'classify',
    classify,
    'Classify images by the folders in the index or by learned proxies.',
  )
  classify_command.add_argument(
    '--by',
    choices=('neighbours', 'proxies'),
    default='neighbours',
    help='the most frequent folder among the --k nearest images, or the class '
    'of the nearest proxy (default: neighbours)',
  )
  classify_command.add_argument(
    '--threshold',
    type=_non_negative,
    metavar='DISTANCE',
    help='leave the class empty if its nearest image or proxy is farther than '
    'this',
  )
  for command, k in ((query_command, 10), (classify_command, 1)):
    command.add_argument(
      'images', nargs='+', metavar='IMAGE', help='image files'
    )
    command.add_argument(
      '--k',
      type=_positive,
      default=k,
      help=f'number of nearest images (default: {k})',
    )
    command.add_argument(
      '--workdir',
      default='',
      metavar='RUN',
      help="location of the index's network, if it has moved",
    )
  cluster_command = add(
    'cluster', cluster, 'Cluster the images of the index by k-means.'
  )
  cluster_command.add_argument(
    '--clusters', type=_positive, required=True, help='number of clusters'
  )
  cluster_command.add_argument(
    '--seed', type=errors.seed, default=0, help='seed of k-means (default: 0)'
  )
  duplicates_command = add(
    'duplicates', duplicates, 'List pairs of nearly identical images.'
  )
  duplicates_command.add_argument(
    '--threshold',
    type=_non_negative,
    required=True,
    metavar='DISTANCE',
    help='list pairs at a smaller distance than this',
  )
  for command in (
    query_command,
    classify_command,
    cluster_command,
    duplicates_command,
  ):
    command.add_argument(
      '--output',
      default='',
      metavar='FILE.csv|.json',
      help='output file (default: CSV on stdout)',
    )
  export_command = add(
    'export', export, 'Write the embeddings of the index to a file.'
  )
  export_command.add_argument(
    '--output', required=True, metavar='FILE.npz|.parquet', help='output file'
  )
  serve_command = add(
    'serve',
    serve,
    'Serve an HTTP API and a page where you drop an image to see its '
    'neighbors. There is no access control: whoever reaches the port sees the '
    'images of the index.',
  )
  serve_command.add_argument(
    '--host',
    default='127.0.0.1',
    help='address to bind to (default: 127.0.0.1, this machine only)',
  )
  serve_command.add_argument(
    '--port', type=_port, default=8000, help='port to bind to (default: 8000)'
  )
  serve_command.add_argument(
    '--max_megabytes',
    type=_positive,
    default=32,
    help='reject larger uploads (default: 32)',
  )
  serve_command.add_argument(
    '--workdir',
    default='',
    metavar='RUN',
    help="location of the index's network, if it has moved",
  )
  return parser.parse_args(arguments)


def _port(text: str) -> int:
  value = int(text)
  if not 0 < value < 2**16:
    raise argparse.ArgumentTypeError(f'{value} must be from 1 to 65535')
  return value


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


def main(
  arguments: Sequence[str] | None = None,
  *,
  prog: str = 'python -m proxy_nca_jax.search',
) -> None:
  """Runs the command line.

  Args:
    arguments: the command's arguments; by default those of the process.
    prog: the name by which --help refers to the command.
  """
  arguments = _parse(arguments, prog)
  folders.write_utf8_to_stdout()
  with errors.in_one_line(
    stopped='Stopped. Start the same command again to resume.'
  ):
    arguments.work(arguments)


if __name__ == '__main__':
  main()
