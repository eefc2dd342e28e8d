import json
import logging
import os
import time
from unittest import mock

import fake_processes
import fsspec
import jax
import numpy as np
import one_convolution
import whole_runs
from absl.testing import absltest
from PIL import Image

from proxy_nca_jax import train
from proxy_nca_jax.configs import default, image_folder
from proxy_nca_jax.runtime import (
  metric_writer,
  processes,
  remote,
  saved_json,
  workdir,
)


def _config(**fields):
  config = default.get_config()
  config.update_from_flattened_dict(fields)
  return config


class WorkdirTest(absltest.TestCase):
  def test_a_name_that_is_not_utf8_is_refused_before_anything_is_written(self):
    root = self.create_tempdir().full_path
    path = os.path.join(root, os.fsdecode(b'caf\xe9'))
    with self.assertRaisesRegex(ValueError, r'The workdir is ".*/caf.xe9"'):
      with workdir.opened(path):
        self.fail('It was opened.')
    self.assertEmpty(os.listdir(root))

  def test_processes_with_separate_workdirs_end_with_one_line(self):
    folders = [self.create_tempdir().full_path for _ in range(3)]

    def call(folder):
      return lambda: workdir._check_shared(folder)

    with mock.patch.object(processes, '_APPEAR_SECONDS', 0):
      self.assertEqual(
        fake_processes.run([call(folders[0])] * 3), [None, None, None]
      )
      errors = fake_processes.run([call(folder) for folder in folders])
    for error, folder in zip(errors, folders):
      self.assertIsInstance(error, ValueError)
      self.assertRegex(
        str(error), f'share the workdir .{folder}.*on processes 1, 2. Use a'
      )

  def test_json_round_trips(self):
    path = os.path.join(self.create_tempdir(), 'a.json')
    self.assertIsNone(saved_json.read(path))
    workdir.write_json(path, {'a': [1, 2]})
    self.assertEqual(saved_json.read(path), {'a': [1, 2]})

  def test_a_path_that_orbax_takes_for_a_pattern_is_refused(self):
    root = self.create_tempdir().full_path
    for name in ('run [1]', 'run*', 'run?'):
      path = os.path.join(root, name)
      with self.assertRaisesRegex(ValueError, 'contains .* cannot be read'):
        with workdir.opened(path):
          self.fail()
      self.assertFalse(os.path.exists(path))

  def test_damaged_json_is_named(self):
    path = os.path.join(self.create_tempdir(), 'run.json')
    for content in (
      b'',
      b'{"a": ',
      b'[1, 2]',
      b'null',
      b'\xff\xfe',
      b'[' * 9**5,
    ):
      with open(path, 'wb') as file:
        file.write(content)
      with self.assertRaisesRegex(ValueError, r'run\.json. is damaged'):
        saved_json.read(path)

  def test_json_that_cannot_be_written_keeps_the_old_file(self):
    path = os.path.join(self.create_tempdir(), 'results.json')
    workdir.write_json(path, {'a': 1})
    with self.assertRaises(TypeError):
      workdir.write_json(path, {'a': object()})
    with open(path) as file:
      self.assertEqual(json.load(file), {'a': 1})


class RemoteTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.storage = fsspec.filesystem('memory')
    self.addCleanup(self.storage.store.clear)
    self.url = 'memory://bucket/run'
    # Acquiring a lease pauses for a sixtieth of its duration.
    self.enter_context(mock.patch.object(time, 'sleep'))

  def _read(self, name):
    return self.storage.cat_file(f'{self.url}/{name}').decode()

  def _write_lease(self, *, age):
    lease = {'owner': 'host:1', 'renewed': time.time() - age, 'seconds': 120}
    self.storage.pipe_file(f'{self.url}/lease.json', json.dumps(lease).encode())

  def test_the_log_and_files_arrive_in_the_storage(self):
    logger = logging.getLogger('proxy_nca_jax')
    self.addCleanup(logger.setLevel, logger.level)
    logger.setLevel(logging.INFO)  # Also clears its cache of levels.
    for word in ('first', 'second'):
      with workdir.opened(self.url) as folder:
        logger.info(word)
        workdir.write_json(os.path.join(folder.path, 'a.json'), {'a': word})
    self.assertRegex(self._read('log.txt'), 'first\n.*second\n')
    self.assertEqual(json.loads(self._read('a.json')), {'a': 'second'})

  def test_a_second_run_is_refused_while_the_lease_is_fresh(self):
    self._write_lease(age=100)
    with self.assertRaisesRegex(
      ValueError,
      'Another run is using .memory://bucket/run. .host:1, whose lease expires '
      'in 20 s unless renewed.: wait for it to end, or use another workdir.',
    ):
      with workdir.opened(self.url):
        pass

  def test_taking_over_an_expired_lease_is_logged_with_its_owner(self):
    self._write_lease(age=130)
    with workdir.opened(self.url):
      pass
    self.assertIn(
      'over from host:1, whose lease expired 10 s ago', self._read('log.txt')
    )

  def test_several_processes_are_refused(self):
    with mock.patch.object(jax, 'process_count', return_value=4):
      with self.assertRaisesRegex(
        ValueError, '4 processes cannot share.*file system that all'
      ):
        with workdir.opened(self.url):
          pass

  def test_a_local_folder_has_no_lease_and_publishes_nothing(self):
    path = self.create_tempdir().full_path
    with workdir.opened(path) as folder:
      self.assertEqual(folder.path, path)
      folder.publish()
    self.assertEqual(sorted(os.listdir(path)), ['lock', 'log.txt'])


class RemoteRunTest(absltest.TestCase):
  def test_a_run_in_parts_on_storage_equals_a_straight_one_on_disk(self):
    self.enter_context(one_convolution.replaced())
    storage = fsspec.filesystem('memory')
    self.addCleanup(storage.store.clear)
    # Acquiring a lease pauses for a sixtieth of its duration.
    self.enter_context(mock.patch.object(remote, 'LEASE_SECONDS', 1.0))
    url = 'memory://bucket/run'
    config = self._config()
    straight = self.create_tempdir().full_path
    results = train.train_and_evaluate(config, straight)
    config.num_steps = 3
    train.train_and_evaluate(config, url)
    config.num_steps = 6
    self.assertEqual(train.train_and_evaluate(config, url), results)
    paths = storage.find(url)
    names = {path.split('/')[3] for path in paths}
    self.assertLessEqual(
      {
        'checkpoints',
        'log.txt',
        'manifest.json',
        'metrics.jsonl',
        'report.html',
        'results.json',
        'run.json',
        'tensorboard',
      },
      names,
    )
    self.assertNotIn('lease.json', names)
    with workdir.opened(url) as folder:
      paths = (folder.path, straight)
      whole_runs.assert_same_state(*paths)
      rows = [metric_writer.read_metrics(path) for path in paths]
    losses = [[row['loss'] for row in r if 'loss' in row] for r in rows]
    self.assertLen(losses[0], 6)
    self.assertEqual(*losses)

  def _config(self):
    rng = np.random.default_rng(0)
    root = self.create_tempdir().full_path
    for label in range(4):
      os.makedirs(os.path.join(root, str(label)))
      for number in range(4):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = os.path.join(root, str(label), f'{number}.png')
        Image.fromarray(pixels).save(path)
    config = image_folder.get_config('scratch')
    config.update_from_flattened_dict(
      {
        'num_steps': 6,
        'batch_size': 8,
        'log_every': 1,
        'save_every': 2,
        'model.width': 4,
        'dataset.resize': 16,
        'dataset.image_size': 16,
        'dataset.root': root,
        'evaluation.batch_size': 8,
        'evaluation.nearest_only': True,
        'evaluation.kmeans_iterations': 0,
        'dataset.data_dir': self.create_tempdir().full_path,
      }
    )
    return config


if __name__ == '__main__':
  absltest.main()
