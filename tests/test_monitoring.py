import logging
import pathlib
import time
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from proxy_nca_jax.runtime import monitoring


def _wait_until(condition):
  deadline = time.monotonic() + 60
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.01)


class WatchdogTest(absltest.TestCase):
  def test_a_long_wait_is_logged_and_so_is_its_end(self):
    with (
      self.assertLogs('proxy_nca_jax', 'WARNING') as logs,
      monitoring.Watchdog(0.05) as watchdog,
    ):
      with watchdog.waiting_for('its input', step=7):
        _wait_until(lambda: len(logs.output) > 1)
      self.assertRegex(
        logs.output[0], r'Step 7 has waited [\d.]+ s for its input'
      )
      self.assertRegex(
        logs.output[-1], r'Step 7 resumes after waiting [\d.]+ s for its input'
      )
      # A short wait after it is not logged; the next long one is.
      num_logged = len(logs.output)
      with watchdog.waiting_for('its input', step=8):
        pass
      self.assertLen(logs.output, num_logged)
      with watchdog.waiting_for('the device', step=8):
        _wait_until(lambda: len(logs.output) > num_logged)
      self.assertRegex(
        logs.output[num_logged], r'Step 8 has waited [\d.]+ s for the device'
      )

  def test_warnings_of_one_wait_become_rare(self):
    with (
      self.assertLogs('proxy_nca_jax', 'WARNING') as logs,
      monitoring.Watchdog(0.01) as watchdog,
      watchdog.waiting_for('its input', step=7),
    ):
      time.sleep(1)
    # At 0.01, 0.02, 0.04, ..., 0.64 s at the most, and the end.
    self.assertBetween(len(logs.output), 2, 8)

  def test_short_waits_and_other_code_are_not_logged(self):
    with (
      self.assertNoLogs('proxy_nca_jax', 'WARNING'),
      monitoring.Watchdog(60) as watchdog,
    ):
      with watchdog.waiting_for('its input', step=7):
        time.sleep(0.1)
    with (
      self.assertNoLogs('proxy_nca_jax', 'WARNING'),
      monitoring.Watchdog(0.1) as watchdog,
    ):
      with watchdog.waiting_for('the device', step=7):
        pass
      time.sleep(0.5)  # Such as evaluation.

  def test_a_limit_of_zero_only_counts_seconds(self):
    with (
      self.assertNoLogs('proxy_nca_jax', 'WARNING'),
      monitoring.Watchdog(0) as watchdog,
    ):
      for step in (7, 8):
        with watchdog.waiting_for('its input', step=step):
          time.sleep(0.1)
      with watchdog.waiting_for('the device', step=8):
        pass
    self.assertGreaterEqual(watchdog.seconds['its input'], 0.2)
    self.assertLess(watchdog.seconds['the device'], 0.2)


class TraceTest(parameterized.TestCase):
  def _traced(self, steps, done, size=1):
    """Returns the files, and the log, of a trace of a loop."""
    folder = self.create_tempdir().full_path
    with self.assertLogs('proxy_nca_jax', 'INFO') as logs:
      logging.getLogger('proxy_nca_jax').info('begins')
      with monitoring.Trace(folder, steps) as trace:
        for step in done:
          trace.before(step, step + size - 1)
          trace.after(step + size - 1, {'loss': jnp.ones(3) * step})
    return list(pathlib.Path(folder).rglob('*.xplane.pb')), logs.output[1:]

  @parameterized.parameters(
    ((2, 3), range(1, 6), 'steps 2 to 3 to'),
    ((2, 2), range(1, 6), 'steps 2 to 2 to'),
    ((2, 9), range(1, 6), 'steps 2 to 5 to'),  # Stopped early.
    ((2, 9), range(4, 12), 'steps 4 to 9 to'),  # Resumed.
    ((6, 7), range(1, 21, 5), 'steps 6 to 10 to', 5),  # In dispatches of 5.
    ((3, 6), range(1, 21, 5), 'steps 1 to 10 to', 5),
  )
  def test_the_steps_are_traced_and_the_log_says_where(
    self, steps, done, line, size=1
  ):
    files, logs = self._traced(steps, done, size)
    self.assertLen(files, 1)
    self.assertLen(logs, 1)
    self.assertIn(line, logs[0])

  @parameterized.parameters(((), range(1, 4)), ((2, 3), range(4, 6)))
  def test_no_other_step_is_traced(self, steps, done):
    self.assertEqual(self._traced(steps, done), ([], []))


class DeviceMemoryTest(absltest.TestCase):
  def test_statistics_of_the_device_are_returned(self):
    stats = {'bytes_in_use': 3, 'peak_bytes_in_use': 5, 'num_allocs': 7}
    device = mock.Mock(memory_stats=lambda: stats)
    with mock.patch.object(jax, 'local_devices', return_value=[device]):
      self.assertEqual(
        monitoring.device_memory(),
        {'device_bytes_in_use': 3, 'device_bytes_peak': 5},
      )

  def test_a_device_without_statistics_gives_nothing(self):
    device = mock.Mock(memory_stats=lambda: None)
    with mock.patch.object(jax, 'local_devices', return_value=[device]):
      self.assertEqual(monitoring.device_memory(), {})


if __name__ == '__main__':
  absltest.main()
