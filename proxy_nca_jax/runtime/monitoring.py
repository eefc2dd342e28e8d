"""Monitoring of a run: stalls, profiler traces, wall time, device memory."""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping

import jax

# Start of this process, apart from earlier imports.
_START_TIME = time.time()

_logger = logging.getLogger(__name__)


class Watchdog:
  """Warns in the log when a run waits for something unusually long.

  Only blocks `with watchdog.waiting_for('its input', step=7)` are watched; code
  outside, such as evaluation, may take any time. A thread of its own observes
  the current wait, since blocked code cannot observe itself.

  Attributes:
    seconds: total seconds waited, by the reason for waiting.
  """

  def __init__(self, limit: float):
    """Creates a watchdog.

    Args:
      limit: seconds until the first warning about a wait; 0 disables warnings.
    """
    self.seconds = collections.Counter()
    self._limit = limit
    self._lock = threading.Lock()
    self._wait = None  # (what, step, start time) of the current wait.
    self._warn_after = limit
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name='watchdog', daemon=True
    )

  def __enter__(self) -> 'Watchdog':
    if self._limit:
      self._thread.start()
    return self

  def __exit__(self, *exception) -> None:
    self._closed.set()
    if self._limit:
      self._thread.join()

  @contextlib.contextmanager
  def waiting_for(self, what: str, *, step: int) -> Iterator[None]:
    """Adds the block's duration to `seconds[what]`; warns if it is long."""
    since = time.monotonic()
    with self._lock:
      self._wait = what, step, since
    try:
      yield
    finally:
      waited = time.monotonic() - since
      self.seconds[what] += waited
      with self._lock:
        self._wait = None
        has_warned = self._warn_after > self._limit
        self._warn_after = self._limit
    if has_warned:
      _logger.warning(
        'Step %d resumes after waiting %.3g s for %s.', step, waited, what
      )

  def _watch(self):
    while not self._closed.wait(self._limit / 10):
      with self._lock:
        if self._wait is None:
          continue
        what, step, since = self._wait
        waited = time.monotonic() - since
        if waited < self._warn_after:
          continue
        # Intervals double, so that a stall overnight logs some ten lines.
        self._warn_after = 2 * waited
        _logger.warning('Step %d has waited %.3g s for %s.', step, waited, what)


class Trace:
  """Writes a JAX profiler trace of a range of steps to a folder."""

  def __init__(self, folder: str, steps: tuple[int, int] | tuple[()]):
    """Creates a trace.

    Args:
      folder: where the trace is written.
      steps: the first and last step to trace; () traces nothing.
    """
    self._folder = folder
    self._first, self._last = steps or (0, 0)
    self._traced_from = None

  def __enter__(self) -> 'Trace':
    return self

  def __exit__(self, *exception) -> None:
    self._end()

  def before(self, first: int, last: int) -> None:
    """Starts tracing if the next dispatch, of these steps, is in the range."""
    if (
      self._traced_from is None and first <= self._last and last >= self._first
    ):
      jax.profiler.start_trace(self._folder)
      self._traced_from = self._last_traced = first

  def after(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Stops tracing once the device has completed the last step."""
    if self._traced_from is None:
      return
    self._last_traced = step
    if step >= self._last:
      jax.block_until_ready(metrics)
      self._end()

  def _end(self):
    if self._traced_from is None:
      return
    jax.profiler.stop_trace()
    _logger.info(
      'Wrote a profiler trace of steps %d to %d to %s: view it with xprof or '
      'TensorBoard.',
      self._traced_from,
      self._last_traced,
      self._folder,
    )
    self._traced_from = None


def wall_time() -> str:
  """Returns the time since this process started, as h:mm:ss."""
  seconds = int(time.time() - _START_TIME)
  return f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'


def device_memory() -> dict[str, int]:
  """Returns current and peak bytes in use on the first local device.

  Empty if the backend reports no memory statistics, as on CPUs.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  names = {
    'device_bytes_in_use': 'bytes_in_use',
    'device_bytes_peak': 'peak_bytes_in_use',
  }
  return {new: stats[old] for new, old in names.items() if old in stats}
