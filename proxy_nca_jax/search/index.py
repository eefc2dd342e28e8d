"""An index: one file with the embeddings of a folder of images.

It is an SQLite database. Each batch of images is one transaction, so that a
killed update resumes where it stopped. An image is embedded again only if its
file size or modification time has changed. The index records the digest of its
network and rejects embeddings of any other.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
import tqdm

from proxy_nca_jax.runtime import errors

_VERSION = '1'
_TABLES = """
  CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT);
  CREATE TABLE IF NOT EXISTS pictures (
    name TEXT PRIMARY KEY, size INTEGER, time INTEGER, embedding BLOB,
    error TEXT
  );
"""
_BATCH_SIZE = 256  # Images per transaction.


class Counts(NamedTuple):
  """Numbers of images in an update, by what happened to them."""

  added: int
  changed: int
  removed: int
  unchanged: int
  unreadable: int


class Content(NamedTuple):
  """The content of an index.

  Attributes:
    root: the folder of the images.
    workdir: the workdir of the run, or the saved embedder, that embedded them.
    digest: the digest of that embedder.
    names: file names relative to `root`, in ascending order.
    embeddings: float32 [num_images, dim], the network's output, not normalized.
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
    """The folder of each image, relative to `root`."""
    return [os.path.dirname(name) for name in self.names]


def update(path: str, embedder, root: str, *, workdir: str) -> Counts:
  """Updates an index to the current files of a folder, or creates it.

  Files that cannot be read as images are recorded with the reason: see
  `read_errors`.

  Args:
    path: the index file.
    embedder: an `inference.Embedder`.
    root: the folder of images, searched recursively without hidden files.
    workdir: the path that the embedder was loaded from.

  Returns:
    The numbers of images added, changed and so on.

  Raises:
    ValueError: if the folder is missing or empty, or if the index belongs to
      another folder or another network.
  """
  root, workdir = os.path.abspath(root), os.path.abspath(workdir)
  if not os.path.isdir(root):
    raise ValueError(f'No folder {root!r} (--images): name a folder of images.')
  files = dict(_list_files(root))
  if not files:
    raise ValueError(f'The folder {root!r} (--images) has no files.')
  with _open(path, is_new=not os.path.exists(path)) as database:
    _check_about(
      database,
      path,
      {'version': _VERSION, 'digest': embedder.digest, 'root': root},
    )
    # The same network may have moved.
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
    num_unreadable = 0
    with tqdm.tqdm(total=len(due), unit=' images', disable=None) as bar:
      for begin in range(0, len(due), _BATCH_SIZE):
        names = due[begin : begin + _BATCH_SIZE]
        rows = _embed(embedder, root, names)
        database.executemany(
          'INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?)',
          [
            (name, *files[name], embedding, error)
            for name, (embedding, error) in zip(names, rows)
          ],
        )
        database.commit()
        num_unreadable += sum(error is not None for _, error in rows)
        bar.update(len(names))
    num_added = len(files.keys() - known.keys())
    return Counts(
      added=num_added,
      changed=len(due) - num_added,
      removed=len(removed),
      unchanged=len(files) - len(due),
      unreadable=num_unreadable,
    )


def _embed(
  embedder, root: str, names: Sequence[str]
) -> list[tuple[bytes | None, str | None]]:
  """Embeds files; returns (float32 bytes, None) or (None, error) for each."""

  def read_image(name):
    try:
      return embedder.read(os.path.join(root, name)), None
    except (ValueError, OSError) as error:
      return None, errors.one_line(error)

  with futures.ThreadPoolExecutor() as pool:
    images, reasons = zip(*pool.map(read_image, names))
  readable = [image for image in images if image is not None]
  embeddings = iter(embedder.embed(np.stack(readable)) if readable else ())
  return [
    (None, reason)
    if reason
    else (next(embeddings).astype('<f4').tobytes(), None)
    for reason in reasons
  ]


def read(path: str) -> Content:
  """Reads an index.

  Raises:
    ValueError: if it does not exist, or has no embeddings.
  """
  with _open(path) as database:
    about = dict(database.execute('SELECT name, value FROM about'))
    rows = database.execute(
      'SELECT name, embedding FROM pictures WHERE error IS NULL ORDER BY name'
    ).fetchall()
  if not rows:
    raise ValueError(
      f'The index {path!r} has no images: update it with `index`.'
    )
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
    raise ValueError(f'No index {path!r}: create it with `index`.')
  try:
    with contextlib.closing(sqlite3.connect(path)) as database:
      database.executescript(_TABLES)
      yield database
  except sqlite3.Error as error:
    raise ValueError(
      f'{path!r} is not a valid index: {errors.one_line(error)}.'
    ) from error


def _check_about(database, path: str, about: dict[str, str]) -> None:
  """Records what an index belongs to; ValueError if to something else."""
  saved = dict(database.execute('SELECT name, value FROM about'))
  meanings = {
    'version': 'another version of this program',
    'digest': 'another network',
    'root': f'another folder, {saved.get("root")!r}',
  }
  for name, value in about.items():
    if saved.get(name, value) != value:
      raise ValueError(
        f'The index {path!r} belongs to {meanings[name]}: name another file, '
        'or delete this one.'
      )
  database.executemany(
    'INSERT OR REPLACE INTO about VALUES (?, ?)', about.items()
  )
  database.commit()


def _list_files(root: str) -> Iterator[tuple[str, tuple[int, int]]]:
  """Yields (name relative to root, (size, modification time)), in order."""
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(name for name in folders if not name.startswith('.'))
    for name in sorted(names):
      path = os.path.join(folder, name)
      # `os.path.exists` is False for a dangling link.
      if not name.startswith('.') and os.path.exists(path):
        status = os.stat(path)
        yield os.path.relpath(path, root), (status.st_size, status.st_mtime_ns)
