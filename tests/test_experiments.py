"""Tests the experiments' tables and figures, mostly with fabricated runs."""

import csv
import os
import types
from unittest import mock

import numpy as np
import one_convolution
from absl.testing import absltest, flagsaver, parameterized
from PIL import Image

from experiments import (
  convergence,
  fine_tuning,
  identities,
  imbalance,
  proxy_fraction,
  runs,
)
from proxy_nca_jax import datasets
from proxy_nca_jax.configs import glyphs as glyphs_config
from proxy_nca_jax.configs import image_folder as image_folder_config


def _fake_train_all(config, changes, workdir):
  """Returns results whose Recall@1 grows by 0.01 from run to run."""
  del workdir
  results = {}
  for index, (name, fields) in enumerate(changes.items()):
    end = 0.3 + index / 100
    trained = {'recall@1': end}
    results[name] = runs.Result(
      {
        'trained': trained,
        'untrained': {'recall@1': 0.1},
        'seen_classes': trained
        | {f'recall@1_{part}': end / 2 for part in ('head', 'middle', 'tail')},
        'selected_by': trained,
        'dataset': {
          split: {'images': 9, 'classes': 3} for split in ('train', 'test')
        },
        'devices': '1 x cpu',
        'versions': {'jax': '0.0'},
        'batch_size': config.batch_size,
      },
      [
        {'step': 10, 'images_per_second': 640.0},
        {'step': 10, 'test.recall@1': 0.2},
        {'step': 20, 'test.recall@1': end},
        {'step': 0, 'validation.recall@1': 0.1, 'validation.map@r': 0.05},
        {'step': 20, 'validation.recall@1': end, 'validation.map@r': 0.2},
      ],
    )
    assert fields
  return results


