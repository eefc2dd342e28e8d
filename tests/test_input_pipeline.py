import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from configs import default
from proxy_nca_jax import datasets, input_pipeline
from proxy_nca_jax.datasets import images

_NUM_RECORDS = 13


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


def _picture(source, row):
  return np.asarray(images.decode(source[row]['image']))


def _split(**kwargs):
  source = _source(**kwargs)
  return datasets.Split(
    source=source,
    pictures=functools.partial(_picture, source),
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
        'mask': ((4,), 'bool'),
        'id': ((4,), 'int32'),
      },
    )
    self.assertTrue(batch['mask'].all())
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

  def test_reading_processes_change_nothing(self):
    config = _config(num_workers=1)
    for actual, expected in zip(_take(3, config), _take(3)):
      _assert_equal(actual, expected)

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
      input_pipeline.balanced_position(
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

  @parameterized.parameters(
    (dict(images_per_class=3), r'batch_size \(4\).*divisible.*class \(3\)'),
    (dict(images_per_class=-2), 'divisible'),
    (dict(images_per_class=1), 'needs 4 classes, and 3 are trained on'),
    (dict(color_jitter=(0.1, 0.1, 0.1)), 'color_jitter.*four numbers'),
    (dict(color_jitter=(0.1, 0.1, 0.1, 0.6)), 'hue at most 0.5'),
    (dict(erasing=1.5), 'erasing .1.5. must be in'),
    (dict(on_device=True, crop='random_resized'), 'on_device.*=random_resized'),
    (dict(on_device=True, color_jitter=(0, 0, 0, 0.1)), 'on_device=True crops'),
    (dict(on_device=True, erasing=0.5), 'on_device.*erasing=0.5 were given'),
  )
  def test_batches_that_cannot_be_are_errors(self, fields, message):
    split = _split()
    few = dataclasses.replace(split, class_names=('a', 'b', 'c'))
    with self.assertRaisesRegex(ValueError, message):
      input_pipeline.check_train_batches(few, _config(**fields))
    input_pipeline.check_train_batches(split, _config(images_per_class=1))


class ColorJitterTest(parameterized.TestCase):

  def _image(self):
    return np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)

  def _jitter(self, strengths, seed=0, image=None):
    image = self._image() if image is None else image
    return input_pipeline.color_jitter(
      image, strengths, np.random.default_rng(seed)
    )

  def test_no_strength_changes_nothing(self):
    image = self._image()
    np.testing.assert_array_equal(self._jitter((0, 0, 0, 0)), image)

  def test_each_change_is_a_blend_with_the_image_without_it(self):
    # With black, the mean gray of the image, and each pixel's own gray.
    image = self._image().astype(float)
    gray = image @ [0.299, 0.587, 0.114]
    mean = np.full_like(gray, np.round(gray.mean()))
    ends = (np.zeros_like(gray), mean, gray)
    for kind, end in enumerate(ends):
      strengths = [0.0] * 4
      strengths[kind] = 0.5
      factors = []
      for seed in range(40):
        actual = self._jitter(tuple(strengths), seed).astype(float)
        offset = image - end[..., None]
        # Fitted to what was not clipped.
        kept = (actual > 0) & (actual < 255)
        factor = np.sum((actual - end[..., None])[kept] * offset[kept])
        factor /= np.sum(offset[kept] ** 2)
        expected = np.clip(end[..., None] + factor * offset, 0, 255)
        np.testing.assert_allclose(actual, expected, atol=2.5)
        factors.append(factor)
      self.assertBetween(min(factors), 0.48, 0.6)
      self.assertBetween(max(factors), 1.4, 1.52)

  def test_a_large_strength_stops_at_zero(self):
    # A factor below it would make the image black; these are from 0 to 4.
    jittered = [self._jitter((3, 0, 0, 0), seed) for seed in range(60)]
    self.assertLess(min(image.mean() for image in jittered), 20)
    self.assertTrue(all(image.any() for image in jittered))

  def test_hue_turns_and_keeps_value_and_saturation(self):
    image = np.full((2, 2, 3), (200, 50, 50), np.uint8)
    turned = {
      tuple(self._jitter((0, 0, 0, 0.5), seed, image)[0, 0])
      for seed in range(50)
    }
    self.assertGreater(len(turned), 30)
    for colour in turned:
      self.assertEqual(max(colour), 200)
      self.assertBetween(min(colour), 49, 51)
    greenest = max(turned, key=lambda colour: int(colour[1]) - int(colour[0]))
    self.assertGreater(greenest[1], 150)

  def test_the_order_is_random(self):
    # Brightness clips; saturation before or after it makes a difference.
    image = np.full((4, 4, 3), (250, 120, 10), np.uint8)
    rng = absltest.mock.Mock()
    rng.uniform.side_effect = lambda low, high: high
    results = []
    for order in ([0, 1, 2, 3], [2, 0, 1, 3]):
      rng.permutation.return_value = order
      results.append(
        input_pipeline.color_jitter(image, (0.9, 0, 0.9, 0), rng).tolist()
      )
    self.assertNotEqual(*results)


