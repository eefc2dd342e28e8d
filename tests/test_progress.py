from unittest import mock

import numpy as np
from absl.testing import absltest

from proxy_nca_jax.runtime import metric_writer, monitoring, progress


class ProgressTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = self.create_tempdir().full_path
    writer = metric_writer.MetricWriter(self.workdir, first_step=0)
    self.addCleanup(writer.close)
    self.progress = progress.Progress(
      writer, num_steps=100, batch_size=8, max_skipped=3
    )

  def _add(
    self, step, loss=1.0, gradient_norm=1.0, input_seconds=0.0, **counts
  ):
    metrics = {
      'loss': loss,
      'gradient_norm': gradient_norm,
      'proxy_accuracy': 0.5,
    }
    metrics = {name: np.float32(value) for name, value in metrics.items()}
    counts = {name: np.int32(value) for name, value in counts.items()}
    self.progress.add(step, metrics | counts, input_seconds=input_seconds)

  def _rows(self):
    return metric_writer.read_metrics(self.workdir)

  def test_the_newest_step_is_reported(self):
    for step in (1, 2, 3):
      self._add(step, loss=step)
    with self.assertLogs('proxy_nca_jax', 'INFO') as logs:
      self.progress.report()
      self.progress.check()
    self.assertRegex(
      logs.output[0],
      r'step 3/100  loss 3.0000  proxy accuracy 50%  \d+ images/s  .* left',
    )
    (row,) = self._rows()
    self.assertEqual((row['step'], row['loss']), (3, 3))
    self.assertGreater(row['images_per_second'], 0)
    self.assertAlmostEqual(
      row['images_per_second'], 8 * row['steps_per_second']
    )
    # CPUs report no memory statistics.
    self.assertNotIn('device_bytes_in_use', row)

  def test_a_report_waits_for_the_next_step(self):
    self._add(1)
    self._add(2, loss=2)
    self.progress.report()
    self.assertEqual(self._rows(), [])
    self._add(3, loss=3)
    (row,) = self._rows()
    self.assertEqual((row['step'], row['loss']), (2, 2))
    # It is written only once.
    self._add(4)
    self.progress.check()
    self.assertLen(self._rows(), 1)

  def test_a_dispatch_of_several_steps_reports_its_last(self):
    def metrics(*losses):
      names = ('loss', 'gradient_norm')
      return dict.fromkeys(names, np.float32(losses))

    self.progress.add(3, metrics(1, 2, 3))
    self.progress.report()
    self.progress.check()
    (row,) = self._rows()
    self.assertEqual((row['step'], row['loss']), (3, 3))
    self.progress.add(6, metrics(4, np.nan, 6))
    with self.assertRaisesRegex(ValueError, 'not finite at step 5'):
      self.progress.check()

  def test_throughput_covers_the_steps_between_reports(self):
    with mock.patch.object(progress.time, 'monotonic') as clock:
      clock.return_value = 100.0
      self._add(1, input_seconds=50)  # Before and during compilation.
      clock.return_value = 104.0
      self._add(2, input_seconds=51)
      self._add(3, input_seconds=51)
      self.progress.report()
      self._add(4, input_seconds=52)
      clock.return_value = 110.0
      self._add(5, input_seconds=55)
      self.progress.report()
      self.progress.check()
      # Evaluation takes 1000 seconds.
      clock.return_value = 1110.0
      self.progress.restart_clock()
      clock.return_value = 1112.0
      self._add(6, input_seconds=55)
      self.progress.report()
      self.progress.check()
    names = ('step', 'steps_per_second', 'input_wait')
    self.assertEqual(
      [tuple(row[name] for name in names) for row in self._rows()],
      [(3, 2 / 4, 2 / 4), (5, 2 / 6, 3 / 6), (6, 1 / 2, 0)],
    )

  def test_device_memory_is_reported_if_available(self):
    memory = {'device_bytes_in_use': 3}
    self._add(1)
    with mock.patch.object(monitoring, 'device_memory', return_value=memory):
      self.progress.report()
      self.progress.check()
    (row,) = self._rows()
    self.assertEqual(row['device_bytes_in_use'], 3)

  def test_skipped_steps_are_named_and_counted(self):
    self._add(1, skipped_steps=4, skipped_in_row=0)
    self._add(2, loss=np.nan, skipped_steps=5, skipped_in_row=1)
    self._add(3, gradient_norm=np.inf, skipped_steps=6, skipped_in_row=2)
    self.progress.report()
    with self.assertLogs('proxy_nca_jax', 'INFO') as logs:
      self.progress.check()
    self.assertRegex(logs.output[0], 'Skipped step 2, 3.*; 6 skipped in total')
    self.assertRegex(logs.output[1], 'step 3/100 .* 6 skipped')
    (row,) = self._rows()
    self.assertEqual((row['loss'], row['skipped_steps']), (1, 6))
    self.assertNotIn('gradient_norm', row)  # Infinity is not JSON.

  def test_too_many_consecutive_skips_are_an_error(self):
    for step in (2, 3, 4):
      self._add(step, np.nan, skipped_steps=step, skipped_in_row=step - 1)
    self._add(5, skipped_steps=4, skipped_in_row=0)
    with self.assertRaisesRegex(
      ValueError, '3 consecutive steps.*up to step 4'
    ):
      self.progress.check()

  def test_non_finite_steps_are_named(self):
    self._add(1)
    self.progress.check()
    self._add(2, loss=np.nan)
    self._add(3)
    self._add(4, gradient_norm=np.inf)
    with self.assertRaisesRegex(ValueError, 'step 2, 4'):
      self.progress.check()


if __name__ == '__main__':
  absltest.main()
