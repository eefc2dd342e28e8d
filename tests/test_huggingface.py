"""Datasets of Hugging Face as input of image_folder."""

import importlib
import pathlib
import unittest
from unittest import mock

import numpy as np
from absl.testing import absltest
from PIL import Image

from proxy_nca_jax import datasets
from proxy_nca_jax.configs import image_folder

_IS_INSTALLED = importlib.util.find_spec('datasets') is not None


def _noise(seed):
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))


class _Test(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.data_dir = self.create_tempdir().full_path
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def _load(self, name, **fields):
    config = image_folder.get_config('scratch')
    config.dataset.huggingface = str(name)
    config.dataset.data_dir = self.data_dir
    config.dataset.resize = 16
    config.dataset.update(fields)
    return datasets.load(config)


class MissingTest(_Test):
  def test_without_the_library_a_line_says_what_to_install(self):
    with mock.patch.object(importlib.util, 'find_spec', return_value=None):
      with self.assertRaisesRegex(ValueError, 'pip install datasets'):
        self._load('nobody/nothing')


@unittest.skipUnless(_IS_INSTALLED, 'pip install datasets')
class HuggingFaceTest(_Test):
  def setUp(self):
    super().setUp()
    self.hf = importlib.import_module('datasets')
    self.hf.disable_progress_bars()
    cache = self.create_tempdir().full_path
    self.enter_context(
      mock.patch.object(self.hf.config, 'HF_DATASETS_CACHE', cache)
    )

  def _make(self, labels, **columns):
    images = [_noise(100 + i) for i in range(len(labels))]
    names = self.hf.ClassLabel(names=['ape', 'bat', 'cat', 'dog', 'elk'])
    features = {'image': self.hf.Image(), 'label': names}
    features |= {name: self.hf.Value('string') for name in columns}
    return self.hf.Dataset.from_dict(
      {'image': images, 'label': labels, **columns},
      features=self.hf.Features(features),
    )

  def _save(self, dataset, name='saved'):
    dataset.save_to_disk(str(self.root / name))
    return self.root / name

  def test_splits_of_a_saved_dataset_are_used(self):
    name = self._save(
      self.hf.DatasetDict(
        train=self._make([1, 0, 1]),
        val=self._make([3, 4]),
        test=self._make([2, 1, 2]),
      )
    )
    data = self._load(name, validation='folder')
    self.assertEqual(data.train.class_names, ('ape', 'bat'))
    self.assertEqual(data.validation.class_names, ('dog', 'elk'))
    self.assertEqual(data.test.class_names, ('bat', 'cat'))
    self.assertEqual(data.num_shared_classes, 1)
    self.assertEqual(data.train[0]['name'], 'train/1')
    expected = _noise(101).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(data.train.image(0), expected)

  def test_a_single_split_is_split_by_class_and_changes_are_noticed(self):
    data = self._load(self._save(self._make([0, 1, 2, 3, 0])))
    self.assertEqual((data.train.num_classes, data.test.num_classes), (2, 2))
    self.assertEqual(data.num_shared_classes, 0)
    same = self._load(self._save(self._make([0, 1, 2, 3, 0]), 'copy'))
    self.assertEqual(same.digest, data.digest)
    other = self._load(self._save(self._make([0, 1, 2, 3, 3]), 'other'))
    self.assertNotEqual(other.digest, data.digest)

  def test_folders_that_load_dataset_reads_are_read(self):
    for seed, label in enumerate('wxyz'):
      (self.root / 'images' / label).mkdir(parents=True)
      _noise(seed).save(self.root / 'images' / label / '0.png')
    data = self._load(self.root / 'images')
    self.assertSameElements(
      data.train.class_names + data.test.class_names, list('wxyz')
    )
    (self.root / 'parquet').mkdir()
    table = self._make([0, 1, 2, 3])
    table.to_parquet(str(self.root / 'parquet' / 'data.parquet'))
    self.assertLen(self._load(self.root / 'parquet').test, 2)

  def test_missing_images_are_skipped(self):
    dataset = self._make([0, 1, 2, 3])
    images = [*dataset['image'][:], _noise(7), None]
    images[2] = {'bytes': b'no image', 'path': None}
    dataset = self.hf.Dataset.from_dict(
      {'image': images, 'label': [0, 1, 2, 3, 4, 2]},
      features=dataset.features,
    )
    data = self._load(self._save(dataset))
    reasons = dict(data.skipped)
    self.assertSameElements(reasons, ['all/2', 'all/5', 'cat/'])
    self.assertIn('no image in this row', reasons['all/5'])

  def test_columns_are_found_by_type_or_named(self):
    texts = {'breed': list('pqrs'), 'color': list('abca')}
    dataset = self._make([0, 1, 2, 3], **texts)
    data = self._load(self._save(dataset))
    self.assertIn('ape', data.train.class_names + data.test.class_names)
    name = self._save(dataset.remove_columns('label'), 'texts')
    with self.assertRaisesRegex(
      ValueError, 'set --config.dataset.label_column to one of breed, color'
    ):
      self._load(name)
    data = self._load(name, label_column='breed')
    self.assertSameElements(
      data.train.class_names + data.test.class_names, list('pqrs')
    )
    with self.assertRaisesRegex(
      ValueError, "label column 'x': set .* breed .st"
    ):
      self._load(name, label_column='x')
    with self.assertRaisesRegex(ValueError, "'label' .* holds no images"):
      self._load(self.root / 'saved', image_column='label')
    name = self._save(dataset.remove_columns('image'), 'none')
    with self.assertRaisesRegex(
      ValueError, 'no image column: set .* label .Cl'
    ):
      self._load(name)

  def test_wrong_datasets_are_one_line(self):
    unlabeled = self._save(self._make([0, -1]))
    splits = self._save(
      self.hf.DatasetDict(train=self._make([0]), extra=self._make([1])), 'extra'
    )
    (self.root / 'damaged').mkdir()
    (self.root / 'damaged' / 'state.json').write_text('{}')
    for name, message in (
      (unlabeled, "split 'all', row 1: the label .label. is empty"),
      (splits, 'has the splits train, extra; expected train and test'),
      (self.root / 'damaged', 'cannot be loaded'),
      (self.root / 'nowhere', 'cannot be loaded'),
    ):
      with self.assertRaisesRegex(ValueError, message) as raised:
        self._load(name)
      self.assertNotIn('\n', str(raised.exception))


if __name__ == '__main__':
  absltest.main()
