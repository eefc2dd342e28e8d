"""An index: one file with the embeddings of a folder of pictures.

It is an SQLite database. Each batch of pictures is one transaction, so that a
killed update goes on where it was; a picture is embedded again only if its size
or its time has changed. It knows which network its embeddings are of, and takes
none of another.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
import tqdm

from proxy_nca_jax.runtime import errors as errors_lib

_VERSION = '1'
_TABLES = """
  CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT);
  CREATE TABLE IF NOT EXISTS pictures (
    name TEXT PRIMARY KEY, size INTEGER, time INTEGER, embedding BLOB,
    error TEXT
  );
"""
# Pictures looked at before the bar moves.
_BATCH = 256


class Counts(NamedTuple):
  """What an update did, in pictures."""

  added: int
  changed: int
  removed: int
  unchanged: int
  unreadable: int


class Content(NamedTuple):
  """What an index holds.

  Attributes:
    root: the folder of the pictures.
    workdir: of the run, or the saved embedder, whose embeddings these are.
    digest: of that embedder.
    names: of the pictures, relative to the folder, in order.
    embeddings: float32 [number, dim], as the network gives them.
  """

  root: str
  workdir: str
  digest: str
  names: tuple[str, ...]
  embeddings: np.ndarray

  @property
  def paths(self) -> list[str]:
    return [os.path.join(self.root, name) for name in self.names]

  @property
  def labels(self) -> list[str]:
    """The folder of each picture, relative to the root."""
    return [os.path.dirname(name) for name in self.names]


def update(path: str, embedder, root: str, *, workdir: str) -> Counts:
  """Brings an index up to date with a folder; makes it if there is none.

  Files that are no pictures are kept by their reason: see `read_errors`.

  Args:
    path: of the index.
    embedder: of `inference.load`.
    root: the folder; all files in it and below count, but hidden ones.
    workdir: where the embedder was loaded from.

  Raises:
    ValueError: if the folder is missing or has no file, or the index is of
      another folder or another network.
  """
  root, workdir = os.path.abspath(root), os.path.abspath(workdir)
  if not os.path.isdir(root):
    raise ValueError(f'No folder {root!r} (--images): name one of pictures.')
  files = dict(_list_files(root))
  if not files:
    raise ValueError(f'There is no file in {root!r} (--images).')
  with _open(path, is_new=not os.path.exists(path)) as database:
    _check_about(
      database,
      path,
      {'version': _VERSION, 'digest': embedder.digest, 'root': root},
    )
    # Where the same network lies may change.
    database.execute(
      'INSERT OR REPLACE INTO about VALUES ("workdir", ?)', [workdir]
    )
    known = {
      name: (size, time)
      for name, size, time in database.execute(
        'SELECT name, size, time FROM pictures'
      )
    }
    removed = [(name,) for name in known.keys() - files.keys()]
    database.executemany('DELETE FROM pictures WHERE name = ?', removed)
    database.commit()
    due = [name for name in files if known.get(name) != files[name]]
    unreadable = 0
    with tqdm.tqdm(total=len(due), unit=' pictures', disable=None) as bar:
      for begin in range(0, len(due), _BATCH):
        names = due[begin : begin + _BATCH]
        rows = _embed(embedder, root, names)
        database.executemany(
          'INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?)',
          [
            (name, *files[name], embedding, error)
            for name, (embedding, error) in zip(names, rows)
          ],
        )
        database.commit()
        unreadable += sum(error is not None for _, error in rows)
        bar.update(len(names))
    added = len(files.keys() - known.keys())
    return Counts(
      added=added,
      changed=len(due) - added,
      removed=len(removed),
      unchanged=len(files) - len(due),
      unreadable=unreadable,
    )


def _embed(
  embedder, root: str, names: Sequence[str]
) -> list[tuple[bytes | None, str | None]]:
  """Returns (embedding, None) or (None, why not) of each file."""

  def read_picture(name):
    try:
      return embedder.read(os.path.join(root, name)), None
    except (ValueError, OSError) as error:
      return None, errors_lib.one_line(error)

  with futures.ThreadPoolExecutor() as pool:
    pictures, errors = zip(*pool.map(read_picture, names))
  readable = [picture for picture in pictures if picture is not None]
  embeddings = iter(embedder.embed(np.stack(readable)) if readable else ())
  return [
    (None, error) if error else (next(embeddings).astype('<f4').tobytes(), None)
    for error in errors
  ]


def read(path: str) -> Content:
  """Reads an index.

  Raises:
    ValueError: if there is none, or it holds no embedding.
  """
  with _open(path) as database:
    about = dict(database.execute('SELECT name, value FROM about'))
    rows = database.execute(
      'SELECT name, embedding FROM pictures WHERE error IS NULL ORDER BY name'
    ).fetchall()
  if not rows:
    raise ValueError(f'The index {path!r} holds no picture: update it.')
  names, blobs = zip(*rows)
  embeddings = np.frombuffer(b''.join(blobs), '<f4').reshape(len(names), -1)
  return Content(
    root=about['root'],
    workdir=about['workdir'],
    digest=about['digest'],
    names=names,
    embeddings=embeddings.astype(np.float32),
  )


def read_errors(path: str) -> list[tuple[str, str]]:
  """Returns (name, reason) of each file that could not be embedded."""
  with _open(path) as database:
    return database.execute(
      'SELECT name, error FROM pictures WHERE error IS NOT NULL ORDER BY name'
    ).fetchall()


@contextlib.contextmanager
def _open(path: str, *, is_new: bool = False) -> Iterator[sqlite3.Connection]:
  if not is_new and not os.path.isfile(path):
    raise ValueError(f'There is no index {path!r}: make it with `index`.')
  try:
    with contextlib.closing(sqlite3.connect(path)) as database:
      database.executescript(_TABLES)
      yield database
  except sqlite3.Error as error:
    raise ValueError(
      f'{path!r} cannot be used as an index: {error}.'
    ) from error


def _check_about(database, path: str, about: dict[str, str]) -> None:
  """Writes what an index is of, or raises ValueError if it is of another."""
  saved = dict(database.execute('SELECT name, value FROM about'))
  meanings = {
    'version': 'another version of this program',
    'digest': 'another network',
    'root': f'another folder, {saved.get("root")!r}',
  }
  for name, value in about.items():
    if saved.get(name, value) != value:
      raise ValueError(
        f'The index {path!r} is of {meanings[name]}: name another file, or '
        'delete this one.'
      )
  database.executemany(
    'INSERT OR REPLACE INTO about VALUES (?, ?)', about.items()
  )
  database.commit()


def _list_files(root: str) -> Iterator[tuple[str, tuple[int, int]]]:
  """Yields (name relative to root, (size, time)), in order."""
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(name for name in folders if not name.startswith('.'))
    for name in sorted(names):
      path = os.path.join(folder, name)
      # A dangling link is no file.
      if not name.startswith('.') and os.path.exists(path):
        status = os.stat(path)
        yield os.path.relpath(path, root), (status.st_size, status.st_mtime_ns)
