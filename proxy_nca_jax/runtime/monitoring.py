"""What a run is doing: where it waits, device memory, a trace of steps."""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping

import jax

# When this process began, but for some imports.
_BEGUN = time.time()

_logger = logging.getLogger(__name__)


class Watchdog:
  """Says in the log what a run waits for, if it waits long.

  A wait is a block `with watchdog.waiting_for('its input', step=7)`. What is
  outside of such blocks, as evaluation, may take as long as it likes. A thread
  looks at the wait that is under way: blocked code cannot look at itself.
  """

  def __init__(self, limit: float):
    """Takes the seconds until the first warning; 0 is none at all."""
    self.seconds = collections.Counter()  # Waited, by what for.
    self._limit = limit
    self._lock = threading.Lock()
    self._wait = None  # What for, the step, and since when.
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
    """Adds the seconds of a block to `seconds[what]`; warns if it is long."""
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
        'Step %d goes on: it waited %.3g s for %s.', step, waited, what
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
        # The next warning comes at twice the time: a night is ten lines.
        self._warn_after = 2 * waited
        _logger.warning('Step %d has waited %.3g s for %s.', step, waited, what)


class Trace:
  """Writes a JAX profiler's trace of some steps to a folder."""

  def __init__(self, folder: str, steps: tuple[int, int] | tuple[()]):
    """Takes the first and last step to trace; () is none."""
    self._folder = folder
    self._first, self._last = steps or (0, 0)
    self._begun = None

  def __enter__(self) -> 'Trace':
    return self

  def __exit__(self, *exception) -> None:
    self._end()

  def before(self, first: int, last: int) -> None:
    """Begins to trace, if it is time: these steps are next, in one dispatch."""
    if self._begun is None and first <= self._last and last >= self._first:
      jax.profiler.start_trace(self._folder)
      self._begun = self._newest = first

  def after(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Ends with the last step, when the device has done it."""
    if self._begun is None:
      return
    self._newest = step
    if step >= self._last:
      jax.block_until_ready(metrics)
      self._end()

  def _end(self):
    if self._begun is None:
      return
    jax.profiler.stop_trace()
    _logger.info(
      'A trace of steps %d to %d is in %s; xprof or TensorBoard shows it.',
      self._begun,
      self._newest,
      self._folder,
    )
    self._begun = None


def wall_time() -> str:
  """Returns the time since this process began, h:mm:ss."""
  seconds = int(time.time() - _BEGUN)
  return f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'


def device_memory() -> dict[str, int]:
  """Returns the bytes in use on the first device; {} if it does not tell."""
  stats = jax.local_devices()[0].memory_stats() or {}
  names = {
    'device_bytes_in_use': 'bytes_in_use',
    'device_bytes_peak': 'peak_bytes_in_use',
  }
  return {new: stats[old] for new, old in names.items() if old in stats}
