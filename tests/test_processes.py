"""Runs of several processes on one machine, as on several hosts."""

import os
import pathlib
import shutil
import signal
import socket
import tempfile
import threading
import time
from unittest import mock

import fake_processes
import jax
import numpy as np
import whole_runs
from absl.testing import absltest, parameterized

from proxy_nca_jax.runtime import metric_writer, processes, signals

_SMALL = {
  'num_steps': 24,
  'batch_size': 24,
  'log_every': 1,
  'save_every': 6,
  'eval_every': 12,
  'evaluation.batch_size': 240,
  # Differences by rounding grow slowly.
  'optimizer.proxies.learning_rate': 1e-3,
  'report': False,
  'evaluation.kmeans_iterations': 0,
  'evaluation.nearest_only': True,
  'dataset.num_classes': 41,  # Not divisible by 2.
  'dataset.validation': '2/2',
  'model.width': 4,
}
# For runs whose scores are not tested: less to compile.
_UNSCORED = {'evaluation.baselines': False}


def _start(workdir, number, *, each=None, **fields):
  """Starts a run of `number` processes with one device each.

  Args:
    workdir: the workdir, or that of each process.
    number: the number of processes.
    each: fields of each process; by default all have the same.
    **fields: fields of the config.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  workdirs = [workdir] * number if isinstance(workdir, str) else workdir
  return [
    whole_runs.Fork(
      whole_runs.command(
        'glyphs', workdir, *flags, **(_SMALL | fields | own_fields)
      )
    )
    for workdir, own_fields, flags in zip(
      workdirs,
      each or [{}] * number,
      [()]
      if number == 1
      else [
        (
          f'--coordinator_address={address}',
          f'--num_processes={number}',
          f'--process_id={index}',
        )
        for index in range(number)
      ],
    )
  ]


def _finish(started):
  """Returns the exit status and the output of each process."""
  return zip(*map(whole_runs.finish, started))


class RunTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    cls.one = str(cls.root / 'one')
    cls.two = str(cls.root / 'two')
    # As on hosts that share the workdir but not the prepared data.
    each = [
      {'dataset.data_dir': cls.root / name} for name in ('data0', 'data1')
    ]
    # In turn: none of them waits long for another.
    for workdir, number, fields in (
      (cls.one, 1, {'num_steps': 32}),
      (cls.two, 2, {'proxies.sharded': True, 'each': each}),
    ):
      codes, outputs = _finish(_start(workdir, number, **fields))
      assert set(codes) == {0}, outputs
    cls.outputs = outputs

  def _workdir(self):
    return tempfile.mkdtemp(dir=self.root)

  def _assert_steps_are_of_one_process(self, workdir, *, num_steps):
    rows, expected = (
      [
        row
        for row in metric_writer.read_metrics(folder)
        if 'loss' in row and row['step'] <= num_steps
      ]
      for folder in (workdir, self.one)
    )
    self.assertEqual([row['step'] for row in rows], [*range(1, num_steps + 1)])
    for row, other in zip(rows, expected):
      self.assertEqual(row['step'], other['step'])
      for name in ('loss', 'proxy_error', 'gradient_norm'):
        # Losses cross 0, where relative tolerance is void.
        np.testing.assert_allclose(row[name], other[name], rtol=1e-5, atol=1e-5)

  def test_two_processes_train_as_one_does(self):
    self._assert_steps_are_of_one_process(self.two, num_steps=24)
    # Raw pixels do not depend on the training.
    results, expected = map(whole_runs.results, (self.two, self.one))
    self.assertEqual(results['raw_pixels'], expected['raw_pixels'])
    recall, expected = (
      [
        row['validation.recall@1']
        for row in metric_writer.read_metrics(folder)
        if row['step'] == 12 and 'validation.recall@1' in row
      ]
      for folder in (self.two, self.one)
    )
    np.testing.assert_allclose(recall, expected, atol=0.002)
    self.assertLen(recall, 1)

  def test_only_the_primary_process_logs_steps(self):
    self.assertIn('step 24/24', self.outputs[0])
    self.assertNotIn('step', self.outputs[1])

  def test_sharded_proxies_move_to_other_numbers_of_processes(self):
    workdir = self._workdir()
    shutil.copytree(self.two, workdir, dirs_exist_ok=True)
    for number, last in ((3, 28), (1, 32)):
      codes, outputs = _finish(
        _start(workdir, number, num_steps=last, **_UNSCORED)
      )
      self.assertEqual(set(codes), {0}, outputs)
      self.assertIn(f'Resuming after step {last - 4}', outputs[0])
    self._assert_steps_are_of_one_process(workdir, num_steps=32)

  def test_a_kill_or_stop_of_one_process_ends_all_and_they_resume(self):
    workdir = self._workdir()
    fields = _UNSCORED | {'proxies.sharded': True}
    for killed, step in ((0, 4), (1, 11)):
      started = _start(workdir, 2, **fields)
      whole_runs.wait_for(started[0], f'step {step}/24')
      started[killed].kill()
      begun = time.monotonic()
      codes, outputs = _finish(started)
      self.assertLess(time.monotonic() - begun, 90)
      self.assertNotEqual(codes[1 - killed], 0)
      self.assertIn(
        'Another process of this run has ended', outputs[1 - killed]
      )
    started = _start(workdir, 2, **fields)
    # JAX polls for signals every second, sooner than the first step compiles.
    whole_runs.wait_for(started[0], 'Resuming after step')
    started[1].send_signal(signal.SIGTERM)
    codes, outputs = _finish(started)
    self.assertEqual(codes, (128 + signal.SIGTERM,) * 2, outputs)
    self.assertIn('and saved. The same command resumes', outputs[0])
    codes, outputs = _finish(_start(workdir, 2, **fields))
    self.assertEqual(codes, (0, 0), outputs)
    whole_runs.assert_same_state(workdir, self.two)

  def test_hosts_without_a_shared_data_folder_prepare_their_own(self):
    self.assertRegex(self.outputs[0], 'do not share .*data0 .* each of them')
    for name in ('data0', 'data1'):
      self.assertNotEmpty([*(self.root / name).glob('glyphs/*/*/*.json')])

  @parameterized.named_parameters(
    ('of the primary', 'This workdir holds a run with another', 0, {}),
    (
      'of separate workdirs',
      'do not appear on process 1. Use a workdir',
      1,
      {},
    ),
    (
      'of another split',
      'Processes 0 and 1 have split the data differently',
      0,
      {'dataset.num_classes': 40},
    ),
  )
  def test_all_processes_end_with_the_error(self, message, is_apart, of_second):
    workdir = self._workdir()
    workdirs = [workdir, self._workdir() if is_apart else workdir]
    if 'another' in message:
      workdirs = [self.two] * 2
    started = _start(
      workdirs, 2, each=[{}, of_second], batch_size=48, **_UNSCORED
    )
    for code, output in zip(*_finish(started)):
      line = whole_runs.assert_one_line_error(code, output)
      self.assertIn(message, line)


class AgreementTest(absltest.TestCase):
  def test_each_process_receives_the_results_of_all(self):
    def call(value):
      return lambda: processes.run_on_each(lambda: value)

    # Of different lengths.
    results = fake_processes.run([call('a'), call(None), call([1, 'bc'])])
    self.assertEqual(results, [['a', None, [1, 'bc']]] * 3)
    self.assertEqual(processes.run_on_each(lambda: 1), [1])

  def test_the_failure_of_one_process_ends_all(self):
    def fail(error):
      raise error

    def call(error):
      return lambda: processes.run_on_each(lambda: error and fail(error))

    for error, text in (
      (ValueError('wrong'), 'On process 1: wrong'),
      (OSError(2, 'No such file'), r'On process 1: \[Errno 2\] No such file'),
      (KeyError('a'), "On process 1: Process 1 has failed: KeyError: 'a'"),
    ):
      first, second, third = fake_processes.run(
        [call(x) for x in (0, error, 0)]
      )
      self.assertIs(second, error)
      for other in (first, third):
        self.assertIsInstance(other, ValueError)
        self.assertRegex(str(other), text)
    stopped = signals.Stopped(signal.SIGTERM)
    first, _ = fake_processes.run([call(0), call(stopped)])
    self.assertIsInstance(first, signals.Stopped)

  def test_processes_with_another_folder_are_found(self):
    shared, other = (self.create_tempdir().full_path for _ in range(2))

    def call(folder):
      return lambda: processes.find_apart(folder)

    with mock.patch.object(processes, '_APPEAR_SECONDS', 0):
      for folders, expected in (
        ([shared, shared], []),
        ([shared, other, shared], [1]),
        ([shared, f'{other}/none', other], [1, 2]),
        # The primary process creates it.
        ([f'{shared}/new'] * 2, []),
      ):
        with self.subTest(folders):
          results = fake_processes.run([call(folder) for folder in folders])
          self.assertEqual(results, [expected] * len(folders))
    self.assertEqual(os.listdir(shared), ['new'])
    self.assertEmpty(os.listdir(f'{shared}/new'))
    self.assertEmpty(os.listdir(other))

  def test_a_file_that_appears_late_is_found(self):
    path = os.path.join(self.create_tempdir(), 'a')
    timer = threading.Timer(0.2, lambda: open(path, 'w').close())
    timer.start()
    self.assertTrue(processes._appears(path))
    timer.join()


def _unreachable():
  raise OSError('no such host')


class InitializeTest(parameterized.TestCase):
  @parameterized.named_parameters(
    # Name, variables, hosts in the metadata of a TPU VM, whether others exist.
    ('plain host', {}, None, False),
    ('jax', {'JAX_COORDINATOR_ADDRESS': 'host:1234'}, None, True),
    ('slurm', {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '0'}, None, True),
    ('slurm, one task', {'SLURM_STEP_NUM_TASKS': '1'}, None, False),
    ('sbatch without srun', {'SLURM_NTASKS': '8'}, None, False),
    ('open mpi', {'OMPI_COMM_WORLD_SIZE': '2'}, None, True),
    ('open mpi, one process', {'OMPI_COMM_WORLD_SIZE': '1'}, None, False),
    ('mpich', {'PMI_SIZE': '2'}, None, True),
    ('torchrun', {'WORLD_SIZE': '2', 'RANK': '0'}, None, True),
    ('gke', {'TPU_PROCESS_ADDRESSES': 'a:8476,b:8476'}, None, True),
    ('gke, older', {'TPU_WORKER_HOSTNAMES': 'host-0,host-1'}, None, True),
    ('gke, one host', {'TPU_WORKER_HOSTNAMES': 'localhost'}, None, False),
    (
      'multislice of one host each',
      {'TPU_WORKER_HOSTNAMES': 'localhost', 'MEGASCALE_NUM_SLICES': '2'},
      None,
      True,
    ),
    (
      'kubernetes, pods of their own',
      {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'},
      None,
      False,
    ),
    ('tpu slice', {'TPU_ML_PLATFORM': 'JAX'}, '10.0.0.1,10.0.0.2', True),
    ('tpu host', {'TPU_ML_PLATFORM': 'JAX'}, 'a:0:10.0.0.1', False),
    ('tpu elsewhere', {'TPU_ML_PLATFORM': 'JAX'}, None, False),
    (
      'tpu slice, on the cpu',
      {'TPU_ML_PLATFORM': 'JAX', 'JAX_PLATFORMS': 'cpu'},
      '10.0.0.1,10.0.0.2',
      False,
    ),
    (
      'tpu without metadata',
      {'TPU_ML_PLATFORM': 'JAX', 'TPU_SKIP_MDS_QUERY': '1'},
      '10.0.0.1,10.0.0.2',
      False,
    ),
  )
  def test_processes_are_found_by(self, environment, hosts, expected):
    read = _unreachable if hosts is None else lambda: hosts
    self.assertEqual(processes._has_cluster(environment, read), expected)

  @parameterized.parameters(True, False)
  def test_only_a_run_of_several_processes_joins(self, joins):
    environment = {'SLURM_STEP_NUM_TASKS': '4'} if joins else {}
    with mock.patch.object(jax.distributed, 'initialize') as initialize:
      processes.initialize(environment=environment)
      self.assertEqual(initialize.call_count, joins)
      processes.initialize(environment={}, multiprocess=True)
      self.assertEqual(initialize.call_count, joins + 1)

  @parameterized.parameters(
    ValueError('coordinator_address should be defined.'),
    KeyError('OMPI_COMM_WORLD_RANK'),
  )
  def test_processes_that_jax_does_not_find_need_the_flags(self, error):
    with (
      mock.patch.object(jax.distributed, 'initialize', side_effect=error),
      self.assertRaisesRegex(
        ValueError, 'give --coordinator_address=HOST:PORT'
      ),
    ):
      processes.initialize(environment={'OMPI_COMM_WORLD_SIZE': '2'})

  @parameterized.parameters(
    (dict(num_processes=2, process_id=0), 'require --coordinator_address'),
    (
      dict(coordinator_address='h:1', num_processes=2, process_id=2),
      r'--process_id \(2\) must be in \[0, 2\)',
    ),
  )
  def test_incomplete_or_invalid_arguments_are_explained(
    self, arguments, message
  ):
    with self.assertRaisesRegex(ValueError, message):
      processes.initialize(**arguments, environment={})

  @parameterized.parameters(AssertionError(), RuntimeError('no backend'))
  def test_a_platform_without_devices_is_an_error(self, error):
    with (
      mock.patch.object(jax, 'devices', side_effect=error),
      self.assertRaisesRegex(ValueError, 'no device for JAX_PLATFORMS='),
    ):
      processes.devices()

  @parameterized.parameters(
    (ValueError('wrong'), '^wrong$'),
    (OSError(2, 'No such file', 'a'), "No such file: 'a'"),
    (KeyError('name'), "^Process 0 has failed: KeyError: 'name'$"),
    (SystemExit(3), '^Process 0 has failed: SystemExit: 3$'),
    (None, 'Process 0 has failed: TypeError: .* not JSON serializable'),
    (signals.Stopped(signal.SIGTERM), '^SIGTERM$'),
  )
  def test_whatever_fails_on_the_primary_ends_the_others(self, error, text):
    sent = []

    def work():
      if error:
        raise error
      return object()

    def send(content):
      sent.append(content)
      return content

    with mock.patch.multiple(
      processes, _broadcast=send, is_primary=lambda: True
    ):
      with mock.patch.object(jax, 'process_count', return_value=2):
        with self.assertRaises(type(error) if error else TypeError):
          processes.run_on_primary(work)
    with mock.patch.multiple(
      processes, _broadcast=lambda _: sent[0], is_primary=lambda: False
    ):
      with mock.patch.object(jax, 'process_count', return_value=2):
        kind = ValueError
        if isinstance(error, signals.Stopped):
          kind = signals.Stopped
        with self.assertRaisesRegex(kind, text):
          processes.run_on_primary(self.fail)

  def test_a_single_process_is_its_own_primary(self):
    self.assertEqual(processes.run_on_primary(lambda: (1, None)), (1, None))
    self.assertTrue(processes.true_on_all(True))
    self.assertFalse(processes.true_on_all(False))


if __name__ == '__main__':
  absltest.main()
