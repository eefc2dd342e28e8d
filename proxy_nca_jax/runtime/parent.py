"""Processes that end with the run that started them, from their first line.

A worker starts by importing the main module of its run and the libraries of
that, which takes minutes on a busy machine. A run that is killed meanwhile
cannot end its workers, so they watch it themselves: the package calls
`watch_if_worker` before it imports anything else.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

_VARIABLE = 'PROXY_NCA_JAX_PARENT'
# What `multiprocessing` passes to the processes that it spawns.
_SPAWNED = '--multiprocessing-fork'
_PERIOD_SECONDS = 0.5


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
  """Makes the processes that are spawned in the block watch this process."""
  os.environ[_VARIABLE] = str(os.getpid())
  try:
    yield
  finally:
    del os.environ[_VARIABLE]


def watch_if_worker() -> None:
  """Ends this process with its parent, if `starting_workers` spawned it."""
  parent = os.environ.pop(_VARIABLE, '')
  if parent.isdigit() and _SPAWNED in sys.orig_argv:
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()


def _end_with(parent: int) -> None:
  # A process whose parent has ended gets another one.
  while os.getppid() == parent:
    time.sleep(_PERIOD_SECONDS)
  os._exit(0)
