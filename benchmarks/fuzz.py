"""Damages files and configs at random, and checks what happens to their reader.

python benchmarks/fuzz.py --seconds=300

Every reader must succeed, or end in one line on stderr and exit status 2, and
leave the file as it is. Everything else is a failure: a traceback, several
lines, a hang, a crash, too much memory, or a changed file. Cases run in child
processes with a limit of memory and time. The last table has, for each kind,
the number of cases by outcome, and the seeds that reproduce the failures:

python benchmarks/fuzz.py --kind=images --seed=123 --cases=1
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import multiprocessing
import os
import pathlib
import random
import resource
import sqlite3
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors import numpy as safetensors

_ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(_ROOT))

from proxy_nca_jax import configuration, images
from proxy_nca_jax.configs import default
from proxy_nca_jax.evaluate import __main__ as evaluate_main
from proxy_nca_jax.models import pretrained
from proxy_nca_jax.report import __main__ as comparison
from proxy_nca_jax.runtime import errors
from proxy_nca_jax.search import index as index_lib

# A case that takes longer is a hang; the slowest decoders take 2 seconds.
_LIMIT_SECONDS = 30
# Beyond what the libraries take: an image at `images.MAX_PIXELS` takes 1 GiB.
_LIMIT_BYTES = 4 * 2**30
# Cases of a child process, which takes a tenth of a second to start.
_CASES_PER_CHILD = 50
_BYTES = (b'\0', b'\xff', b'\x80', b'\x7f', b'\x01')
_MODES = ('RGB', 'L', 'P', 'RGBA', '1', 'I;16', 'CMYK', 'LA')
_ORIENTATION = 0x0112

# Values of JSON and of configs that are wrong somewhere.
_VALUES = (
  None,
  True,
  0,
  -1,
  2**31,
  10**400,
  0.5,
  -0.0,
  1e308,
  float('nan'),
  float('inf'),
  '',
  'a',
  '\ud800',
  'x' * 10**5,
  [],
  [1, 'a', None],
  {},
  {'a': {'b': 1}},
)


class Kind(NamedTuple):
  """What is damaged.

  Attributes:
    make: returns {file name: content} of valid files, given a generator.
    read: reads the files in a folder, as the commands do.
  """

  make: Callable[[random.Random], dict[str, bytes]]
  read: Callable[[pathlib.Path], object]


def damage(content: bytes, rng: random.Random, other: bytes = b'') -> bytes:
  """Flips bits, truncates, repeats, or splices the head of another file."""
  content = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 5, 20))):
    # Most formats have their structure in the first bytes.
    end = max(min(len(content), rng.choice((16, 64, 512, 10**9))), 1)
    position = rng.randrange(end)
    what = rng.random()
    if what < 0.4 and content:
      content[position] ^= 1 << rng.randrange(8)
    elif what < 0.7:
      content[position : position + 1] = rng.choice(_BYTES)
    elif what < 0.8:
      del content[position:]
    elif what < 0.9:
      length = rng.randrange(1, 64)
      content[position:position] = content[position : position + length]
    else:
      content[:position] = other[:position]
  return bytes(content)


def damage_json(tree: object, rng: random.Random) -> object:
  """Returns a copy with one value replaced, removed or moved."""
  tree = copy.deepcopy(tree)
  node = tree
  while isinstance(node, dict | list) and node:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = rng.choice(keys)
    if not isinstance(node[key], dict | list) or rng.random() < 0.3:
      if rng.random() < 0.2:
        del node[key]
      else:
        node[key] = rng.choice(_VALUES)
      break
    node = node[key]
  return tree


def _make_image(rng: random.Random) -> dict[str, bytes]:
  pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
  while True:
    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    options = {}
    if rng.random() < 0.3:
      exif = Image.Exif()
      exif[_ORIENTATION], exif[282] = rng.randrange(10), 1.5
      options['exif'] = exif.tobytes()
    # Not every format has every mode, or can be written.
    with contextlib.suppress(Exception):
      format_ = rng.choice(images.FORMATS)
      image.convert(rng.choice(_MODES)).save(buffer, format_, **options)
      return {'image': buffer.getvalue()}


def _tensors() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    'conv1.weight': rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
    'bn1.running_var': np.ones(4, np.float32),
    'bn1.num_batches_tracked': np.array(5),
  }


def _make_safetensors(rng: random.Random) -> dict[str, bytes]:
  del rng
  return {'weights.safetensors': safetensors.save(_tensors())}


def _make_npz(rng: random.Random) -> dict[str, bytes]:
  buffer = io.BytesIO()
  save = rng.choice((np.savez, np.savez_compressed))
  save(buffer, **{'embedding/kernel': np.ones((2, 2, 3, 4), np.float32)})
  return {'weights.npz': buffer.getvalue()}


def _make_pth(rng: random.Random) -> dict[str, bytes]:
  # Files that torch wrote in both of its formats.
  path = _ROOT / 'tests' / 'originals' / f'{rng.choice(("zip", "stream"))}.pth'
  return {'weights.pth': path.read_bytes()}


def _read_weights(folder: pathlib.Path) -> None:
  for path in folder.iterdir():
    pretrained.read_weights(str(path))


def _make_npy(rng: random.Random) -> dict[str, bytes]:
  array = np.random.default_rng(0).normal(size=(12, 4))
  kinds = ('f4', 'f8', 'f2', '>f4', 'i8', 'U5', 'S3', 'M8[s]', 'c8', 'O')
  array = array.astype(rng.choice(kinds), order=rng.choice('CF'))
  buffer = io.BytesIO()
  np.save(buffer, array)
  return {'x.npy': buffer.getvalue()}


def _make_index(rng: random.Random) -> dict[str, bytes]:
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'index')
    index_lib._create(path)
    with contextlib.closing(sqlite3.connect(path)) as database:
      about = {'digest': 'a', 'root': '/a', 'workdir': '/b'}
      database.executemany('INSERT INTO about VALUES (?, ?)', about.items())
      database.executemany(
        'INSERT INTO pictures VALUES (?, ?, ?, ?, ?)',
        [
          (f'{i}.png', 1, 2, np.ones(8, '<f4').tobytes(), None)
          for i in range(40)
        ]
        + [('bad.png', 1, 2, None, 'no image')],
      )
      if rng.random() < 0.5:
        _damage_rows(database, rng)
      database.commit()
    return {'index': pathlib.Path(path).read_bytes()}


def _damage_rows(database: sqlite3.Connection, rng: random.Random) -> None:
  table, columns = rng.choice(
    (
      ('about', ('name', 'value')),
      ('pictures', ('name', 'size', 'time', 'embedding', 'error')),
    )
  )
  value = rng.choice((None, 1, 0.5, 'text', b'', b'\xff\xfe', b'\0' * 12))
  where = rng.choice(('1', 'rowid = 1', 'rowid > 20'))
  # A name may exist already.
  with contextlib.suppress(sqlite3.IntegrityError):
    database.execute(
      f'UPDATE {table} SET {rng.choice(columns)} = ? WHERE {where}', [value]
    )


def _read_index(folder: pathlib.Path) -> None:
  content = index_lib.read(str(folder / 'index'))
  for rows in (content.paths, content.escaped_paths, content.labels):
    assert len(rows) == len(content.embeddings)
  index_lib.read_errors(str(folder / 'index'))


def _run_files() -> dict[str, object]:
  config = configuration.as_json(default.get_config())
  config['dataset']['name'] = 'glyphs'
  scores = {'recall@1': 0.5, 'num_queries': 3, 'queries_without_match': 0}
  return {
    'run.json': {
      'config': config,
      'dataset_digest': 'a',
      'weights_digest': None,
      'class_names': ['a', 'b'],
    },
    'results.json': {
      'trained': scores | {'intervals': {'recall@1': [0.4, 0.6]}},
      'untrained': scores,
      'step': 4,
      'versions': {'jax': '1'},
      'devices': '1 x cpu',
      'dataset': {'digest': 'a', 'test': {'classes': 3, 'images': 4}},
    },
    'metrics.jsonl': [
      {'step': step, 'loss': 0.5, 'test.recall@1': 0.5} for step in range(3)
    ],
  }


def _make_run(rng: random.Random) -> dict[str, bytes]:
  files, damaged = _run_files(), rng.choice(list(_run_files()))
  if rng.random() < 0.8:
    files[damaged] = damage_json(files[damaged], rng)
  rows = files.pop('metrics.jsonl')
  texts = {name: json.dumps(content) for name, content in files.items()}
  texts['metrics.jsonl'] = ''.join(f'{json.dumps(row)}\n' for row in rows)
  return {name: text.encode() for name, text in texts.items()}


def _read_run(folder: pathlib.Path) -> None:
  comparison.compare([str(folder)])


def _make_config(rng: random.Random) -> dict[str, bytes]:
  name = rng.choice(list(configuration.FIELDS))
  value = rng.choice(_VALUES)
  return {'field': json.dumps([name, value]).encode()}


def _read_config(folder: pathlib.Path) -> None:
  config = default.get_config()
  config.dataset.name = 'glyphs'
  name, value = json.loads((folder / 'field').read_bytes())
  value = tuple(value) if isinstance(value, list) else value
  # The command line turns whatever ml_collections raises into a line.
  try:
    config.update_from_flattened_dict({name: value})
  except Exception as error:
    raise ValueError(errors.one_line(error)) from error
  configuration.check(config)


KINDS = {
  'images': Kind(
    _make_image,
    lambda folder: images.decode((folder / 'image').read_bytes()),
  ),
  '.safetensors': Kind(_make_safetensors, _read_weights),
  '.npz': Kind(_make_npz, _read_weights),
  '.pth': Kind(_make_pth, _read_weights),
  '.npy': Kind(
    _make_npy,
    lambda folder: evaluate_main._load(str(folder / 'x.npy')),
  ),
  'indexes': Kind(_make_index, _read_index),
  'runs': Kind(_make_run, _read_run),
  'configs': Kind(_make_config, _read_config),
}
# Fraction of the cases whose bytes are damaged, if not all: the values of these
# kinds are damaged already.
_FRACTION_DAMAGED = {'configs': 0, 'indexes': 0.4, 'runs': 0.4}


def run_case(name: str, seed: int) -> str:
  """Damages a file of a kind and reads it.

  Returns:
    'succeeded', 'refused', or what went wrong.
  """
  rng, kind = random.Random(f'{name} {seed}'), KINDS[name]
  contents = kind.make(rng)
  if rng.random() < _FRACTION_DAMAGED.get(name, 1):
    damaged = rng.choice(sorted(contents))
    other = kind.make(rng)
    contents[damaged] = damage(
      contents[damaged], rng, rng.choice(list(other.values()))
    )
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root, 'case')
    folder.mkdir()
    for file_name, content in contents.items():
      (folder / file_name).write_bytes(content)
    outcome = _read(kind, folder)
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    if left != contents:
      return f'changed files: {sorted(left)}'
  return outcome


def _read(kind: Kind, folder: pathlib.Path) -> str:
  printed = io.StringIO()
  try:
    with contextlib.redirect_stderr(printed), warnings.catch_warnings():
      warnings.simplefilter('ignore')
      with errors.in_one_line():
        kind.read(folder)
    return 'succeeded'
  except SystemExit as error:
    lines = printed.getvalue().splitlines()
    # Longer lines repeat the input instead of describing it.
    is_line = len(lines) == 1 and len(lines[0]) < 2000
    if error.code == 2 and is_line and lines[0].startswith('Error: '):
      return 'refused'
    shown = printed.getvalue()[:200]
    return f'status {error.code}, {len(lines)} lines: {shown}'
  except BaseException as error:
    return f'{type(error).__name__}: {errors.one_line(error)}'


def _run_cases(name: str, seeds: list[int], connection) -> None:
  """Runs cases in a child process; sends the outcome of each."""
  with open('/proc/self/statm') as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
  limit = size + _LIMIT_BYTES
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  for seed in seeds:
    connection.send(run_case(name, seed))


def run_in_child(name: str, seeds: list[int]) -> list[str]:
  """Runs cases in a child process until one crashes or hangs.

  Returns:
    The outcomes, one for each case that was begun.
  """
  context = multiprocessing.get_context('fork')
  ours, theirs = context.Pipe(duplex=False)
  child = context.Process(target=_run_cases, args=(name, seeds, theirs))
  child.start()
  theirs.close()
  outcomes = []
  with contextlib.suppress(EOFError):
    while len(outcomes) < len(seeds):
      if not ours.poll(_LIMIT_SECONDS):
        outcomes.append(f'hangs: no end in {_LIMIT_SECONDS} seconds')
        break
      outcomes.append(ours.recv())
  if len(outcomes) < len(seeds):
    child.join(_LIMIT_SECONDS / 10)
  child.kill()
  child.join()
  has_hung = outcomes and outcomes[-1].startswith('hangs')
  if len(outcomes) < len(seeds) and not has_hung:
    outcomes.append(f'the process ended with {child.exitcode}')
  return outcomes


def fuzz(
  kinds: list[str],
  *,
  seconds: float,
  seed: int,
  cases: int | None = None,
  run: Callable[[str, list[int]], list[str]] = run_in_child,
  cases_per_call: int = _CASES_PER_CHILD,
) -> dict[str, collections.Counter]:
  """Runs cases of all kinds in turn.

  Args:
    kinds: names of `KINDS`.
    seconds: no case is begun later than this.
    seed: the seed of the first case of each kind; it grows by 1.
    cases: the number of cases of each kind; None for no limit.
    run: runs cases of a kind and returns their outcomes.
    cases_per_call: how many cases `run` is given.

  Returns:
    {kind: {outcome: number of cases}}; failures begin with their seed.
  """
  end = time.monotonic() + seconds
  counts = {name: collections.Counter() for name in kinds}
  due = dict.fromkeys(kinds, seed)
  while time.monotonic() < end:
    for name in kinds:
      left = cases_per_call
      if cases is not None:
        left = min(left, seed + cases - due[name])
      if left < 1:
        continue
      seeds = list(range(due[name], due[name] + left))
      for number, outcome in zip(seeds, run(name, seeds)):
        due[name] = number + 1
        if outcome not in ('succeeded', 'refused'):
          outcome = f'seed {number}: {outcome}'
          print(f'{name}, {outcome}', file=sys.stderr)
        counts[name][outcome] += 1
    if cases is not None and all(due[name] >= seed + cases for name in kinds):
      break
  return counts


def table(counts: dict[str, collections.Counter]) -> str:
  """Formats the counts: a row for each kind, with the seeds of failures."""
  rows = [('kind', 'tried', 'succeeded', 'refused', 'failed', 'seeds')]
  for name, outcomes in counts.items():
    failures = [key for key in outcomes if key.startswith('seed ')]
    seeds = [key.split()[1].rstrip(':') for key in failures]
    rows.append(
      (
        name,
        f'{outcomes.total():,}',
        f'{outcomes["succeeded"]:,}',
        f'{outcomes["refused"]:,}',
        f'{len(failures):,}',
        ' '.join(seeds[:10]),
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join(
    '  '.join(text.ljust(width) for text, width in zip(row, widths)).rstrip()
    for row in rows
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--seconds', type=float, default=60)
  parser.add_argument('--seed', type=int, default=0, help='of the first case')
  parser.add_argument('--cases', type=int, help='of each kind; default: all')
  parser.add_argument('--kind', choices=KINDS, help='default: all of them')
  arguments = parser.parse_args()
  counts = fuzz(
    [arguments.kind] if arguments.kind else list(KINDS),
    seconds=arguments.seconds,
    seed=arguments.seed,
    cases=arguments.cases,
  )
  print(table(counts))
  has_failed = any(
    key.startswith('seed ') for outcomes in counts.values() for key in outcomes
  )
  sys.exit(1 if has_failed else 0)


if __name__ == '__main__':
  main()