class ExperimentsTest(parameterized.TestCase):
  def _rows(self, experiment, config, suffixes=('png', 'svg', 'md', 'csv')):
    workdir = self.create_tempdir().full_path
    name = experiment.__name__.split('.')[-1]
    experiment.main(config, workdir)
    for suffix in suffixes:
      path = os.path.join(workdir, f'{name}.{suffix}')
      self.assertGreater(os.path.getsize(path), 100, suffix)
    with open(os.path.join(workdir, f'{name}.md')) as file:
      self.assertRegex(
        file.read(), r'20 steps of batch size 64; adam; \d seeds?; 1 x cpu'
      )
    with open(os.path.join(workdir, f'{name}.csv')) as file:
      return list(csv.DictReader(file))

  @flagsaver.flagsaver(num_seeds=2)
  def _fake_rows(self, experiment, **kwargs):
    config = glyphs_config.get_config()
    config.num_steps = 20
    split = types.SimpleNamespace(
      num_classes=40, class_sizes=np.array([50] + 39 * [5])
    )
    with (
      mock.patch.object(runs, 'train_all', _fake_train_all),
      mock.patch.object(
        datasets, 'load', lambda _: types.SimpleNamespace(train=split)
      ),
    ):
      return self._rows(experiment, config, **kwargs)

  def test_convergence(self):
    rows = self._fake_rows(convergence)
    self.assertLen(rows, 6)
    # The last run of the grid is the best; the seeds of a loss are adjacent.
    self.assertEqual(rows[0]['learning rates'], 'x10')
    self.assertEqual(rows[0]['Recall@1, %'], '30.50 [30.00, 31.00]')
    # The best baseline is the last loss, which reaches its own score last.
    self.assertEqual(rows[-1]['steps to the best baseline'], '20')
    self.assertEqual(rows[-1]['speedup'], '1.00x')
    self.assertEqual(rows[0]['steps to the best baseline'], 'not reached')
    self.assertEqual(rows[0]['ms per step'], '100')

  def test_proxy_fraction(self):
    rows = self._fake_rows(proxy_fraction)
    counts = [row['proxies'] for row in rows]
    self.assertEqual(counts, ['4', '10', '20', '40', '80'])
    self.assertEqual(rows[0]['static, Recall@1, %'], '30.50 [30.00, 31.00]')
    self.assertEqual(rows[0]['dynamic, Recall@1, %'], '40.50 [40.00, 41.00]')

  def test_fine_tuning(self):
    before, recipe, other, *_ = self._fake_rows(
      fine_tuning, suffixes=('md', 'csv')
    )
    self.assertEqual(before['recall@1, %'], '10.00 [10.00, 10.00]')
    self.assertEqual(recipe['change'], 'the recipe')
    # Each of the two seeds has a run of all settings.
    num_settings = len(fine_tuning._CHANGES)
    worst, best = 30, 30 + num_settings
    self.assertEqual(
      recipe['recall@1, %'],
      f'{(worst + best) / 2:.2f} [{worst:.2f}, {best:.2f}]',
    )
    self.assertEqual(other['change'], 'num_epochs=2.0')
    self.assertEqual(other['map@r, %'], '20.00 [20.00, 20.00]')

  def test_identities(self):
    rows = self._fake_rows(identities)
    self.assertEqual([row['train classes'] for row in rows], ['10', '30', '40'])
    self.assertEqual(rows[1]['Recall@1, %'], '32.50 [32.00, 33.00]')

  def test_imbalance(self):
    rows = self._fake_rows(imbalance)
    self.assertLen(rows, 6)
    self.assertEqual(rows[0]['tail'], '15.25 [15.00, 15.50]')
    self.assertEqual(rows[0]['all'], rows[0]['unseen'])

  def _make_images(self):
    rng = np.random.default_rng(0)
    root = self.create_tempdir().full_path
    for label in range(16):
      os.mkdir(os.path.join(root, str(label)))
      for index in range(3):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = os.path.join(root, str(label), f'{index}.png')
        Image.fromarray(pixels).save(path)
    return root

  @flagsaver.flagsaver(num_seeds=1)
  def test_changes_of_one_run_do_not_affect_others(self):
    config, seen = glyphs_config.get_config(), {}

    def train_and_evaluate(config, folder):
      seen[os.path.basename(folder)] = config
      return {}

    with mock.patch.object(
      runs.train, 'train_and_evaluate', train_and_evaluate
    ):
      runs.train_all(
        config,
        {'a': {'dataset.validation': '2/2', 'loss.name': 'triplet'}, 'b': {}},
        self.create_tempdir().full_path,
      )
    self.assertEqual(seen['a'].dataset.validation, '2/2')
    self.assertEqual(seen['a'].loss.name, 'triplet')
    for other in (seen['b'], config):
      self.assertEqual(other.dataset.validation, '')
      self.assertEqual(other.loss.name, 'proxy_nca')

  def test_a_real_experiment_resumes_where_it_stopped(self):
    self.enter_context(one_convolution.replaced())
    config = image_folder_config.get_config('scratch')
    config.dataset.root = self._make_images()
    config.dataset.data_dir = self.create_tempdir().full_path
    config.dataset.resize, config.dataset.image_size = 16, 16
    config.model.width = 4
    config.num_steps, config.batch_size, config.log_every = 20, 8, 10
    config.evaluation.batch_size = 32
    config.evaluation.kmeans_iterations = 0
    config.evaluation.nearest_only = True
    config.report = False
    workdir = self.create_tempdir().full_path
    changes = {'a': {'dataset.num_train_classes': 6}}
    first = runs.train_all(config, changes, workdir)
    changes['b'] = {'seed': 1}
    again = runs.train_all(config, changes, workdir)
    self.assertEqual(again['a'], first['a'])
    self.assertEqual(again['a'].scores['dataset']['train']['classes'], 6)
    steps, scores = again['b'].curve()
    self.assertEqual(steps.tolist(), [0, 20])
    self.assertEqual(scores[1], again['b'].scores['trained']['recall@1'])
    self.assertGreater(again['b'].seconds_per_step(), 0)


class StepsTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.05, 0), (0.1, 0), (0.2, 5), (0.3, 10), (0.4, 20), (0.6, np.inf)
  )
  def test_steps_are_interpolated_linearly(self, level, expected):
    steps, scores = np.array([0, 10, 20]), np.array([0.1, 0.3, 0.4])
    self.assertAlmostEqual(convergence.steps_to(level, steps, scores), expected)

  @parameterized.parameters(
    (5, [5]), (10, [10]), (150, [10, 30, 100, 150]), (300, [10, 30, 100, 300])
  )
  def test_class_counts(self, total, expected):
    self.assertEqual(identities.class_counts(total), expected)


if __name__ == '__main__':
  absltest.main()
