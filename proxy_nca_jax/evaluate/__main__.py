"""Scores embeddings from anywhere.

python -m proxy_nca_jax.evaluate --embeddings=x.npy --labels=y.npy
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np

from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.evaluate import scores as scores_lib
from proxy_nca_jax.runtime import errors, files


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog=prog,
    description='Scores embeddings by retrieval and by clustering.',
  )
  files = {
    'embeddings': 'float [items, dim]: each queries all others',
    'labels': '[items], numbers or texts',
    'query_embeddings': 'float [queries, dim]: these search the others instead',
    'query_labels': '[queries]',
    'cameras': "[items]: of the query's label and camera nothing is searched",
    'query_cameras': '[queries]',
  }
  for name, text in files.items():
    parser.add_argument(
      f'--{name}',
      required=name in ('embeddings', 'labels'),
      metavar='FILE.npy',
      help=text,
    )
  parser.add_argument(
    '--recall_at', type=int, nargs='+', default=(1, 2, 4, 8), metavar='K'
  )
  parser.add_argument(
    '--nearest_only', action='store_true', help='only Recall@K and MRR, faster'
  )
  parser.add_argument(
    '--kmeans_iterations', type=int, default=20, help='0 is no clustering'
  )
  parser.add_argument(
    '--kmeans_start', choices=('random', 'k-means++'), default='random'
  )
  parser.add_argument('--kmeans_num_starts', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--num_resamples',
    type=int,
    default=1000,
    help='of classes, for intervals of 95%%; 0 is none',
  )
  parser.add_argument('--json', metavar='FILE', help='where scores are written')
  return parser.parse_args(arguments)


def _read(arguments: argparse.Namespace) -> dict[str, np.ndarray | None]:
  """Returns the arrays that `score` takes, the queries after the others."""
  arrays = {}
  for name in ('embeddings', 'labels', 'cameras'):
    path, query_path = (
      getattr(arguments, title) for title in (name, f'query_{name}')
    )
    if bool(query_path) != bool(path and arguments.query_embeddings):
      raise ValueError(
        f'--{name} and --query_{name} go together, where there are '
        '--query_embeddings.'
      )
    parts = [_load(p) for p in (path, query_path) if p]
    arrays[name] = parts[0] if len(parts) == 1 else None
    if len(parts) == 2:
      arrays[name] = np.concatenate(parts)
      sizes = [len(part) for part in parts]
      is_query = np.repeat([False, True], sizes)
      if not np.array_equal(arrays.setdefault('is_query', is_query), is_query):
        raise ValueError(
          f'{query_path!r} must have as many rows as '
          f'{arguments.query_embeddings!r}; got {sizes[1]}.'
        )
  # Texts become numbers.
  _, arrays['labels'] = np.unique(arrays['labels'], return_inverse=True)
  return arrays


def _load(path: str) -> np.ndarray:
  try:
    return np.load(path, mmap_mode='r')
  except ValueError as error:
    raise ValueError(
      f'{path!r} is no file of an array as numpy.save writes it: {error}'
    ) from error


def main(
  arguments: Sequence[str] | None = None,
  *,
  prog: str = 'python -m proxy_nca_jax.evaluate',
) -> None:
  """Runs the command line.

  Args:
    arguments: the command's arguments; by default those of the process.
    prog: the name by which --help refers to the command.
  """
  arguments = _parse(arguments, prog)
  names = (
    'recall_at',
    'nearest_only',
    'kmeans_iterations',
    'kmeans_start',
    'kmeans_num_starts',
    'seed',
    'num_resamples',
  )
  with errors.in_one_line():
    scores = scores_lib.score(
      **_read(arguments),
      **{name: getattr(arguments, name) for name in names},
      mesh=mesh_lib.make_mesh(),
    )
    print(scores_lib.format_table({'percent': scores}))
    for name, value in scores.items():
      if isinstance(value, int):
        print(f'{name.replace("_", " ")}: {value:,}')
    if arguments.json:
      with files.write_atomically(arguments.json) as file:
        json.dump(scores, file, indent=2)


if __name__ == '__main__':
  main()
