"""Whole runs in this process: skipped steps, kills, and what is saved."""

import contextlib
import json
import pathlib
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import fake_processes
import jax
import numpy as np
import one_convolution
import test_train_step
import whole_runs
from absl.testing import absltest
from PIL import Image

from proxy_nca_jax import datasets, input_pipeline, train, train_step
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import default, image_folder
from proxy_nca_jax.datasets import summary
from proxy_nca_jax.runtime import metric_writer, processes


class _Killed(Exception):
  """Ends a run as SIGKILL does: nothing is saved."""


class WriteRunTest(absltest.TestCase):
  def test_the_license_of_the_weights_is_saved(self):
    config = image_folder.get_config('foundation')
    config.model.name = 'convnextv2_nano'
    workdir = self.create_tempdir().full_path
    data = SimpleNamespace(
      digest='x', train=SimpleNamespace(class_names=('a', 'b'))
    )
    train._write_run(config, data, 'y', workdir)
    saved = json.loads((pathlib.Path(workdir) / 'run.json').read_text())
    self.assertEqual(
      saved['weights_license'], 'CC-BY-NC-4.0, not for commercial use'
    )


class RunTest(absltest.TestCase):
  """Whole runs, on images of eight classes."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(one_convolution.replaced())
    cls.root = pathlib.Path(cls.enter_context(tempfile.TemporaryDirectory()))
    rng = np.random.default_rng(0)
    for name in 'abcdefgh':
      folder = cls.root / 'images' / name
      folder.mkdir(parents=True)
      pattern = rng.integers(0, 200, (16, 16, 3))
      for number in range(6):
        pixels = pattern + rng.integers(0, 56, (16, 16, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(folder / f'{number}.png')

  def _train(self, workdir, *, bad=(), slow=(), killed_at=None, **fields):
    """Trains for 14 steps; some are not finite, some wait for their batch."""
    config = image_folder.get_config('scratch')
    config.update_from_flattened_dict(
      {
        'dataset.root': str(self.root / 'images'),
        'dataset.data_dir': str(self.root / 'data'),
        'dataset.resize': 16,
        'dataset.image_size': 16,
        'model.width': 8,
        'batch_size': 16,
        'num_steps': 14,
        'log_every': 1,
        'save_every': 4,
        'evaluation.batch_size': 16,
        'evaluation.kmeans_iterations': 0,
        'evaluation.nearest_only': True,
        'evaluation.baselines': False,
        'report': False,
        **fields,
      }
    )
    original = input_pipeline.train_batches

    def train_batches(*args, first_step, **kwargs):
      with contextlib.closing(
        original(*args, first_step=first_step, **kwargs)
      ) as batches:
        for step, batch in enumerate(batches, first_step + 1):
          if step == killed_at:
            raise _Killed
          if step in slow:
            time.sleep(1)
          yield batch | {'label': batch['label'] * (step not in bad)}

    loss = test_train_step.broken_loss(train_step.make_loss(config), 'gradient')
    with (
      mock.patch.object(input_pipeline, 'train_batches', train_batches),
      mock.patch.object(train_step, 'make_loss', return_value=loss),
      self.assertLogs('proxy_nca_jax', 'INFO') as logs,
    ):
      try:
        return train.train_and_evaluate(config, str(workdir))
      finally:
        self.logs = '\n'.join(logs.output)

  def _steps_saved(self, workdir):
    checkpoints = state_lib.Checkpoints(str(workdir), keep=9)
    self.addCleanup(checkpoints.close)
    return checkpoints.steps

  def test_skipping_survives_a_kill_bit_for_bit(self):
    skip = {'optimizer.on_nonfinite': 'skip'}
    straight, killed = self.root / 'straight', self.root / 'killed'
    # What only watches may differ.
    results = self._train(
      straight,
      bad=(3, 9, 10),
      slow=(5,),
      stall_seconds=0.1,
      profile_steps=(6, 7),
      **skip,
    )
    self.assertRegex(self.logs, 'Step 5 has waited .* for its input')
    self.assertRegex(self.logs, 'Step 5 resumes after waiting .* for its input')
    self.assertIn('a profiler trace of steps 6 to 7 to', self.logs)
    self.assertLen(list((straight / 'profile').rglob('*.xplane.pb')), 1)
    self.assertRegex(self.logs, 'Skipped step 9.*; 2 skipped in total')
    self.assertEqual(results['skipped_steps'], 3)
    rows = metric_writer.read_metrics(str(straight))
    waits = [row['input_wait'] for row in rows if 'input_wait' in row]
    self.assertBetween(max(waits), 0, 1)
    self.assertGreaterEqual(min(waits), 0)
    # They are shares of the time between two rows, here of a step. The wait for
    # the batch of step 5 was of a second, however fast the machine is.
    seconds = [
      row['input_wait'] / row['steps_per_second']
      for row in rows
      if row.get('steps_per_second')
    ]
    self.assertGreater(max(seconds), 0.9)

    with self.assertRaises(_Killed):
      self._train(killed, bad=(3, 9, 10), killed_at=12, **skip)
    resumed = self._train(killed, bad=(3, 9, 10), **skip)
    self.assertIn('Resuming after step 8', self.logs)
    self.assertEqual(resumed, results)
    self.assertEqual(whole_runs.metrics(killed), whole_runs.metrics(straight))
    skipped = {
      row['step']: row['skipped_steps']
      for row in rows
      if 'skipped_steps' in row
    }
    self.assertEqual(
      list(skipped.values()), [0, 0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3]
    )
    for row in rows[1:-1]:
      self.assertEqual('gradient_norm' in row, row['step'] not in (3, 9, 10))
    whole_runs.assert_same_state(killed, straight)

  def test_too_many_skipped_in_a_row_stop_the_run(self):
    workdir = self.root / 'many'
    fields = {
      'optimizer.on_nonfinite': 'skip',
      'optimizer.max_skipped_steps': 2,
    }
    with self.assertRaisesRegex(
      ValueError, '2 consecutive steps .*up to step 10'
    ):
      self._train(workdir, bad=(3, 9, 10), **fields)
    self.assertEqual(self._steps_saved(workdir), [4, 8])
    # One may be patient with the same run.
    fields['optimizer.max_skipped_steps'] = 3
    results = self._train(workdir, bad=(3, 9, 10), **fields)
    self.assertEqual(results['skipped_steps'], 3)

  def test_the_state_before_training_is_a_candidate_also_after_a_kill(self):
    workdir = self.root / 'selected'
    fields = {
      'dataset.validation': '2/2',
      'eval_every': 14,
      'optimizer.backbone.learning_rate': 0.0,
      'optimizer.head.learning_rate': 0.0,
    }
    save = state_lib.Checkpoints.save

    def save_or_kill(checkpoints, step, state):
      if checkpoints.directory.endswith('selected'):
        raise _Killed
      save(checkpoints, step, state)

    with mock.patch.object(state_lib.Checkpoints, 'save', save_or_kill):
      with self.assertRaises(_Killed):
        self._train(workdir, **fields)
    # Nothing changes the embeddings: the first of equal scores is selected.
    results = self._train(workdir, **fields)
    self.assertEqual(results['selected_step'], 0)
    self.assertEqual(
      results['selected']['recall@1'], results['trained']['recall@1']
    )
    scored = [
      row['step']
      for row in metric_writer.read_metrics(str(workdir))
      if 'validation.recall@1' in row
    ]
    self.assertEqual(scored, [0, 14])

  def test_a_run_of_no_steps_saves_and_scores_the_initial_state(self):
    workdir = self.root / 'none'
    fields = {
      'num_steps': 0,
      'model.head_init': 'lda',
      'proxies.init': 'class_means',
      'evaluation.baselines': True,
      'evaluation.verification': True,
    }
    results = self._train(workdir, **fields)
    self.assertEqual(results['trained'], results['untrained'])
    # Four test classes of six images.
    self.assertEqual(results['verification']['num_genuine'], 4 * 15)
    self.assertIn('(equal error rate)', self.logs)
    self.assertEqual(self._steps_saved(workdir), [0])
    self.assertEqual(self._train(workdir, **fields), results)

  def test_a_run_with_periods_in_epochs_resumes_after_a_kill(self):
    workdir = self.root / 'epochs'
    fields = {
      'num_steps': 0,
      'num_epochs': 3.0,
      'period_unit': 'epoch',
      'eval_every': 2,
      'batch_size': 8,  # 24 images make 3 batches.
      'optimizer.proxies.schedule': 'step',
      'optimizer.proxies.decay_rate': 0.5,
      'optimizer.proxies.decay_at': (2,),
    }
    with self.assertRaises(_Killed):
      self._train(workdir, killed_at=6, **fields)
    self.assertEqual(self._train(workdir, **fields)['step'], 9)
    rows = metric_writer.read_metrics(str(workdir))
    rates = {
      row['step']: row['learning_rate.proxies']
      for row in rows
      if 'learning_rate.proxies' in row
    }
    self.assertAlmostEqual(rates[6] / rates[7], 2, places=5)
    scored = [row['step'] for row in rows if 'test.recall@1' in row]
    self.assertEqual(scored, [6, 9])

  def test_by_default_the_first_stops_the_run(self):
    workdir = self.root / 'stopped'
    with self.assertRaisesRegex(ValueError, 'is not finite at step 6'):
      self._train(workdir, bad=(6,))
    self.assertEqual(self._steps_saved(workdir), [4])


class DatasetTest(absltest.TestCase):
  def test_a_run_refuses_other_images_under_the_same_names(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    config = image_folder.get_config('scratch')
    config.batch_size = 4
    config.dataset.update(root=str(root), resize=16, image_size=16)
    config.dataset.data_dir = self.create_tempdir().full_path

    def write(seed):
      rng = np.random.default_rng(seed)
      for name in 'abcd':
        (root / name).mkdir(exist_ok=True)
        for number in range(2):
          pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
          Image.fromarray(pixels).save(root / name / f'{number}.png')

    write(seed=0)
    saved = {'dataset_digest': train.load_data(config).digest}
    write(seed=0)
    config.dataset.data_dir = self.create_tempdir().full_path
    train._load_same_data(config, saved)
    write(seed=1)
    with self.assertRaisesRegex(ValueError, 'has changed since .*other images'):
      train._load_same_data(config, saved)

  def _load(self, data_dirs, digests):
    """Loads data as processes with these folders and these digests."""
    loaded = []

    def load(config):
      del config
      if not jax.process_index():
        time.sleep(0.2)  # Others would overtake it, if they did not wait.
      loaded.append(jax.process_index())
      records, split = digests[jax.process_index()]
      return SimpleNamespace(
        records_digest=records, digest=split, train=None, test=None
      )

    def call(data_dir):
      config = default.get_config()
      config.dataset.data_dir = data_dir
      return lambda: train.load_data(config)

    with (
      mock.patch.object(datasets, 'load', load),
      mock.patch.object(summary, 'log'),
      mock.patch.object(input_pipeline, 'check_splits'),
      mock.patch.object(processes, '_APPEAR_SECONDS', 0),
    ):
      return fake_processes.run([call(folder) for folder in data_dirs]), loaded

  def test_each_process_loads_the_same_data(self):
    shared, other = (self.create_tempdir().full_path for _ in range(2))
    (first, second), loaded = self._load([shared, shared], [('r', 's')] * 2)
    self.assertEqual((first.digest, second.digest), ('s', 's'))
    self.assertEqual(loaded, [0, 1])
    (first, second), loaded = self._load([shared, other], [('r', 's')] * 2)
    self.assertEqual((first.digest, second.digest), ('s', 's'))
    self.assertCountEqual(loaded, [0, 1])
    with mock.patch.object(
      processes, '_write_mark', side_effect=PermissionError('read-only')
    ):
      (first, _), loaded = self._load([shared, shared], [('r', 's')] * 2)
    self.assertEqual(first.digest, 's')
    self.assertCountEqual(loaded, [0, 1])

  def test_other_data_on_another_process_ends_all(self):
    folders = [self.create_tempdir().full_path for _ in range(2)]
    for digests, message in (
      ([('r', 's'), ('q', 't')], 'prepared different data .records r and q.'),
      ([('r', 's'), ('r', 't')], 'split the data differently .splits s and t.'),
    ):
      for error in self._load(folders, digests)[0]:
        self.assertIsInstance(error, ValueError)
        self.assertRegex(str(error), f'Processes 0 and 1 have {message}')


if __name__ == '__main__':
  absltest.main()
