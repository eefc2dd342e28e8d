"""SIGTERM, SIGHUP, Ctrl-C: recorded by a handler, raised where a run can stop.

An exception raised by a signal handler can appear at any line: it leaves locks
held, and libraries mistake it for a failure of their own. So handlers only
record the signal, and long-running code calls `check` between units of work.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
  """Raised by `check` after a stop signal.

  Not an `Exception`, so that code which retries on any exception lets it pass.
  """

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


class StopSignals:
  """Records the first stop signal in its context and confirms it on stderr.

  A second signal has its default effect, so that nobody has to wait. Python
  allows signal handlers in the main thread only; in other threads the context
  does nothing.

  In a run of several processes, a signal to any one of them stops all after
  the same step, agreed on by JAX's preemption service.
  """

  _current = None

  def __enter__(self) -> 'StopSignals':
    self._num_checks = 0
    self._received, self._previous = None, {}
    self._outer, StopSignals._current = StopSignals._current, self
    if threading.current_thread() is not threading.main_thread():
      return self
    if jax.process_count() > 1:
      # JAX's preemption service handles SIGTERM.
      for number in self._stop_signals():
        if number != signal.SIGTERM:
          self._previous[number] = signal.signal(
            number, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
          )
      return self
    for number in self._stop_signals():
      self._previous[number] = signal.signal(number, self._handle)
    return self

  @staticmethod
  def _stop_signals() -> list[int]:
    numbers = [signal.SIGTERM, signal.SIGINT]
    # A closed terminal or ssh connection, unless started by nohup.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      numbers.append(signal.SIGHUP)
    # None: a handler that Python did not install and cannot restore.
    return [x for x in numbers if signal.getsignal(x) is not None]

  def check(self) -> None:
    """Raises `Stopped` if any process of the run has received a signal.

    All processes must call it equally often, such as before each step.
    """
    if self._received is not None:
      raise Stopped(self._received)
    if jax.process_count() > 1:
      # JAX stops all processes at one more than the highest count that any has
      # reached, taken as 0 before the first call. So the count starts at 1 even
      # where a resumed run does not.
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
    # `print` is not reentrant, and the signal may have interrupted one.
    os.write(
      2,
      (
        f'{signal.Signals(number).name}: stopping at the next safe point; '
        'a second signal stops immediately.\n'
      ).encode(),
    )


def check_on_all() -> None:
  """Raises `Stopped` on all processes if any of them has received a signal.

  Inside of `StopSignals`, all processes must call it equally often.
  """
  if StopSignals._current is not None:
    StopSignals._current.check()


@contextlib.contextmanager
def raised_at_once() -> Iterator[None]:
  """Raises `Stopped` where a signal arrives, for work that may end anywhere."""

  def stop(number, frame):
    del frame
    raise Stopped(number)

  check()
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  numbers = StopSignals._stop_signals()
  previous = {number: signal.signal(number, stop) for number in numbers}
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def check() -> None:
  """Raises `Stopped` if a stop signal has arrived in a single-process run.

  Does nothing outside of `StopSignals`, nor in a run of several processes,
  which stop where all of them check.
  """
  signals = StopSignals._current
  if signals is not None and signals._received is not None:
    raise Stopped(signals._received)
