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

  def test_a_deferred_signal_waits_for_the_end_of_the_block(self):
    done = []
    with self.assertRaises(interruption.Stopped):
      with interruption.StopSignals() as signals:
        with signals.deferred():
          os.kill(os.getpid(), signal.SIGTERM)
          done.append('block')
        done.append('after')
    self.assertEqual(done, ['block'])

  def test_nothing_is_raised_without_a_signal(self):
    with interruption.StopSignals() as signals:
      with signals.deferred():
        pass

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
