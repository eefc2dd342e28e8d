"""An exclusive lock on a file, which the operating system drops at exit."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from proxy_nca_jax.runtime import signals


@contextlib.contextmanager
def locked(path: str, *, wait: bool = True) -> Iterator[None]:
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
