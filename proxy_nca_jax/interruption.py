"""SIGTERM and Ctrl-C as an exception that waits for a safe place."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
  """Someone asks the run to end: raised by `StopSignals`.

  Like its base it is no `Exception`, so that no library swallows it.
  """

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


class StopSignals:
  """Raises `Stopped` on a signal, at once or when `deferred` ends.

  A second signal takes its default course, so that nobody is kept waiting. The
  handlers can be set in the main thread only; elsewhere nothing changes.
  """

  def __enter__(self) -> 'StopSignals':
    self._is_deferred, self._received, self._previous = False, None, {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception) -> None:
    self._restore()

  def _restore(self):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}

  def _handle(self, number, frame):
    del frame
    self._restore()
    self._received = number
    if not self._is_deferred:
      raise Stopped(number)

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Lets the block end before a signal is raised."""
    self._is_deferred = True
    try:
      yield
    finally:
      self._is_deferred = False
    if self._received is not None:
      raise Stopped(self._received)
