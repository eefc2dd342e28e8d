"""Worker processes that read batches: deaf to signals, ended with their run."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from multiprocessing import resource_tracker

import grain
import numpy as np

from proxy_nca_jax.runtime import parent

Batch = dict[str, np.ndarray]


def end_with_run(index: int, count: int) -> None:
  """Makes a worker exit when its run is killed."""
  del index, count

  def end():
    multiprocessing.parent_process().join()
    os._exit(0)

  threading.Thread(target=end, daemon=True).start()


def read_in_processes(
  batches: grain.DatasetIterator,
) -> Generator[Batch, None, None]:
  """Yields the batches that worker processes read.

  Ctrl-C reaches the whole process group, but workers must serve batches until
  the run stops. They start with the first batch and inherit which signals are
  blocked.

  Raises:
    ValueError: if a worker was killed.
  """
  try:
    # Starting it later would unblock the signals again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(
      signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM)
    )
    try:
      with parent.starting_workers():
        first = next(batches)
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield first
    yield from batches
  except RuntimeError as error:
    if 'terminated unexpectedly' not in str(error):
      raise
    raise ValueError(
      f'A worker process has ended ({str(error).split(".")[0]}), perhaps for '
      'lack of memory: lower config.dataset.num_workers; 0 uses threads. The '
      'same command resumes from the last checkpoint.'
    ) from error
  finally:
    batches.close()
