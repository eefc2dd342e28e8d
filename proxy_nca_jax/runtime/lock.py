"""One holder at a time: of a file by a lock, of remote storage by a lease."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from proxy_nca_jax.runtime import signals

# A killed run keeps others out for two minutes; one that cannot reach the
# storage for as long may lose its lease.
LEASE_SECONDS = 120.0

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(path: str, *, wait: bool = True) -> Iterator[None]:
  """Holds an exclusive lock on a file, which is made if it is missing.

  Record locks belong to the process: its children do not inherit them, so that
  a worker that outlives a killed run does not keep the lock. The operating
  system drops them with the process.

  Args:
    path: the file to lock, in a folder that exists.
    wait: whether to wait for another holder.

  Raises:
    BlockingIOError: if another process holds it and `wait` is False.
  """
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
  try:
    while True:
      try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if not wait:
          raise
      signals.check()
      time.sleep(0.1)
    yield
  finally:
    os.close(descriptor)


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
      'owner': self.owner, 'renewed': time.time(), 'seconds': self._seconds
    }
    self._storage.pipe_file(self._path, json.dumps(content).encode())
