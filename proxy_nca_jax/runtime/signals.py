"""SIGTERM and Ctrl-C: noted when they come, raised where a run can end.

An exception that a signal handler raises comes at any line: it leaves locks
held, and libraries take it for a failure of their own. So long work of ours
calls `check` between its parts, and no handler raises.
"""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
  """Someone asks the run to end: raised by `check`.

  Like its base it is no `Exception`, which whoever retries would catch.
  """

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


class StopSignals:
  """Notes the first signal in its context, and says on stderr what follows.

  A second one takes its default course, so that nobody is kept waiting. The
  handlers can be set in the main thread only; elsewhere nothing changes.

  Where a run has several processes, it is enough that one is told: all stop
  after the same step, which JAX's preemption service finds.
  """

  _current = None

  def __enter__(self) -> 'StopSignals':
    self._num_checks = 0
    self._received, self._previous = None, {}
    self._outer, StopSignals._current = StopSignals._current, self
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
    """Raises `Stopped` if a signal has come, to any process of the run.

    They call this equally often: before each step.
    """
    if self._received is not None:
      raise Stopped(self._received)
    if jax.process_count() > 1:
      # They agree on the number after the largest that one of them has come to,
      # 0 before the first call: so it counts from 1, wherever a run begins.
      self._num_checks += 1
      if multihost_utils.reached_preemption_sync_point(self._num_checks):
        raise Stopped(signal.SIGTERM)

  def __exit__(self, *exception) -> None:
    StopSignals._current = self._outer
    self._restore()

  def _restore(self):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}

  def _handle(self, number, frame):
    del frame
    self._restore()
    self._received = number
    # Not `print`, which must not be called while it is at work.
    os.write(
      2,
      (
        f'{signal.Signals(number).name}: ending after what is under way; a '
        'second one ends at once.\n'
      ).encode(),
    )


def check() -> None:
  """Raises `Stopped` if a signal came to the one process of a run.

  Outside of `StopSignals` it does nothing; several processes stop between
  steps only.
  """
  signals = StopSignals._current
  if signals is not None and signals._received is not None:
    raise Stopped(signals._received)
