"""An index: one file with the embeddings of a folder of images.

It is an SQLite database, recognized by its application id. Each batch of images
is one transaction, so that a killed update resumes where it stopped. An image
is embedded again only if its file size or change time has changed: the kernel
sets that time at each write, even where a program restores the modification
time. The index records the digest of its network and rejects embeddings of any
other. File names are escaped, as by `folders.escape`.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import NamedTuple, NoReturn
from urllib import parse

import numpy as np
import tqdm

from proxy_nca_jax.runtime import errors, files, folders

# 2: the file has an application id, and names are escaped.
_VERSION = '2'
_APPLICATION_ID = 0x504E4341  # 'PNCA'
_TABLES = f"""
  BEGIN;
  PRAGMA application_id = {_APPLICATION_ID};
  CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT);
  CREATE TABLE pictures (
    name TEXT PRIMARY KEY, size INTEGER, time INTEGER, embedding BLOB,
    error TEXT
  );
  INSERT INTO about VALUES ('version', '{_VERSION}');
  COMMIT;
"""
# https://www.sqlite.org/fileformat.html#the_database_header
_HEADER, _HEADER_SIZE, _ID_OFFSET = b'SQLite format 3\0', 100, 68
_BATCH_SIZE = 256  # Images per transaction.
_MAX_BYTES = 2**20  # Of an embedding; the largest networks have 8 KiB.


class Counts(NamedTuple):
  """Numbers of images in an update, by what happened to them.

  All but `removed` add up to the number of files in the folder: a file that
  cannot be embedded counts as unreadable only, whether it is new or not.
  """

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
    names: escaped file names relative to `root`, in ascending order.
    embeddings: float32 [num_images, dim], the network's output, not normalized.
  """

  root: str
  workdir: str
  digest: str
  names: tuple[str, ...]
  embeddings: np.ndarray

  @property
  def paths(self) -> list[str]:
    """The path of each image, as `os` takes it."""
    return [
      os.path.join(self.root, folders.unescape(name)) for name in self.names
    ]

  @property
  def escaped_paths(self) -> list[str]:
    """The path of each image, as text."""
    root = folders.escape(self.root)
    return [os.path.join(root, name) for name in self.names]

  @property
  def labels(self) -> list[str]:
    """The escaped folder of each image, relative to `root`."""
    return [os.path.dirname(name) for name in self.names]


