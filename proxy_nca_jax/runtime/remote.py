"""A run's folder on object storage: a local copy that is worked on.

Any URL that fsspec opens will do (gs:// with gcsfs, s3:// with s3fs). What is
there is downloaded at the start and what changes is uploaded, file by file, as
it is. The last object to be written is manifest.json, the names of the files
that belong together; only these are downloaded, so that an upload that was cut
short, of a checkpoint above all, is never taken for a whole one.
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

from proxy_nca_jax.runtime import errors, files

# A killed run keeps others out for two minutes; one that cannot reach the
# storage for as long may lose its lease.
LEASE_SECONDS = 120.0

_MANIFEST, _LEASE = 'manifest.json', 'lease.json'
# What is written under these names is renamed when it is whole.
_UNFINISHED = ('.tmp', '.orbax-checkpoint-tmp')

_logger = logging.getLogger(__name__)


class LeaseLost(ValueError):
  """Another run has the lease that this one held."""


class Lease:
  """Holds an object of storage that knows no locks.

  The object names its owner, when the owner last renewed it, and for how many
  seconds that is good. The owner renews it four times as often. A killed owner
  does not, and another may take over when the seconds are over: the clocks of
  the machines must agree to much less than that.

  Storage has no step that reads and writes at once, so two that start in the
  same moment may both write. The last has it: each reads again after a pause,
  and before whatever it writes under the lease (`renew`).
  """

  def __init__(self, storage, path: str, *, seconds: float):
    """Prepares to hold an object while in the context.

    Args:
      storage: a file system of fsspec.
      path: the object, in that file system.
      seconds: how long a renewal is good for.
    """
    self._storage, self._path, self._seconds = storage, path, seconds
    self.note = ''  # From whom it was taken over.
    self.owner = f'{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}'
    self._renewing, self._ended = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

  def __enter__(self) -> 'Lease':
    """Takes the lease.

    Raises:
      BlockingIOError: if another has it; names the owner.
    """
    held = self._read()
    if held is not None:
      left = held['renewed'] + held['seconds'] - time.time()
      if left > 0:
        raise BlockingIOError(
          f'{held["owner"]}, whose lease ends in {left:.0f} s if not renewed'
        )
      self.note = (
        f'Taking over from {held["owner"]}, whose lease ended {-left:.0f} s ago'
      )
    self._write()
    time.sleep(self._seconds / 60)
    held = self._read()
    if held is None or held['owner'] != self.owner:
      raise BlockingIOError(held['owner'] if held else 'one that has ended')
    self._thread.start()
    return self

  def __exit__(self, *exception) -> None:
    self._ended.set()
    self._thread.join()
    try:
      held = self._read()
      if held is not None and held['owner'] == self.owner:
        self._storage.rm_file(self._path)
    except Exception as error:  # Storage clients let many types through.
      _logger.warning('The lease could not be given back: %s', error)

  def renew(self) -> None:
    """Makes sure of the lease, for its full time from now on.

    Raises:
      LeaseLost: if another has taken it.
    """
    with self._renewing:
      held = self._read()
      if held is None or held['owner'] != self.owner:
        raise LeaseLost(
          f'The lease {self._path!r} has been '
          f'{"taken by " + held["owner"] if held else "removed"}: another run '
          'is at work, and this one stops. Let that one end, or use another '
          'workdir.'
        )
      self._write()

  def _keep_renewing(self):
    while not self._ended.wait(self._seconds / 4):
      try:
        self.renew()
      except LeaseLost:
        return  # Whoever writes under the lease will find out.
      except Exception as error:  # Storage clients let many types through.
        _logger.warning('The lease could not be renewed, yet: %s', error)

  def _read(self):
    try:
      content = self._storage.cat_file(self._path)
    except FileNotFoundError:
      return None
    try:
      return json.loads(content)
    except ValueError:
      raise ValueError(
        f'{self._path!r} is no lease: delete it if no run is at work.'
      ) from None

  def _write(self):
    content = {
      'owner': self.owner,
      'renewed': time.time(),
      'seconds': self._seconds,
    }
    self._storage.pipe_file(self._path, json.dumps(content).encode())


@contextlib.contextmanager
def mirrored(
  url: str, *, lease_seconds: float
) -> Iterator[tuple[str, Callable[[], None], str]]:
  """Holds the lease of a remote folder, and mirrors it.

  Args:
    url: of the folder.
    lease_seconds: for how long a killed run keeps others out.

  Yields:
    The local folder; a function that begins to upload what has changed and
    returns, and raises `LeaseLost` if another run has taken over; and
    what to tell of a lease that was taken over. At the end all is uploaded and
    the local folder removed. It is kept if that fails.

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
  except (ImportError, ValueError) as error:  # Of the package, of the scheme.
    raise ValueError(f'{url!r} cannot be opened: {error}.') from error
  if isinstance(storage, local.LocalFileSystem):
    storage = _Disk()
  return storage, root.rstrip('/')


