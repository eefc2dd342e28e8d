"""Reading processes: they outlive signals, and end with their run."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from multiprocessing import resource_tracker

import grain
import numpy as np

Batch = dict[str, np.ndarray]


def end_with_run(index: int, count: int) -> None:
  """Lets a reading process end if its run is killed."""
  del index, count

  def end():
    multiprocessing.parent_process().join()
    os._exit(0)

  threading.Thread(target=end, daemon=True).start()


def read_in_processes(
  batches: grain.DatasetIterator,
) -> Generator[Batch, None, None]:
  """Yields the batches of reading processes.

  A terminal tells all processes to stop, and a run needs its batches until it
  ends. They begin with the first batch, and inherit which signals are blocked.

  Raises:
    ValueError: if one of them has been killed.
  """
  try:
    # Its start would unblock them again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(
      signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM)
    )
    try:
      first = next(batches)
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield first
    yield from batches
  except RuntimeError as error:
    if 'terminated unexpectedly' not in str(error):
      raise
    raise ValueError(
      f'A reading process has ended ({str(error).split(".")[0]}), perhaps for '
      'want of memory: lower config.dataset.num_workers, 0 being threads. The '
      'same command goes on from the last checkpoint.'
    ) from error
  finally:
    batches.close()
