"""Locks on files that the operating system drops with their process."""

import contextlib
import fcntl
import os
from collections.abc import Iterator


@contextlib.contextmanager
def hold(path: str, *, wait: bool = True) -> Iterator[None]:
  """Holds an exclusive lock on a file, which is made if it is missing.

  Record locks belong to the process: its children do not inherit them, so that
  a worker that outlives a killed run does not keep the lock.

  Args:
    path: the file to lock, in a folder that exists.
    wait: whether to wait for another holder.

  Raises:
    BlockingIOError: if another process holds it and `wait` is False.
  """
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
  try:
    fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    yield
  finally:
    os.close(descriptor)
