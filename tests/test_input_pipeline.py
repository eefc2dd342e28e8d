import dataclasses
import functools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import whole_runs
from absl.testing import absltest, parameterized
from PIL import Image

from proxy_nca_jax import datasets, images, input_pipeline
from proxy_nca_jax.configs import default
from proxy_nca_jax.input_pipeline import sampling

_NUM_RECORDS = 13

_FOLDER = pathlib.Path(__file__).parent
_KILLED = """
import multiprocessing, os, signal, sys
sys.path.append('..')
from absl import flags
import test_input_pipeline as tests

flags.FLAGS.mark_as_parsed()
batches = tests.input_pipeline.train_batches(
  tests._split(), tests._config(num_workers=1)
)
next(batches)
print(len(multiprocessing.active_children()), 'reads', flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _source(size=12):
  """Records whose first pixel tells their index."""
  rng = np.random.default_rng(0)
  records = []
  for index in range(_NUM_RECORDS):
    pixels = rng.integers(1, 256, (size, size, 3), dtype=np.uint8)
    pixels[0, 0] = index
    encoded = images.encode_png(Image.fromarray(pixels))
    records.append({'image': encoded, 'name': b'x'})
  return records


def _image(source, row):
  return np.asarray(images.decode(source[row]['image']))


def _split(**kwargs):
  source = _source(**kwargs)
  return datasets.Split(
    source=source,
    images=functools.partial(_image, source),
    rows=np.arange(_NUM_RECORDS),
    labels=np.arange(_NUM_RECORDS, dtype=np.int32) // 2,
    class_names=tuple('abcdefg'),
  )


def _config(**fields):
  config = default.get_config()
  config.batch_size = 4
  config.dataset.image_size = 8
  config.dataset.update(fields)
  return config


def _take(number, config=None, **kwargs):
  batches = input_pipeline.train_batches(
    _split(), config or _config(), **kwargs
  )
  result = [next(batches) for _ in range(number)]
  batches.close()
  return result


def _assert_equal(actual, expected):
  for name in expected:
    np.testing.assert_array_equal(actual[name], expected[name], name)


class TrainBatchesTest(parameterized.TestCase):
  def test_batches_keep_the_contract(self):
    (batch,) = _take(1)
    shapes = {name: (x.shape, x.dtype.name) for name, x in batch.items()}
    self.assertEqual(
      shapes,
      {
        'image': ((4, 8, 8, 3), 'uint8'),
        'label': ((4,), 'int32'),
        'id': ((4,), 'int32'),
      },
    )
    np.testing.assert_array_equal(batch['label'], batch['id'] // 2)

  def test_a_run_that_starts_later_sees_the_same_batches(self):
    straight = _take(9)
    for actual, expected in zip(_take(4, first_step=5), straight[5:]):
      _assert_equal(actual, expected)

  def test_the_seed_decides(self):
    config = _config()
    config.seed = 1
    first = np.concatenate([batch['id'] for batch in _take(3)])
    other = np.concatenate([batch['id'] for batch in _take(3, config)])
    self.assertTrue(np.any(first != other))

  def test_an_epoch_sees_every_record_once_in_an_order_of_its_own(self):
    ids = np.concatenate([batch['id'] for batch in _take(_NUM_RECORDS)])
    epochs = ids.reshape(4, _NUM_RECORDS)
    for epoch in epochs:
      np.testing.assert_array_equal(np.sort(epoch), np.arange(_NUM_RECORDS))
    self.assertTrue(np.any(epochs[0] != epochs[1]))

  @parameterized.parameters(2, 4)
  def test_processes_share_each_global_batch(self, count):
    whole = _take(3, first_step=2)
    parts = [
      _take(3, first_step=2, process=(index, count)) for index in range(count)
    ]
    for step, expected in enumerate(whole):
      rows = [part[step] for part in parts]
      actual = {
        name: np.concatenate([part[name] for part in rows]) for name in rows[0]
      }
      _assert_equal(actual, expected)

  @parameterized.parameters((1, 3), (2, 8), (4, 16))
  def test_devices_change_no_record_and_padding_is_masked(self, count, devices):
    whole = _take(3, first_step=2)
    parts = [
      _take(3, first_step=2, process=(index, count), num_devices=devices)
      for index in range(count)
    ]
    for step, expected in enumerate(whole):
      rows = [part[step] for part in parts]
      actual = {
        name: np.concatenate([part[name] for part in rows]) for name in rows[0]
      }
      mask = actual.pop('mask')
      self.assertEqual(len(mask) % devices, 0)
      np.testing.assert_array_equal(mask, np.arange(len(mask)) < 4)
      _assert_equal({name: x[mask] for name, x in actual.items()}, expected)
      self.assertIn(actual['label'][-1], expected['label'])

  def test_a_batch_that_devices_divide_evenly_has_no_mask(self):
    (batch,) = _take(1, num_devices=4)
    self.assertNotIn('mask', batch)

  def test_reading_processes_change_nothing(self):
    config = _config(num_workers=1)
    for actual, expected in zip(_take(3, config), _take(3)):
      _assert_equal(actual, expected)

  def test_a_reading_process_hears_no_signal_and_is_missed_when_killed(self):
    begun = []

    def tell_at_once():
      while not begun:
        begun.extend(multiprocessing.active_children())
      for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(begun[0].pid, number)

    teller = threading.Thread(target=tell_at_once)
    teller.start()
    batches = input_pipeline.train_batches(_split(), _config(num_workers=1))
    for expected in _take(6):
      _assert_equal(next(batches), expected)
    teller.join()
    os.kill(begun[0].pid, signal.SIGKILL)
    with self.assertRaisesRegex(ValueError, 'worker process has ended'):
      for _ in range(9):
        next(batches)

  def test_reading_processes_end_with_a_killed_run(self):
    # Whoever lives on keeps the output open.
    process = subprocess.run(
      [sys.executable, '-c', _KILLED],
      stdout=subprocess.PIPE,
      text=True,
      timeout=120,
      env=whole_runs.environment(),
      cwd=_FOLDER,
    )
    self.assertEqual(process.returncode, -signal.SIGKILL)
    self.assertEqual(process.stdout, '1 reads\n')

  def test_a_record_is_augmented_anew_in_each_epoch(self):
    crops = {}
    for batch in _take(_NUM_RECORDS):
      for index, image in zip(batch['id'], batch['image']):
        crops.setdefault(int(index), []).append(image.tobytes())
    self.assertTrue(any(len(set(seen)) > 1 for seen in crops.values()))

  def test_flipping_mirrors_about_half(self):
    config = _config(image_size=12, flip=True)
    split = _split()
    whole = [np.asarray(images.decode(r['image'])) for r in split.source]
    flipped = []
    for batch in _take(30, config):
      for index, image in zip(batch['id'], batch['image']):
        plain = np.array_equal(image, whole[index])
        self.assertTrue(plain or np.array_equal(image[:, ::-1], whole[index]))
        flipped.append(not plain)
    self.assertBetween(np.mean(flipped), 0.3, 0.7)
    config.dataset.flip = False
    for batch in _take(9, config):
      for index, image in zip(batch['id'], batch['image']):
        np.testing.assert_array_equal(image, whole[index])


class BalancedBatchesTest(parameterized.TestCase):
  # Classes of 1 to 7 images; the smallest have fewer than a batch asks for.
  _MEMBERS = tuple(
    np.arange(first, first + size)
    for first, size in zip(np.cumsum([0, 1, 2, 3, 5, 6]), [1, 2, 3, 5, 6, 7])
  )
  _LABELS = np.repeat(range(6), [1, 2, 3, 5, 6, 7])

  def _batches(self, number, seed=0, batch_size=12, images_per_class=3):
    positions = [
      sampling.balanced_position(
        index,
        members=self._MEMBERS,
        batch_size=batch_size,
        images_per_class=images_per_class,
        seed=seed,
      )
      for index in range(number * batch_size)
    ]
    return np.reshape(positions, (number, -1, images_per_class))

  def test_a_batch_has_as_many_images_of_each_of_its_classes(self):
    for batch in self._batches(50):
      labels = self._LABELS[batch]
      np.testing.assert_array_equal(labels, labels[:, :1].repeat(3, 1))
      self.assertLen(set(labels[:, 0]), 4)

  def test_an_image_repeats_only_where_its_class_has_too_few(self):
    for images_per_class in (2, 3, 6):
      for batch in self._batches(50, images_per_class=images_per_class):
        for label, row in zip(self._LABELS[batch][:, 0], batch):
          size = len(self._MEMBERS[label])
          _, counts = np.unique(row, return_counts=True)
          self.assertLen(counts, min(size, images_per_class))
          self.assertLessEqual(np.ptp(counts), 1)

  def test_every_class_and_every_image_of_a_class_comes_as_often(self):
    batches = self._batches(3000)
    classes = np.bincount(self._LABELS[batches[..., 0]].ravel())
    # Four of six classes a turn of one batch: 2,000 turns each, give or take
    # five standard deviations of sqrt(3000 * 2/3 * 1/3) = 26.
    np.testing.assert_allclose(classes, 2000, atol=130)
    images_ = np.bincount(batches.ravel())
    for members in self._MEMBERS:
      mean = 6000 / len(members)
      np.testing.assert_allclose(images_[members], mean, rtol=0.15)

  def test_classes_take_their_turn(self):
    # Two of six classes a batch: three batches show each class once.
    labels = self._LABELS[self._batches(30, batch_size=6)[..., 0]]
    for turn in labels.reshape(10, 6):
      self.assertLen(set(turn), 6)
    self.assertGreater(len({tuple(turn) for turn in labels.reshape(10, 6)}), 5)

  def test_so_do_the_images_of_a_class(self):
    # Every batch has all classes; of 6 images, 3 and then the other 3.
    batches = self._batches(20, batch_size=18)
    rows = [row for batch in batches for row in batch if 11 <= row[0] < 17]
    for first, second in zip(rows[::2], rows[1::2]):
      self.assertLen(set(first) | set(second), 6)

  @parameterized.parameters((0, 1), (3, 2))
  def test_a_batch_is_a_function_of_the_seed_and_its_step(self, first, count):
    config = _config(images_per_class=2)
    whole = _take(6, config)
    for batch in whole:
      np.testing.assert_array_equal(batch['label'][::2], batch['label'][1::2])
      self.assertLen(set(batch['label']), 2)
    parts = [
      _take(3, config, first_step=first, process=(index, count))
      for index in range(count)
    ]
    for step, expected in enumerate(whole[first : first + 3]):
      rows = [part[step] for part in parts]
      _assert_equal(
        {name: np.concatenate([r[name] for r in rows]) for name in expected},
        expected,
      )
    config.seed = 1
    ids = [batch['id'].tolist() for batch in _take(6, config)]
    self.assertNotEqual(ids, [batch['id'].tolist() for batch in whole])

  def test_a_batch_of_more_classes_than_there_are_is_an_error(self):
    split, config = _split(), _config(images_per_class=1)
    few = dataclasses.replace(split, class_names=('a', 'b', 'c'))
    with self.assertRaisesRegex(ValueError, 'needs 4 classes, .* are 3 to'):
      input_pipeline.check_splits(config, few, split)
    input_pipeline.check_splits(config, split, few)


class AugmentationTest(absltest.TestCase):
  def test_random_crops_reach_every_place_and_the_padding_is_black(self):
    split = _split(size=8)
    whole = [np.asarray(images.decode(r['image'])) for r in split.source]
    margin = ((1, 1), (1, 1), (0, 0))
    padded = [np.pad(image, margin) for image in whole]
    config = _config(image_size=8, padding=1, flip=False)
    batches = input_pipeline.train_batches(split, config)
    seen = set()
    for _ in range(60):
      batch = next(batches)
      for index, image in zip(batch['id'], batch['image']):
        (place,) = [
          (top, left)
          for top in range(3)
          for left in range(3)
          if np.array_equal(
            image, padded[index][top : top + 8, left : left + 8]
          )
        ]
        seen.add(place)
    batches.close()
    self.assertLen(seen, 9)

  def test_a_crop_beyond_the_image_is_an_error(self):
    split = _split()
    with self.assertRaisesRegex(ValueError, r'image_size \(13\).*12'):
      input_pipeline.check_splits(_config(image_size=13), split, split)
    input_pipeline.check_splits(_config(image_size=12), split, split)

  def test_training_erases_the_asked_share_of_images(self):
    split = _split()
    whole = [np.asarray(images.decode(r['image'])) for r in split.source]
    config = _config(image_size=12, flip=False, erasing=0.25)
    changed = [
      not np.array_equal(image, whole[index])
      for batch in _take(60, config)
      for index, image in zip(batch['id'], batch['image'])
    ]
    self.assertBetween(np.mean(changed), 0.15, 0.35)

  def test_training_changes_colours_as_asked(self):
    split = _split()
    whole = [np.asarray(images.decode(r['image'])) for r in split.source]
    config = _config(image_size=12, flip=False, color_jitter=(0.5, 0, 0, 0))
    (batch,) = _take(1, config)
    for index, image in zip(batch['id'], batch['image']):
      self.assertFalse(np.array_equal(image, whole[index]))

  def test_training_crops_by_the_recipe(self):
    config = _config(crop='random_resized', image_size=6, flip=False)
    first, again = _take(2, config), _take(2, config)
    for actual, expected in zip(first, again):
      self.assertEqual(actual['image'].shape, (4, 6, 6, 3))
      _assert_equal(actual, expected)
    config.dataset.interpolation = 'bicubic'
    (other,) = _take(1, config)
    self.assertTrue(np.any(other['image'] != first[0]['image']))


class EvaluationBatchesTest(parameterized.TestCase):
  @parameterized.parameters(1, 2)
  def test_every_record_comes_once_in_order_and_the_rest_is_masked(self, count):
    parts = [
      list(
        input_pipeline.evaluation_batches(
          _split(), image_size=12, batch_size=4, process=(index, count)
        )
      )
      for index in range(count)
    ]
    self.assertLen(parts[0], 4)
    for batches in zip(*parts):
      self.assertEqual(sum(len(batch['id']) for batch in batches), 4)
    rows = [batch for batches in zip(*parts) for batch in batches]
    mask = np.concatenate([batch['mask'] for batch in rows])
    ids = np.concatenate([batch['id'] for batch in rows])
    corners = np.concatenate([batch['image'][:, 0, 0, 0] for batch in rows])
    np.testing.assert_array_equal(ids[mask], np.arange(_NUM_RECORDS))
    np.testing.assert_array_equal(corners[mask], np.arange(_NUM_RECORDS))
    self.assertEqual(mask.sum(), _NUM_RECORDS)


class PixelsTest(absltest.TestCase):
  def test_raw_pixels_have_unit_norm_and_black_stays_zero(self):
    split = _split()
    black = images.encode_png(Image.new('RGB', (40, 40)))
    split.source[3]['image'] = black
    pixels = input_pipeline.raw_pixels(split)
    self.assertEqual(pixels.shape, (_NUM_RECORDS, 32 * 32 * 3))
    norms = np.linalg.norm(pixels, axis=1)
    np.testing.assert_allclose(np.delete(norms, 3), 1, rtol=1e-5)
    np.testing.assert_array_equal(pixels[3], 0)

  def test_raw_pixels_of_the_right_size_are_the_pixels(self):
    split = _split(size=32)
    expected = np.asarray(images.decode(split[5]['image']), np.float64).ravel()
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(
      input_pipeline.raw_pixels(split)[5], expected, rtol=1e-5
    )


if __name__ == '__main__':
  absltest.main()