def update(
  path: str,
  embedder,
  root: str,
  *,
  workdir: str,
  known_embeddings: Mapping[str, np.ndarray] | None = None,
) -> tuple[Counts, dict[str, str]]:
  """Updates an index to the current files of a folder, or creates it.

  Files that cannot be read as images are recorded with the reason: see
  `read_errors`. The rows of folders that cannot be listed are kept.

  Args:
    path: the index file.
    embedder: an `inference.Embedder`.
    root: the folder of images, searched recursively as by `folders.list_files`.
    workdir: the path that the embedder was loaded from.
    known_embeddings: {escaped path in the folder: float32 [dim]} of files that
      need not be read.

  Returns:
    (counts, skipped): the numbers of images added, changed and so on; {escaped
    path: reason} of what is not a regular file or cannot be listed.

  Raises:
    ValueError: if the folder is missing or empty, or if the index belongs to
      another folder or another network.
  """
  root, workdir = os.path.abspath(root), os.path.abspath(workdir)
  if not os.path.isdir(root):
    raise ValueError(f'No folder {root!r} (--images): name a folder of images.')
  listing = folders.list_files(root)
  if '' in listing.unlisted:
    raise ValueError(
      f'The folder {root!r} (--images) cannot be listed: '
      f'{listing.unlisted[""]}.'
    )
  missing = listing.unlisted | listing.unreachable
  if not listing.files and not missing:
    raise ValueError(f'The folder {root!r} (--images) has no files.')
  files = {
    folders.escape(name): (status.st_size, status.st_ctime_ns)
    for name, status in listing.files.items()
  }
  if not os.path.exists(path):
    _create(path)
  with _open(path, mode='rw') as database:
    _check_about(
      database,
      path,
      {'digest': embedder.digest, 'root': folders.escape(root)},
    )
    # The same network may have moved.
    database.execute(
      "INSERT OR REPLACE INTO about VALUES ('workdir', ?)",
      [folders.escape(workdir)],
    )
    known = {
      name: (size, time)
      for name, size, time in database.execute(
        'SELECT name, size, time FROM pictures'
      )
    }
    _check_texts(path, 'pictures', dict.fromkeys(known, ''))
    kept = {folders.escape(name) for name in missing}
    removed = [
      (name,)
      for name in known.keys() - files.keys()
      if kept.isdisjoint(_with_parents(name))
    ]
    database.executemany('DELETE FROM pictures WHERE name = ?', removed)
    database.commit()
    due = [name for name in files if known.get(name) != files[name]]
    unreadable = {
      name
      for (name,) in database.execute(
        'SELECT name FROM pictures WHERE error IS NOT NULL'
      )
    }
    unreadable = (unreadable & files.keys()) - set(due)
    with tqdm.tqdm(total=len(due), unit=' images', disable=None) as bar:
      for begin in range(0, len(due), _BATCH_SIZE):
        names = due[begin : begin + _BATCH_SIZE]
        rows = _embed(embedder, root, names, known_embeddings or {})
        database.executemany(
          'INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?)',
          [
            (name, *files[name], embedding, error)
            for name, (embedding, error) in zip(names, rows)
          ],
        )
        database.commit()
        unreadable |= {
          name for name, (_, error) in zip(names, rows) if error is not None
        }
        bar.update(len(names))
    added, unchanged = files.keys() - known.keys(), files.keys() - set(due)
    counts = Counts(
      added=len(added - unreadable),
      changed=len(set(due) - added - unreadable),
      removed=len(removed),
      unchanged=len(unchanged - unreadable),
      unreadable=len(unreadable),
    )
  reasons = listing.skipped | {
    name: f'{reason}; its images are kept in the index'
    for name, reason in missing.items()
  }
  return counts, {folders.escape(name): why for name, why in reasons.items()}


def _with_parents(name: str) -> list[str]:
  """Returns a name and the folders that contain it: a/b/c, a/b and a."""
  parts = name.split(os.sep)
  return [os.sep.join(parts[:end]) for end in range(len(parts), 0, -1)]


def _embed(
  embedder,
  root: str,
  names: Sequence[str],
  known_embeddings: Mapping[str, np.ndarray],
) -> list[tuple[bytes | None, str | None]]:
  """Embeds files; returns (float32 bytes, None) or (None, error) for each."""

  def read_image(name):
    if name in known_embeddings:
      return None, None
    try:
      return embedder.read(os.path.join(root, folders.unescape(name))), None
    except (ValueError, OSError, MemoryError) as error:
      return None, errors.one_line(error)

  with futures.ThreadPoolExecutor() as pool:
    images, reasons = zip(*pool.map(read_image, names))
  readable = [image for image in images if image is not None]
  embeddings = iter(embedder.embed(np.stack(readable)) if readable else ())

  def row(name, reason):
    if reason:
      return None, reason
    known = known_embeddings.get(name)
    embedding = next(embeddings) if known is None else known
    return embedding.astype('<f4').tobytes(), None

  return [row(name, reason) for name, reason in zip(names, reasons)]


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
  _check_texts(path, 'about', about)
  for field in ('root', 'workdir', 'digest'):
    if field not in about:
      _fail_damaged(path, f'it does not say its {field}')
  names, blobs = zip(*rows)
  _check_texts(path, 'pictures', dict.fromkeys(names, ''))
  sizes = {len(blob) if isinstance(blob, bytes) else -1 for blob in blobs}
  if len(sizes) > 1 or not sizes <= set(range(4, _MAX_BYTES, 4)):
    _fail_damaged(path, 'its embeddings are not float32 vectors of one length')
  embeddings = np.frombuffer(b''.join(blobs), '<f4').reshape(len(names), -1)
  if not np.isfinite(embeddings).all():
    _fail_damaged(path, 'some of its embeddings are not finite')
  return Content(
    root=folders.unescape(about['root']),
    workdir=folders.unescape(about['workdir']),
    digest=about['digest'],
    names=names,
    embeddings=embeddings.astype(np.float32),
  )


