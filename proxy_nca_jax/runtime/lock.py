"""Exclusive file locks that the operating system releases at process exit."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from proxy_nca_jax.runtime import signals

_POLL_SECONDS = 0.1


@contextlib.contextmanager
def locked(path: str, *, wait: bool = True) -> Iterator[None]:
  """Holds an exclusive lock on a file while in the context.

  POSIX record locks belong to a process: children do not inherit them, so a
  worker that outlives a killed run does not keep the lock.

  Args:
    path: the file to lock; created if missing, in an existing folder.
    wait: whether to wait while another process holds the lock.

  Raises:
    BlockingIOError: if another process holds the lock and `wait` is False.
    signals.Stopped: if a stop signal arrives while waiting.
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
      time.sleep(_POLL_SECONDS)
    yield
  finally:
    os.close(descriptor)
