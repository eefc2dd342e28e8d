"""SIGTERM and Ctrl-C as an exception that waits for a safe place."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


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

  Where a run has several processes, it is enough that one is told: all stop
  after the same step, which JAX's preemption service finds. So nothing is
  raised but by `check`.
  """

  def __enter__(self) -> 'StopSignals':
    self._is_deferred, self._received, self._previous = False, None, {}
    self._num_checks = 0
    if threading.current_thread() is not threading.main_thread():
      return self
    if jax.process_count() > 1:
      # SIGTERM has the handler of JAX.
      self._previous[signal.SIGINT] = signal.signal(
        signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
      )
      return self
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def check(self) -> None:
    """Raises `Stopped` if several processes have agreed to stop here.

    All call it equally often: before each step.
    """
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