class RandomErasingTest(absltest.TestCase):

  def test_areas_and_aspects_have_the_asked_distribution(self):
    image = np.zeros((200, 200, 3), np.uint8)
    areas, aspects, pixels = [], [], []
    for seed in range(1000):
      erased = input_pipeline.random_erasing(image, np.random.default_rng(seed))
      rows, columns = np.nonzero(erased.any(axis=2))
      height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
      areas.append(height * width / 200**2)
      aspects.append(np.log(width / height))
      pixels.append(erased[rows, columns].mean())
    self.assertBetween(np.min(areas), 0.019, 0.03)
    self.assertBetween(np.max(areas), 0.31, 0.34)
    self.assertBetween(np.mean(areas), 0.16, 0.185)
    self.assertBetween(np.max(np.abs(aspects)), 1.1, 1.25)
    self.assertBetween(np.mean(aspects), -0.08, 0.08)
    self.assertBetween(np.mean(pixels), 126, 129)
    self.assertFalse(image.any())

  def test_what_cannot_fit_is_left_alone(self):
    image = np.ones((4, 400, 3), np.uint8)
    erased = input_pipeline.random_erasing(
      image, np.random.default_rng(0), scale=(0.9, 0.9), ratio=(1.0, 1.0)
    )
    np.testing.assert_array_equal(erased, image)

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


class CropTest(absltest.TestCase):

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

  def test_the_central_crop_is_central(self):
    image = np.arange(36).reshape(6, 6, 1)
    np.testing.assert_array_equal(
      input_pipeline.center_crop(image, 2)[..., 0], [[14, 15], [20, 21]]
    )

  def test_a_crop_beyond_the_picture_is_an_error(self):
    for size in (0, 13):
      with self.assertRaisesRegex(ValueError, rf'image_size \({size}\).*12'):
        input_pipeline.check_image_size(
          _split(), _config(image_size=size).dataset
        )
    with self.assertRaisesRegex(ValueError, 'padding'):
      input_pipeline.check_image_size(_split(), _config(padding=-1).dataset)


class RandomResizedCropTest(parameterized.TestCase):

  def _crop(self, image, seed=0, **changes):
    arguments = dict(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    return input_pipeline.random_resized_crop(
      image, 8, rng=np.random.default_rng(seed), **(arguments | changes)
    )

  def test_the_whole_of_a_square_is_only_resized(self):
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    expected = Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR)
    actual = self._crop(image, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(actual, expected)

  def test_the_filter_is_the_asked_one(self):
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    expected = Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC)
    whole = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    actual = self._crop(image, interpolation='bicubic', **whole)
    np.testing.assert_array_equal(actual, expected)

  @parameterized.parameters((10, 90), (90, 10))
  def test_of_what_fits_nowhere_the_centre_is_taken(self, *shape):
    # Coordinates as colours; the whole area never fits an allowed aspect.
    rows, columns = np.indices(shape).astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=-1)
    crop = self._crop(image, scale=(1.0, 1.0))
    along = crop[..., int(shape[1] > shape[0])]
    self.assertBetween(int(along.min()), 45 - 7, 45)
    self.assertBetween(int(along.max()), 45, 45 + 7)

  def test_areas_and_aspects_have_the_asked_distribution(self):
    # A crop's colours tell its extent: red is the column, green the row.
    rows, columns = np.indices((200, 200)).astype(np.uint8)
    image = np.stack([columns, rows, rows], axis=-1)
    areas, aspects = [], []
    for seed in range(2000):
      crop = self._crop(image, seed, scale=(0.1, 0.4)).astype(int)
      # Pixels 1 and 6 of 8, whose filters do not end at the border.
      width = (crop[0, 6, 0] - crop[0, 1, 0]) * 8 / 5
      height = (crop[6, 0, 1] - crop[1, 0, 1]) * 8 / 5
      areas.append(width * height / 200**2)
      aspects.append(np.log(width / height))
    self.assertBetween(np.mean(areas), 0.24, 0.26)
    self.assertBetween(np.min(areas), 0.09, 0.11)
    self.assertBetween(np.max(areas), 0.39, 0.42)
    self.assertBetween(np.mean(aspects), -0.02, 0.02)
    self.assertBetween(np.max(aspects), 0.26, 0.32)

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

  def test_normalize_by_hand(self):
    actual = input_pipeline.normalize(
      jnp.array([[[[0, 100, 255]]]], jnp.uint8),
      mean=(0.0, 50.0, 127.5),
      std=(1.0, 25.0, 127.5),
    )
    np.testing.assert_allclose(actual, [[[[0, 2, 1]]]])
    self.assertEqual(actual.dtype, jnp.float32)

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