def _check_texts(path: str, table: str, texts: Mapping[str, str]) -> None:
  """Raises ValueError if keys or values are of another type of SQLite."""
  for pair in texts.items():
    if not all(isinstance(text, str) for text in pair):
      _fail_damaged(path, f'its table {table} has {pair[0]!r:.40}, not a text')


def _fail_damaged(path: str, problem: str) -> NoReturn:
  raise ValueError(
    f'The index {path!r} is damaged: {problem}. Delete it, and create it again '
    'with `index`.'
  )


def read_errors(path: str) -> list[tuple[str, str]]:
  """Returns (name, reason) of each file that could not be embedded."""
  with _open(path) as database:
    rows = database.execute(
      'SELECT name, error FROM pictures WHERE error IS NOT NULL ORDER BY name'
    ).fetchall()
  _check_texts(path, 'pictures', dict(rows))
  return rows


def _create(path: str) -> None:
  """Creates an empty index, which appears once it has its application id."""
  with files.write_atomically(path, 'wb') as file:
    try:
      with contextlib.closing(sqlite3.connect(file.name)) as database:
        database.executescript(_TABLES)
    except sqlite3.Error as error:
      raise OSError(
        f'Cannot write {path!r}: {errors.one_line(error)}.'
      ) from error


@contextlib.contextmanager
def _open(path: str, *, mode: str = 'ro') -> Iterator[sqlite3.Connection]:
  """Opens an index.

  Args:
    path: the index file.
    mode: 'ro' to read, or 'rw' to update.

  Raises:
    ValueError: if the file does not exist, or is not an index of this version.
      Nothing has been written to it then, not even by SQLite.
  """
  if not os.path.isfile(path):
    raise ValueError(f'No index {path!r}: create it with `index`.')
  with open(path, 'rb') as file:
    header = file.read(_HEADER_SIZE)
  application_id = header[_ID_OFFSET : _ID_OFFSET + 4]
  if (
    not header.startswith(_HEADER)
    or int.from_bytes(application_id, 'big') != _APPLICATION_ID
  ):
    raise ValueError(
      f'{path!r} is not a valid index, or one of an earlier version of this '
      'program: name another file, or delete it and create it with `index`.'
    )
  url = f'file:{parse.quote(os.fsencode(os.path.abspath(path)))}?mode={mode}'
  try:
    with contextlib.closing(sqlite3.connect(url, uri=True)) as database:
      saved = dict(database.execute('SELECT name, value FROM about'))
      if saved.get('version') != _VERSION:
        raise ValueError(
          f'The index {path!r} has version {saved.get("version")!r}, and this '
          f'program reads version {_VERSION!r}: create it again with `index`, '
          'under another name.'
        )
      yield database
  except sqlite3.Error as error:
    hint = ''
    if os.path.exists(f'{path}-journal'):
      hint = ' Its last update was interrupted: start `index` again.'
    raise ValueError(
      f'{path!r} is not a valid index: {errors.one_line(error)}.{hint}'
    ) from error


def _check_about(database, path: str, about: dict[str, str]) -> None:
  """Records what an index belongs to; ValueError if to something else."""
  saved = dict(database.execute('SELECT name, value FROM about'))
  _check_texts(path, 'about', saved)
  meanings = {
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
