import contextlib
import os
import signal
import threading

from absl.testing import absltest, parameterized

from proxy_nca_jax import interruption


class StopSignalsTest(parameterized.TestCase):

  @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
  def test_a_signal_raises_at_once(self, number):
    with self.assertRaises(interruption.Stopped) as raised:
      with interruption.StopSignals():
        os.kill(os.getpid(), number)
        self.fail('The signal did nothing.')
    self.assertEqual(raised.exception.number, number)

  @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
  def test_a_deferred_signal_waits_for_the_end_of_the_block(self, number):
    done = []
    with self.assertRaises(interruption.Stopped):
      with interruption.StopSignals():
        with interruption.deferred():
          with interruption.deferred():
            os.kill(os.getpid(), number)
            done.append('block')
          done.append('block around it')
        done.append('after')
    self.assertEqual(done, ['block', 'block around it'])

  def test_nothing_is_raised_without_a_signal(self):
    with interruption.StopSignals() as signals:
      with interruption.deferred():
        signals.check()

  def test_a_deferred_function_ends_first_each_time_it_is_called(self):
    done = []

    @interruption.deferred()
    def work():
      os.kill(os.getpid(), signal.SIGTERM)
      done.append('work')

    for _ in range(2):
      with self.assertRaises(interruption.Stopped):
        with interruption.StopSignals():
          work()
    self.assertEqual(done, ['work', 'work'])

  def test_nothing_is_deferred_outside(self):
    handler = signal.getsignal(signal.SIGINT)
    with interruption.deferred():
      self.assertIs(signal.getsignal(signal.SIGINT), handler)
      with self.assertRaises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

  def test_a_second_signal_is_not_deferred(self):
    with self.assertRaises(KeyboardInterrupt) as raised:
      with interruption.StopSignals(), interruption.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        with interruption.deferred():
          os.kill(os.getpid(), signal.SIGINT)
          self.fail('The second signal did nothing.')
    self.assertNotIsInstance(raised.exception, interruption.Stopped)

  def test_one_that_a_library_swallowed_is_raised_by_the_next_check(self):
    with interruption.StopSignals() as signals:
      with contextlib.suppress(interruption.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
      with self.assertRaises(interruption.Stopped):
        signals.check()

  def test_the_handlers_of_before_come_back(self):
    before = signal.getsignal(signal.SIGTERM)
    with interruption.StopSignals():
      self.assertNotEqual(signal.getsignal(signal.SIGTERM), before)
    self.assertEqual(signal.getsignal(signal.SIGTERM), before)

  def test_another_thread_runs_without_handlers(self):
    entered = []

    def run():
      with interruption.StopSignals():
        entered.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    self.assertEqual(entered, [True])

  def test_libraries_that_catch_exceptions_let_it_through(self):
    self.assertNotIsInstance(interruption.Stopped(signal.SIGTERM), Exception)


if __name__ == '__main__':
  absltest.main()
