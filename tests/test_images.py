import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from proxy_nca_jax import images


class ColorJitterTest(parameterized.TestCase):
  def _image(self):
    return np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)

  def _jitter(self, strengths, seed=0, image=None):
    image = self._image() if image is None else image
    return images.color_jitter(image, strengths, np.random.default_rng(seed))

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
      results.append(images.color_jitter(image, (0.9, 0, 0.9, 0), rng).tolist())
    self.assertNotEqual(*results)


class RandomErasingTest(absltest.TestCase):
  def test_areas_and_aspects_have_the_asked_distribution(self):
    image = np.zeros((200, 200, 3), np.uint8)
    areas, aspects, pixels = [], [], []
    for seed in range(1000):
      erased = images.random_erasing(image, np.random.default_rng(seed))
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
    erased = images.random_erasing(
      image, np.random.default_rng(0), scale=(0.9, 0.9), ratio=(1.0, 1.0)
    )
    np.testing.assert_array_equal(erased, image)


class RandomResizedCropTest(parameterized.TestCase):
  def _crop(self, image, seed=0, **changes):
    arguments = dict(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    return images.random_resized_crop(
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


class CenterCropTest(absltest.TestCase):
  def test_the_central_crop_is_central(self):
    image = np.arange(36).reshape(6, 6, 1)
    np.testing.assert_array_equal(
      images.center_crop(image, 2)[..., 0], [[14, 15], [20, 21]]
    )


if __name__ == '__main__':
  absltest.main()
