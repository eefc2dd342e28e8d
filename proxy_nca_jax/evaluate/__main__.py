"""Scores embeddings from NumPy files."""

import argparse
import csv
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.evaluate import scores as scores_lib
from proxy_nca_jax.evaluate import verification
from proxy_nca_jax.runtime import errors, files

_DESCRIPTION = """Scores embeddings by retrieval and by clustering.

  {prog} --embeddings=x.npy --labels=y.npy

Scores are printed in percent, with 95% confidence intervals."""

_MAGIC = b'\x93NUMPY'
_FILES = {
  'embeddings': 'float [items, dim]; each item queries all others',
  'labels': 'integers or texts [items]',
  'query_embeddings': 'float [queries, dim]; they query the items instead',
  'query_labels': 'integers or texts [queries]',
  'cameras': (
    "integers [items], camera ids; items with the query's label and camera are "
    'ignored'
  ),
  'query_cameras': 'integers [queries], camera ids',
}


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog=prog,
    description=_DESCRIPTION.format(prog=prog),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  for name, text in _FILES.items():
    parser.add_argument(
      f'--{name}',
      required=name in ('embeddings', 'labels'),
      metavar='FILE.npy',
      help=text,
    )
  parser.add_argument(
    '--recall_at',
    type=int,
    nargs='+',
    default=(1, 2, 4, 8),
    metavar='K',
    help='the K of Recall@K (default: 1 2 4 8)',
  )
  parser.add_argument(
    '--precision_at',
    type=int,
    nargs='+',
    default=(),
    metavar='K',
    help='the K of Precision@K and mAP@K (default: none)',
  )
  parser.add_argument(
    '--nearest_only',
    action='store_true',
    help='compute only Recall@K and MRR, which is faster',
  )
  parser.add_argument(
    '--kmeans_iterations',
    type=int,
    default=20,
    help='most k-means iterations; 0 skips clustering (default: 20)',
  )
  parser.add_argument(
    '--kmeans_start',
    choices=('random', 'k-means++'),
    default='random',
    help='initialization of k-means (default: random)',
  )
  parser.add_argument(
    '--kmeans_num_starts',
    type=int,
    default=1,
    help='runs of k-means; the one of least inertia is scored (default: 1)',
  )
  parser.add_argument(
    '--seed',
    type=errors.seed,
    default=0,
    help='seed of k-means and of the bootstrap',
  )
  parser.add_argument(
    '--num_resamples',
    type=int,
    default=1000,
    help='bootstrap resamples of the classes, for the confidence intervals; 0 '
    'skips them (default: 1000)',
  )
  parser.add_argument(
    '--verification',
    action='store_true',
    help='also compare all pairs of items: the equal error rate, and FNMR and '
    'distance threshold at false match rates (FMR) of 10%% to 0.0001%%',
  )
  parser.add_argument(
    '--per_class',
    metavar='FILE.csv',
    help='also write the scores of each class to this file',
  )
  parser.add_argument(
    '--json', metavar='FILE', help='also write the scores to this file'
  )
  return parser.parse_args(arguments)


def _read(arguments: argparse.Namespace) -> dict[str, np.ndarray | None]:
  """Returns the array arguments of `score`; queries follow the gallery."""
  arrays = {}
  for name in ('embeddings', 'labels', 'cameras'):
    path, query_path = (
      getattr(arguments, title) for title in (name, f'query_{name}')
    )
    if bool(query_path) != bool(path and arguments.query_embeddings):
      raise ValueError(
        f'With --query_embeddings, --{name} and --query_{name} must be given '
        'together; without it, --query_* must not be given.'
      )
    parts = [_load(p) for p in (path, query_path) if p]
    arrays[name] = parts[0] if len(parts) == 1 else None
    if len(parts) == 2:
      arrays[name] = _concatenate(name, parts)
      sizes = [len(part) for part in parts]
      is_query = np.repeat([False, True], sizes)
      if not np.array_equal(arrays.setdefault('is_query', is_query), is_query):
        raise ValueError(
          f'{query_path!r} must have as many rows as '
          f'{arguments.query_embeddings!r}; got {sizes[1]}.'
        )
  return arrays


def _concatenate(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
  """Joins arrays whose values NumPy can compare without converting them."""
  are_texts = {part.dtype.kind in 'US' for part in parts}
  if name != 'embeddings' and len(are_texts) > 1:
    raise ValueError(
      f'--{name} and --query_{name} must both be integers or both be texts; '
      f'got {" and ".join(str(part.dtype) for part in parts)}.'
    )
  widths = {part.shape[1:] for part in parts}
  if len(widths) > 1 or not all(part.ndim for part in parts):
    raise ValueError(
      f'--{name} and --query_{name} must have rows of one shape; got '
      f'{" and ".join(str(part.shape) for part in parts)}.'
    )
  try:
    return np.concatenate(parts)
  except TypeError as error:
    raise ValueError(
      f'--{name} and --query_{name} must have types that fit; got '
      f'{" and ".join(str(part.dtype) for part in parts)}.'
    ) from error


def _load(path: str) -> np.ndarray:
  """Maps the array of a .npy file.

  Raises:
    ValueError: if the file is not one, or holds Python objects; names it.
    OSError: if it cannot be opened.
  """
  problem = 'it is not a regular file'
  # The check comes first: opening a pipe may never end.
  if os.path.isfile(path) or not os.path.lexists(path):
    with open(path, 'rb') as file:
      begins = file.read(len(_MAGIC))
    problem = 'it does not begin like one'
    if begins == _MAGIC:
      try:
        return np.load(path, mmap_mode='r')
      # NumPy evaluates the header, which raises many types of errors.
      except Exception as error:
        problem = errors.one_line(error)
  raise ValueError(
    f'{path!r} is not an array file written by numpy.save: {problem}.'
  )


def _write_per_class(scores: Mapping[str, Mapping], path: str) -> None:
  """Writes a row for each class, scores as fractions."""
  columns = ('label', *next(iter(scores.values())))
  with files.write_atomically(path, newline='') as file:
    writer = csv.DictWriter(file, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows({'label': name, **row} for name, row in scores.items())


def main(
  arguments: Sequence[str] | None = None,
  *,
  prog: str = 'python -m proxy_nca_jax.evaluate',
) -> None:
  """Runs the command.

  Args:
    arguments: by default those of the command line.
    prog: the command's name in its --help.
  """
  arguments = _parse(arguments, prog)
  names = (*scores_lib.SETTINGS, 'seed', 'num_resamples')
  with errors.in_one_line():
    arrays = _read(arguments)
    error_rates = {}
    if arguments.verification:
      rates = verification.verify(arrays['embeddings'], arrays['labels'])
      error_rates = {'verification': rates}
    scores = scores_lib.score(
      **arrays,
      **{name: getattr(arguments, name) for name in names},
      per_class=bool(arguments.per_class),
      mesh=mesh_lib.make_mesh(),
    )
    if arguments.per_class:
      _write_per_class(scores.pop('per_class'), arguments.per_class)
    scores |= error_rates
    # First, since printing ends early if the reader of a pipe does.
    if arguments.json:
      with files.write_atomically(arguments.json) as file:
        json.dump(scores, file, indent=2)
    print(scores_lib.format_table({'percent': scores}))
    for name, value in scores.items():
      if isinstance(value, int):
        print(f'{name.replace("_", " ")}: {value:,}')
    if arguments.verification:
      print(verification.format_table(scores['verification']))


if __name__ == '__main__':
  main()
