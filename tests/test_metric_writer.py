import os

import numpy as np
from absl.testing import absltest

from proxy_nca_jax import metric_writer


class MetricWriterTest(absltest.TestCase):

  def _write(self, workdir, first_step, steps):
    writer = metric_writer.MetricWriter(workdir, first_step=first_step)
    for step in steps:
      writer.write_scalars(step, {'loss': step / 4})
    writer.close()

  def test_a_resumed_run_repeats_no_row(self):
    straight, resumed = self.create_tempdir(), self.create_tempdir()
    self._write(straight.full_path, 0, range(1, 9))
    self._write(resumed.full_path, 0, range(1, 8))
    with open(os.path.join(resumed, 'metrics.jsonl'), 'a') as file:
      file.write('{"step": 8, "lo')  # Killed in the middle of a row.
    self._write(resumed.full_path, 5, range(6, 9))
    self.assertEqual(
      metric_writer.read_metrics(resumed.full_path),
      metric_writer.read_metrics(straight.full_path),
    )

  def test_tensorboard_gets_the_scalars(self):
    workdir = self.create_tempdir().full_path
    self._write(workdir, 0, [1])
    (name,) = os.listdir(os.path.join(workdir, 'tensorboard'))
    with open(os.path.join(workdir, 'tensorboard', name), 'rb') as file:
      self.assertIn(b'loss', file.read())


class ProgressTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = self.create_tempdir().full_path
    writer = metric_writer.MetricWriter(self.workdir, first_step=0)
    self.addCleanup(writer.close)
    self.progress = metric_writer.Progress(
      writer, num_steps=100, batch_size=8
    )

  def _add(self, step, loss=1.0, gradient_norm=1.0):
    metrics = {
      'loss': loss, 'gradient_norm': gradient_norm, 'proxy_accuracy': 0.5
    }
    self.progress.add(
      step, {name: np.float32(value) for name, value in metrics.items()}
    )

  def test_the_newest_step_is_reported(self):
    for step in (1, 2, 3):
      self._add(step, loss=step)
    with self.assertLogs('proxy_nca_jax', 'INFO') as logs:
      self.progress.report()
    self.assertRegex(
      logs.output[0], r'step 3/100  loss 3.0000 .* 50%  \d+ images/s  .* left'
    )
    (row,) = metric_writer.read_metrics(self.workdir)
    self.assertEqual((row['step'], row['loss']), (3, 3))
    self.assertGreater(row['images_per_second'], 0)

  def test_steps_that_are_not_finite_are_named(self):
    self._add(1)
    self.progress.check()
    self._add(2, loss=np.nan)
    self._add(3)
    self._add(4, gradient_norm=np.inf)
    with self.assertRaisesRegex(ValueError, 'step 2, 4'):
      self.progress.check()


if __name__ == '__main__':
  absltest.main()
