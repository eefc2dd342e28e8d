import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from unittest import mock

import jax
from absl.testing import absltest, parameterized
from jax.experimental import multihost_utils

from proxy_nca_jax.runtime import errors, signals

_COMMAND = """
import time
from proxy_nca_jax.runtime import errors

with errors.in_one_line(stopped='Nothing was lost.'):
  print('running', flush=True)
  time.sleep(60)
"""


class StopSignalsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # Under nohup, or in the background of a script, they are ignored.
    for number, handler in (
      (signal.SIGINT, signal.default_int_handler),
      (signal.SIGHUP, signal.SIG_DFL),
    ):
      self.addCleanup(signal.signal, number, signal.signal(number, handler))

  @parameterized.parameters(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  def test_a_signal_is_raised_by_the_next_check(self, number):
    done = []
    with self.assertRaises(signals.Stopped) as raised:
      with signals.StopSignals():
        signals.check()
        os.kill(os.getpid(), number)
        done.append('current work')
        signals.check()
        done.append('next work')
    self.assertEqual(raised.exception.number, number)
    self.assertEqual(done, ['current work'])

  def test_a_run_under_nohup_ignores_the_end_of_its_terminal(self):
    self.addCleanup(
      signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    with signals.StopSignals() as stop_signals:
      signal.raise_signal(signal.SIGHUP)
      stop_signals.check()

  def test_nothing_is_raised_without_a_signal(self):
    with signals.StopSignals() as stop_signals:
      stop_signals.check()
      signals.check()

  def test_code_that_waits_for_a_thread_is_not_disturbed(self):
    with signals.StopSignals() as stop_signals:
      event = threading.Event()
      timer = threading.Timer(0.2, event.set)
      kill = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
      timer.start()
      kill.start()
      self.assertTrue(event.wait(60))
      kill.join()
      with self.assertRaises(signals.Stopped):
        stop_signals.check()

  def test_a_second_signal_has_its_default_effect(self):
    with self.assertRaises(KeyboardInterrupt) as raised:
      with signals.StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        self.fail('The second signal did nothing.')
    self.assertNotIsInstance(raised.exception, signals.Stopped)

  def test_nested_contexts_deliver_a_signal_to_the_inner_one(self):
    with signals.StopSignals():
      with signals.StopSignals() as inner:
        os.kill(os.getpid(), signal.SIGTERM)
      signals.check()
      with self.assertRaises(signals.Stopped):
        inner.check()

  def test_work_that_may_end_anywhere_ends_at_once(self):
    with self.assertRaises(signals.Stopped) as raised:
      with signals.StopSignals(), signals.raised_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        self.fail('The signal was ignored.')
    self.assertEqual(raised.exception.number, signal.SIGTERM)
    with signals.StopSignals() as stop_signals:
      with signals.raised_at_once():
        pass
      os.kill(os.getpid(), signal.SIGTERM)
      with self.assertRaises(signals.Stopped):
        stop_signals.check()

  def test_all_processes_check_as_in_the_loop(self):
    signals.check_on_all()
    with (
      mock.patch.object(jax, 'process_count', return_value=2),
      mock.patch.object(
        multihost_utils,
        'reached_preemption_sync_point',
        side_effect=lambda number: number == 3,
      ),
      signals.StopSignals() as stop_signals,
    ):
      stop_signals.check()
      signals.check()
      signals.check_on_all()
      with self.assertRaises(signals.Stopped):
        signals.check_on_all()

  def test_previous_handlers_are_restored(self):
    before = signal.getsignal(signal.SIGTERM)
    with signals.StopSignals():
      self.assertNotEqual(signal.getsignal(signal.SIGTERM), before)
    self.assertEqual(signal.getsignal(signal.SIGTERM), before)
    signals.check()

  def test_another_thread_runs_without_handlers(self):
    entered = []

    def run():
      with signals.StopSignals():
        signals.check()
        entered.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    self.assertEqual(entered, [True])

  def test_libraries_that_catch_exceptions_let_it_through(self):
    self.assertNotIsInstance(signals.Stopped(signal.SIGTERM), Exception)


class CommandTest(absltest.TestCase):
  def test_ctrl_c_ends_a_command_immediately(self):
    process = subprocess.Popen(
      [sys.executable, '-c', _COMMAND],
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    self.assertEqual(process.stdout.readline(), 'running\n')
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    self.assertEqual(process.returncode, 130)
    self.assertEqual(printed.split('\n'), ['', 'Nothing was lost.', ''])

  def test_ctrl_c_while_reading_a_checkpoint_ends_the_command_after_it(self):
    with (
      contextlib.redirect_stderr(io.StringIO()) as printed,
      self.assertRaises(SystemExit) as raised,
      errors.in_one_line(stopped='Nothing was lost.'),
      signals.StopSignals() as stop_signals,
    ):
      signal.raise_signal(signal.SIGINT)
      stop_signals.check()
    self.assertEqual(raised.exception.code, 130)
    self.assertEqual(printed.getvalue(), 'Nothing was lost.\n')


if __name__ == '__main__':
  absltest.main()
