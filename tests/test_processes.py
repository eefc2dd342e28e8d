"""Runs of several processes on one machine, as on several hosts."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax import metric_writer, processes

_ROOT = pathlib.Path(__file__).parent.parent

_SMALL = {
  'num_steps': 20,
  'batch_size': 32,
  'log_every': 1,
  'save_every': 5,
  'eval_every': 10,
  'dataset.num_classes': 41,  # Train classes that 2 and 4 do not divide.
  'dataset.validation': '2/2',
  'model.width': 4,
}


def _start(workdir, data_dir, number, **fields):
  """Starts a run of so many processes, of one device each."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  fields = {'dataset.data_dir': data_dir, **_SMALL, **fields}
  command = [
    sys.executable,
    str(_ROOT / 'main.py'),
    f'--config={_ROOT}/configs/glyphs.py',
    f'--workdir={workdir}',
    *(f'--config.{name}={value}' for name, value in fields.items()),
  ]
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONUNBUFFERED': '1'
  }
  return [
    subprocess.Popen(
      command + ([] if number == 1 else [
        f'--coordinator_address={address}', f'--num_processes={number}',
        f'--process_id={index}',
      ]),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=environment,
    )
    for index in range(number)
  ]


def _finish(started):
  """Returns the exit status and the output of each process."""
  outputs = [process.communicate(timeout=300)[0] for process in started]
  return [process.returncode for process in started], outputs


class RunTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    cls.data_dir = str(cls.root / 'data')
    cls.one = str(cls.root / 'one')
    cls.two = str(cls.root / 'two')
    for workdir, number in ((cls.one, 1), (cls.two, 2)):
      codes, outputs = _finish(_start(workdir, cls.data_dir, number))
      assert codes == [0] * number, outputs
    cls.outputs = outputs

  def _workdir(self):
    return tempfile.mkdtemp(dir=self.root)

  def _assert_equals_one_process(self, workdir):
    rows, expected = (
      metric_writer.read_metrics(folder) for folder in (workdir, self.one)
    )
    self.assertLen(rows, len(expected))
    for row, other in zip(rows, expected):
      self.assertEqual(row['step'], other['step'])
      for name in ('loss', 'proxy_error', 'gradient_norm'):
        if name in other:
          np.testing.assert_allclose(row[name], other[name], rtol=1e-5)
    results, expected = (
      json.loads(pathlib.Path(folder, 'results.json').read_text())
      for folder in (workdir, self.one)
    )
    # Nothing was trained: the embeddings are the same.
    self.assertEqual(results['raw_pixels'], expected['raw_pixels'])
    for title in ('trained', 'selected'):
      np.testing.assert_allclose(
        results[title]['recall@1'], expected[title]['recall@1'], atol=0.002
      )

  def test_two_processes_train_as_one_does(self):
    self._assert_equals_one_process(self.two)

  def test_process_0_speaks_for_all(self):
    self.assertIn('step 20/20', self.outputs[0])
    self.assertNotIn('step', self.outputs[1])

  def test_all_end_with_the_error_of_process_0(self):
    codes, outputs = _finish(
      _start(self.two, self.data_dir, 2, **{'batch_size': 64})
    )
    self.assertEqual(codes, [2, 2])
    for output in outputs:
      self.assertRegex(output, 'Error: This workdir holds a run with another')


class InitializeTest(parameterized.TestCase):

  @parameterized.parameters(
    ({},),
    ({'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'},),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'},),
  )
  def test_one_process_alone_joins_nothing(self, environment):
    processes.initialize(environment=environment)
    self.assertEqual(jax.process_count(), 1)

  @parameterized.parameters(
    ({'SLURM_STEP_NUM_TASKS': '4'},),
    ({'OMPI_COMM_WORLD_SIZE': '2'},),
    ({'TPU_WORKER_HOSTNAMES': 'host-0,host-1'},),
    ({'JAX_COORDINATOR_ADDRESS': 'host:1234'},),
  )
  def test_clusters_tell_of_several_processes(self, environment):
    self.assertTrue(processes._has_cluster(environment))

  @parameterized.parameters(
    (dict(num_processes=2, process_id=0), 'need --coordinator_address'),
    (
      dict(coordinator_address='h:1', num_processes=2, process_id=2),
      r'--process_id \(2\) must be in \[0, 2\)',
    ),
  )
  def test_what_does_not_fit_is_said(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      processes.initialize(**arguments, environment={})

  def test_one_process_is_told_what_it_says(self):
    self.assertEqual(processes.of_first(lambda: (1, None)), (1, None))
    self.assertTrue(processes.all_of(True))
    self.assertFalse(processes.all_of(False))


if __name__ == '__main__':
  absltest.main()
