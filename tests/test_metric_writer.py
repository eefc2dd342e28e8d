import os

from absl.testing import absltest

from proxy_nca_jax.runtime import metric_writer


class MetricWriterTest(absltest.TestCase):
  def _write(self, workdir, first_step, steps):
    writer = metric_writer.MetricWriter(workdir, first_step=first_step)
    for step in steps:
      writer.write_scalars(step, {'loss': step / 4})
    writer.close()

  def test_a_resumed_run_has_the_rows_of_a_straight_one(self):
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

  def test_a_damaged_line_is_named(self):
    workdir = self.create_tempdir().full_path
    path = os.path.join(workdir, 'metrics.jsonl')
    for line in ('{"step": 2, ', '[1]', '{"loss": 1}', '{"step": "x"}', '\x00'):
      with open(path, 'w') as file:
        file.write(f'{{"step": 1}}\n{line}\n')
      with self.assertRaisesRegex(ValueError, 'Line 2 of .* is damaged'):
        metric_writer.read_metrics(workdir)
    with open(path, 'w') as file:
      file.write('{"step": 1}\n{"step": 2, ')
    self.assertEqual(metric_writer.read_metrics(workdir), [{'step': 1}])


if __name__ == '__main__':
  absltest.main()
