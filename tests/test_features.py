import dataclasses
import io
import os
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax import datasets, features, models
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import default
from proxy_nca_jax.evaluate import embed

_NUM_RECORDS = 10


def _flip_bit(content, position):
  changed = bytearray(content)
  changed[position] ^= 1
  return bytes(changed)


def _npy_file():
  file = io.BytesIO()
  np.save(file, np.zeros((4, 3), np.float32))
  return file.getvalue()


class FeaturesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.config = default.get_config()
    with self.config.unlocked():
      self.config.dataset.data_dir = str(self.folder)
      self.config.dataset.image_size = 8
      self.config.evaluation.batch_size = 8
      self.config.model.width = 4
    self.mesh = mesh_lib.make_mesh()
    self.model = models.create_model(self.config)
    self.state = state_lib.create(
      self.config,
      self.model,
      optimizer_lib.make_optimizer(self.config),
      class_sizes=np.ones(3, int),
      mesh=self.mesh,
    )
    self.read = []

  def _split(self, rows=range(_NUM_RECORDS)):
    def image(row):
      self.read.append(row)
      rng = np.random.default_rng(row)
      return rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)

    return datasets.Split(
      source=[{}] * _NUM_RECORDS,
      images=image,
      rows=np.array(rows),
      labels=np.zeros(len(rows), np.int32),
      class_names=('a',),
    )

  def _extract(self, split, weights_digest='w', records_digest='r'):
    extract = features.make_extract(
      self.config,
      self.model,
      self.state,
      self.mesh,
      records_digest=records_digest,
      weights_digest=weights_digest,
    )
    with mock.patch.object(features, '_RECORDS_PER_FILE', 4):
      return extract(split)

  def _files(self):
    return sorted(self.folder.rglob('*.npz'))

  def test_features_are_those_of_the_network_in_the_order_of_the_split(self):
    split = self._split([7, 2, 9, 2])
    embed_fn = embed.make_embed_fn(self.model, self.mesh, method='features')
    expected = embed.embed_split(embed_fn, self.config, self.state, split)
    self.assertLen(expected, 4)
    np.testing.assert_array_equal(self._extract(split), expected)

  def test_features_are_those_of_the_weights_not_of_their_averages(self):
    expected = self._extract(self._split(), weights_digest=None)
    zeros = jax.tree.map(jnp.zeros_like, self.state.evaluated)
    self.state = dataclasses.replace(self.state, averages=zeros)
    np.testing.assert_array_equal(self._extract(self._split()), expected)

  def test_second_run_reads_no_image(self):
    first = self._extract(self._split())
    self.read.clear()
    np.testing.assert_array_equal(self._extract(self._split()), first)
    self.assertEmpty(self.read)

  def test_another_split_adds_the_records_that_are_missing(self):
    self._extract(self._split([0, 1]))
    self.assertLen(self._files(), 1)
    self.read.clear()
    self._extract(self._split([1, 5]))
    self.assertEqual(set(self.read), {4, 5, 6, 7})

  @parameterized.named_parameters(
    ('truncated', lambda content: content[:-10]),
    ('empty', lambda content: b''),
    ('other', lambda content: b'text'),
    ('one bit', lambda content: _flip_bit(content, len(content) // 2)),
    ('not an archive', lambda content: _npy_file()),
  )
  def test_damaged_file_is_written_again(self, damage):
    first = self._extract(self._split())
    path = self._files()[1]
    path.write_bytes(damage(path.read_bytes()))
    with self.assertLogs('proxy_nca_jax', 'WARNING') as logs:
      np.testing.assert_array_equal(self._extract(self._split()), first)
    self.assertIn('is damaged', logs.output[0])
    self.assertEqual(np.load(path)['features'].shape, (4, first.shape[1]))

  def test_no_flipped_bit_of_a_file_is_an_error_or_changes_features(self):
    path = self.folder / 'features.npz'
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(path, features=expected)
    content = path.read_bytes()
    for position in range(len(content)):
      path.write_bytes(_flip_bit(content, position))
      rows = features._read(str(path))
      if rows is not None:
        np.testing.assert_array_equal(rows, expected)

  def test_features_of_others_are_not_mixed(self):
    self._extract(self._split())
    self._extract(self._split(), weights_digest='other weights')
    self._extract(self._split(), records_digest='other records')
    with self.config.unlocked():
      self.config.dataset.interpolation = 'bicubic'
    self._extract(self._split())
    folders = {path.parent for path in self._files()}
    self.assertLen(folders, 4)

  def test_features_of_random_weights_are_not_stored(self):
    self._extract(self._split(), weights_digest=None)
    self.assertEmpty(self._files())

  def test_a_folder_that_cannot_be_made_costs_only_the_store(self):
    (self.folder / 'features').write_text('')
    with self.assertLogs('proxy_nca_jax', 'WARNING') as logs:
      rows = self._extract(self._split())
    self.assertLen(rows, _NUM_RECORDS)
    self.assertIn('not stored', logs.output[0])
    self.assertTrue(os.path.isfile(self.folder / 'features'))


if __name__ == '__main__':
  absltest.main()
