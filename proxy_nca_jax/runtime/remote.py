"""Workdirs on object storage: a leased remote folder with a local copy.

Any URL that fsspec opens is valid, such as gs:// with gcsfs or s3:// with
s3fs. A run downloads the folder, works in the local copy, and uploads changed
files unmodified. Each upload ends with manifest.json, the list of files that
belong together. Only listed files are downloaded, so that an interrupted upload
of a checkpoint is never mistaken for a complete one.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures

import fsspec
from fsspec.implementations import local

from proxy_nca_jax.runtime import errors, files, saved_json

# How long a killed run blocks the workdir. A run that cannot reach the storage
# for as long may lose its lease.
LEASE_SECONDS = 120.0

_MANIFEST, _LEASE = 'manifest.json', 'lease.json'
# Names of incomplete files, which their writers rename when they are complete.
_UNFINISHED = ('.tmp', '.orbax-checkpoint-tmp')

_logger = logging.getLogger(__name__)


class LeaseLost(ValueError):
  """Another run has taken over the lease that this one held."""


class Lease:
  """An expiring lock for storage that has no locks of its own.

  The lease is an object that holds its owner, the time of its last renewal and
  its duration. A live owner renews it four times per duration; the lease of a
  killed owner expires and can be taken over. The clocks of the machines must
  agree to well within the duration.

  Object storage has no atomic read-and-write, so two owners that start at the
  same moment may both write. The last writer wins: each reads the lease again
  after a pause, and before any write that it protects (`renew`).

  Attributes:
    owner: host, process id and a random suffix.
    note: a log message if the lease was taken over from another owner, or ''.
  """

  def __init__(self, storage, path: str, *, seconds: float):
    """Creates a lease that is held while in its context.

    Args:
      storage: an fsspec file system.
      path: the path of the lease object in `storage`.
      seconds: how long the lease lasts without a renewal.
    """
    self._storage, self._path, self._seconds = storage, path, seconds
    self.note = ''
    self.owner = f'{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}'
    self._renewing, self._ended = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

  def __enter__(self) -> 'Lease':
    """Acquires the lease.

    Raises:
      BlockingIOError: if another owner holds it; the message names the owner.
    """
    held = self._read()
    if held is not None:
      left = held['renewed'] + held['seconds'] - time.time()
      if left > 0:
        raise BlockingIOError(
          f'{held["owner"]}, whose lease expires in {left:.0f} s unless renewed'
        )
      self.note = (
        f'Taking over from {held["owner"]}, whose lease expired {-left:.0f} s '
        'ago.'
      )
    self._write()
    time.sleep(self._seconds / 60)
    held = self._read()
    if held is None or held['owner'] != self.owner:
      raise BlockingIOError(
        held['owner'] if held else 'a run that has just ended'
      )
    self._thread.start()
    return self

  def __exit__(self, *exception) -> None:
    self._ended.set()
    self._thread.join()
    try:
      held = self._read()
      if held is not None and held['owner'] == self.owner:
        self._storage.rm_file(self._path)
    except Exception as error:  # Storage clients raise many types.
      _logger.warning('Could not release the lease: %s', error)

  def renew(self) -> None:
    """Verifies the lease and extends it by its full duration.

    Raises:
      LeaseLost: if another run has taken it over, or someone has removed it.
    """
    with self._renewing:
      held = self._read()
      if held is None or held['owner'] != self.owner:
        raise LeaseLost(
          f'The lease {self._path!r} has been '
          f'{"taken over by " + held["owner"] if held else "removed"}. Another '
          'run may be using the workdir, so this one stops. Wait for the other '
          'run to end, or use another workdir.'
        )
      self._write()

  def _keep_renewing(self):
    while not self._ended.wait(self._seconds / 4):
      try:
        self.renew()
      except LeaseLost:
        return  # The next call of `renew` raises it where it is handled.
      except Exception as error:  # Storage clients raise many types.
        _logger.warning('Could not renew the lease, retrying: %s', error)

  def _read(self):
    try:
      content = self._storage.cat_file(self._path)
    except FileNotFoundError:
      return None
    try:
      held = json.loads(content)
      fields = (held['owner'], held['renewed'], held['seconds'])
      if not isinstance(held['owner'], str) or not all(
        map(saved_json.is_number, fields[1:])
      ):
        raise ValueError
      return held
    except (ValueError, KeyError, TypeError, RecursionError):
      raise ValueError(
        f'{self._path!r} is not a lease: delete it if no run uses its folder.'
      ) from None

  def _write(self):
    content = {
      'owner': self.owner,
      'renewed': time.time(),
      'seconds': self._seconds,
    }
    self._storage.pipe_file(self._path, json.dumps(content).encode())


def _parse_manifest(path: str, content: bytes) -> list[str]:
  """Returns the names in a manifest.

  Raises:
    ValueError: if it is damaged, or names a file outside of the workdir.
  """
  try:
    names = json.loads(content)
  except (ValueError, RecursionError):
    names = None
  if not isinstance(names, list) or not all(
    isinstance(name, str)
    and name
    and '..' not in name.split('/')
    and not name.startswith('/')
    for name in names
  ):
    raise ValueError(
      f'{path!r} is damaged: it must be a list of names of files. Delete it to '
      'use all files of its folder.'
    )
  return names


@contextlib.contextmanager
def mirrored(
  url: str, *, lease_seconds: float
) -> Iterator[tuple[str, Callable[[], None], str]]:
  """Leases a remote folder and works on it in a local copy.

  On exit, the remaining changes are uploaded and the local copy is removed; if
  the upload fails, the copy is kept.

  Args:
    url: the remote folder.
    lease_seconds: how long a killed run blocks the folder.

  Yields:
    (folder, publish, note): the local copy; a function that starts uploading
    changes in the background and raises `LeaseLost` if another run has taken
    over; and a log message if this run took over from another, or ''.

  Raises:
    ValueError: if the storage cannot be opened, or the lease is lost.
    BlockingIOError: if another run holds the lease.
    OSError: if the storage fails.
  """
  storage, root = _open(url)
  with contextlib.ExitStack() as stack:
    with _failures_named(url):
      lease = stack.enter_context(
        Lease(storage, f'{root}/{_LEASE}', seconds=lease_seconds)
      )
    local = tempfile.mkdtemp(prefix='proxy_nca_')
    mirror = _Mirror(url, storage, root, local, lease)
    with contextlib.ExitStack() as undo, _failures_named(url):
      undo.callback(shutil.rmtree, local)
      mirror.download()
      undo.pop_all()
    try:
      yield local, mirror.begin_upload, lease.note
    finally:
      mirror.close()


def _open(url):
  try:
    storage, root = fsspec.url_to_fs(url)
  # A missing package, or an unknown scheme.
  except (ImportError, ValueError) as error:
    raise ValueError(f'{url!r} cannot be opened: {error}.') from error
  if isinstance(storage, local.LocalFileSystem):
    storage = _Disk()
  return storage, root.rstrip('/')


@contextlib.contextmanager
def _failures_named(url):
  """Converts any error of a storage client to an OSError that names the URL."""
  try:
    yield
  except (BlockingIOError, ValueError):
    raise
  except Exception as error:  # Storage clients raise many types.
    text = errors.one_line(f'{type(error).__name__}: {error}')
    raise OSError(f'The storage of {url!r} failed ({text}).') from error


class _Disk(local.LocalFileSystem):
  """A local file system whose writes are atomic, as on object storage."""

  def pipe_file(self, path, value, **kwargs):
    with self._write_atomically(path) as file:
      file.write(value)

  def cp_file(self, path1, path2, **kwargs):
    with (
      open(self._strip_protocol(path1), 'rb') as source,
      self._write_atomically(path2) as file,
    ):
      shutil.copyfileobj(source, file)

  def _write_atomically(self, path):
    path = self._strip_protocol(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return files.write_atomically(path, 'wb')


class _Mirror:
  """Uploads changes of a local folder; a manifest completes each upload.

  One upload runs at a time, in a background thread, so that training continues.
  """

  def __init__(self, url, storage, root, local, lease):
    self._url, self._storage, self._root = url, storage, root
    self._local, self._lease = local, lease
    # {name: stamp} of the files in the manifest.
    self._uploaded = {}
    self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix='upload')
    self._upload = None

  def download(self) -> None:
    """Downloads the files in the manifest."""
    present = self._list_remote()
    try:
      content = self._storage.cat_file(self._path(_MANIFEST))
      names = _parse_manifest(f'{self._url}/{_MANIFEST}', content)
    except FileNotFoundError:
      # A folder without a manifest is a copy of a local workdir.
      names = present
    if lost := sorted(set(names) - set(present)):
      _logger.warning(
        '%s lacks %d of the files listed in its %s, such as %s.',
        self._url,
        len(lost),
        _MANIFEST,
        lost[0],
      )
      names = sorted(set(names) & set(present))
    targets = [os.path.join(self._local, name) for name in names]
    for target in targets:
      os.makedirs(os.path.dirname(target), exist_ok=True)
    if names:
      self._storage.get([self._path(name) for name in names], targets)
    self._write_manifest(names)
    # Remove leftovers of an interrupted upload, in folders that only we write.
    self._remove(
      [
        name
        for name in set(present) - set(names)
        if name.startswith(('checkpoints/', 'selected/'))
      ]
    )
    self._uploaded = self._stamps()

  def begin_upload(self) -> None:
    """Starts uploading changes in the background, unless it is doing so.

    Raises:
      LeaseLost: if the previous upload found that another run has taken over.
    """
    if self._upload is not None:
      if not self._upload.done():
        return
      self._upload.result()
    self._upload = self._pool.submit(self._try_upload)

  def _try_upload(self):
    try:
      self._upload_changes()
    except LeaseLost:
      raise
    except FileNotFoundError:
      # An old checkpoint was deleted during the upload. The next upload will
      # notice.
      _logger.debug('A file vanished before its upload', exc_info=True)
    except Exception as error:  # Storage clients raise many types.
      _logger.warning(
        'The upload to %s failed and will be retried: %s', self._url, error
      )

  def close(self) -> None:
    """Uploads the remaining changes and removes the local folder.

    Raises:
      LeaseLost: if another run has taken over.
      OSError: if the upload fails; the local folder is kept.
    """
    self._pool.shutdown()
    try:
      with _failures_named(self._url):
        self._upload_changes()
    except LeaseLost:
      shutil.rmtree(self._local)
      raise
    except OSError as error:
      raise OSError(
        f'{error} The files are kept in {self._local!r}: copy that folder to '
        'the storage.'
      ) from error
    shutil.rmtree(self._local)

  def _upload_changes(self):
    self._lease.renew()
    stamps = self._stamps()
    changed = sorted(
      name for name in stamps if stamps[name] != self._uploaded.get(name)
    )
    if changed:
      self._storage.put(
        [os.path.join(self._local, name) for name in changed],
        [self._path(name) for name in changed],
      )
    self._lease.renew()
    if stamps.keys() != self._uploaded.keys():
      self._write_manifest(stamps)
    self._remove(self._uploaded.keys() - stamps.keys())
    self._uploaded = stamps

  def _stamps(self) -> dict[str, tuple[int, int]]:
    """Returns {name: (size, time)} of the complete local files."""
    stamps = {}
    for folder, _, names in os.walk(self._local):
      for name in names:
        path = os.path.join(folder, name)
        relative = os.path.relpath(path, self._local)
        if not any(mark in relative for mark in _UNFINISHED):
          stat = os.stat(path)
          stamps[relative] = stat.st_size, stat.st_mtime_ns
    return stamps

  def _list_remote(self) -> list[str]:
    """Returns the names of the files in the remote folder."""
    self._storage.invalidate_cache()
    paths = self._storage.find(self._root)
    names = (path.removeprefix(f'{self._root}/') for path in paths)
    # Some web consoles represent a folder by an object that ends in a slash.
    return [
      name
      for name in names
      if name not in ('', _MANIFEST, _LEASE)
      and not name.endswith(('/', '.tmp'))
    ]

  def _write_manifest(self, names):
    content = json.dumps(sorted(names), indent=0).encode()
    self._storage.pipe_file(self._path(_MANIFEST), content)

  def _remove(self, names):
    if names:
      with contextlib.suppress(
        FileNotFoundError
      ):  # Already removed by someone.
        self._storage.rm([self._path(name) for name in names])

  def _path(self, name):
    return f'{self._root}/{name}'