@contextlib.contextmanager
def _failures_named(url):
  """Raises what a client of storage raises as an OSError that names the URL."""
  try:
    yield
  except (BlockingIOError, ValueError):
    raise
  except Exception as error:  # The clients let many types through.
    text = errors.one_line(f'{type(error).__name__}: {error}')
    raise OSError(f'The storage of {url!r} failed ({text}).') from error


class _Disk(local.LocalFileSystem):
  """A local folder where a file appears whole, as on object storage."""

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
  """Uploads a local folder, as a whole or not at all.

  One upload is under way at a time, in a thread of its own: training goes on.
  """

  def __init__(self, url, storage, root, local, lease):
    self._url, self._storage, self._root = url, storage, root
    self._local, self._lease = local, lease
    # {name: stamp} of the files that the manifest names.
    self._uploaded = {}
    self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix='upload')
    self._upload = None

  def download(self) -> None:
    """Gets the files that the manifest names."""
    present = self._present()
    try:
      names = json.loads(self._storage.cat_file(self._path(_MANIFEST)))
    except FileNotFoundError:
      # Not written by a run: a local run's folder that someone has copied.
      names = present
    if lost := sorted(set(names) - set(present)):
      _logger.warning(
        '%s lacks %d of the files that its %s names, such as %s.',
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
    # Of an upload that was cut short, in the folders that are ours alone.
    self._remove(
      [
        name
        for name in set(present) - set(names)
        if name.startswith(('checkpoints/', 'selected/'))
      ]
    )
    self._uploaded = self._stamps()

  def begin_upload(self) -> None:
    """Uploads what has changed, unless an upload is under way.

    Raises:
      LeaseLost: if the upload before found another run at work.
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
      # An old checkpoint has been removed meanwhile. The next upload does it.
      _logger.debug('A file vanished before its upload', exc_info=True)
    except Exception as error:  # The clients let many types through.
      _logger.warning(
        'The upload to %s failed and will be tried again: %s', self._url, error
      )

  def close(self) -> None:
    """Uploads the rest and removes the local folder.

    Raises:
      LeaseLost: if another run has taken over.
      OSError: if the upload fails; the local folder is kept then.
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
        f'{error} What could not be uploaded is in {self._local!r}: copy that '
        'folder there.'
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
    """Returns {name: (size, time)} of the local files that are whole."""
    stamps = {}
    for folder, _, names in os.walk(self._local):
      for name in names:
        path = os.path.join(folder, name)
        relative = os.path.relpath(path, self._local)
        if not any(mark in relative for mark in _UNFINISHED):
          stat = os.stat(path)
          stamps[relative] = stat.st_size, stat.st_mtime_ns
    return stamps

  def _present(self) -> list[str]:
    """Returns the names of the files in the storage."""
    self._storage.invalidate_cache()
    paths = self._storage.find(self._root)
    names = (path.removeprefix(f'{self._root}/') for path in paths)
    # Some consoles make an object with a slash at its end of each folder.
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
      with contextlib.suppress(FileNotFoundError):  # Removed by someone.
        self._storage.rm([self._path(name) for name in names])

  def _path(self, name):
    return f'{self._root}/{name}'
