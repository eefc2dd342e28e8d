"""SIGTERM and Ctrl-C as an exception, and blocks that end before it is raised.

An exception that comes from outside, at any line, leaves locks held and saves
half done, and libraries take it for a failure of their own. So what reads or
writes saved states is `deferred`; the rest ends at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
  """Someone asks the run to end: raised by `StopSignals`.

  Like its base it is no `Exception`, which libraries catch more often.
  """

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


class StopSignals:
  """Raises `Stopped` on a signal, at once or when all `deferred` end.

  A second signal takes its default course, so that nobody is kept waiting. The
  handlers can be set in the main thread only; elsewhere nothing changes.

  Where a run has several processes, it is enough that one is told: all stop
  after the same step, which JAX's preemption service finds. So nothing is
  raised but by `check`.
  """

  def __enter__(self) -> 'StopSignals':
    self._num_deferred, self._num_checks = 0, 0
    self._received, self._previous = None, {}
    if threading.current_thread() is not threading.main_thread():
      return self
    if jax.process_count() > 1:
      # SIGTERM has the handler of JAX.
      self._previous[signal.SIGINT] = signal.signal(
        signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
      )
      return self
    for number in (signal.SIGTERM, signal.SIGINT):
      # One that is not Python's could not be set again.
      if signal.getsignal(number) is not None:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def check(self) -> None:
    """Raises `Stopped` if a library swallowed it, or all processes agree on it.

    They call this equally often: before each step.
    """
    self._raise_received()
    if jax.process_count() > 1:
      # They agree on the number after the largest that one of them has come to,
      # 0 before the first call: so it counts from 1, wherever a run begins.
      self._num_checks += 1
      if multihost_utils.reached_preemption_sync_point(self._num_checks):
        raise Stopped(signal.SIGTERM)

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
    self._raise_received()

  def _raise_received(self):
    if self._received is not None and not self._num_deferred:
      raise Stopped(self._received)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """Lets a block, or a function, end before the `StopSignals` around it raise.

  Without them, in other threads, and after a first signal it does nothing.
  """
  signals = getattr(signal.getsignal(signal.SIGTERM), '__self__', None)
  is_main = threading.current_thread() is threading.main_thread()
  if not is_main or not isinstance(signals, StopSignals):
    yield
    return
  signals._num_deferred += 1
  try:
    yield
  finally:
    signals._num_deferred -= 1
  signals._raise_received()
