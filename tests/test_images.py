import io
import struct
import subprocess
import time
from concurrent import futures
from unittest import mock

import numpy as np
import oracles
from absl.testing import absltest, parameterized
from PIL import Image, ImageFile, ImageOps

from proxy_nca_jax import images


def _encode(image, suffix='png', **options):
  buffer = io.BytesIO()
  image.save(buffer, suffix, **options)
  return buffer.getvalue()


def _noise(seed=0, size=(20, 30)):
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


class DecodeTest(parameterized.TestCase):
  @parameterized.parameters('png', 'bmp', 'tiff', 'webp', 'gif', 'jpeg')
  def test_any_format_becomes_rgb(self, suffix):
    image = images.decode(_encode(_noise(), suffix))
    self.assertEqual((image.mode, image.size), ('RGB', (30, 20)))

  def test_lossless_pixels_are_kept(self):
    image = _noise()
    np.testing.assert_array_equal(images.decode(_encode(image)), image)

  def test_gray_becomes_equal_channels(self):
    gray = _noise().convert('L')
    pixels = np.asarray(images.decode(_encode(gray)))
    for channel in range(3):
      np.testing.assert_array_equal(pixels[..., channel], gray)

  def test_sixteen_bit_gray_is_scaled_not_clipped(self):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    pixels = np.asarray(images.decode(_encode(Image.fromarray(values))))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 1, 128, 255])

  def test_cmyk_keeps_its_colors(self):
    red = Image.new('RGB', (16, 16), (250, 10, 10)).convert('CMYK')
    pixels = np.asarray(images.decode(_encode(red, 'jpeg')), int)
    np.testing.assert_allclose(pixels[8, 8], (250, 10, 10), atol=12)

  def test_transparency_is_composited_on_white(self):
    clear = Image.new('RGBA', (4, 4), (200, 0, 0, 0))
    pixels = np.asarray(images.decode(_encode(clear)))
    np.testing.assert_array_equal(pixels, 255)
    palette = Image.new('P', (4, 4), 0)
    palette.putpalette([9, 8, 7] * 2)
    opaque = images.decode(_encode(palette))
    self.assertEqual(opaque.getpixel((0, 0)), (9, 8, 7))
    clear = images.decode(_encode(palette, transparency=0))
    self.assertEqual(clear.getpixel((0, 0)), (255, 255, 255))

  def test_exif_rotation_is_applied(self):
    image = Image.new('RGB', (40, 20), 'black')
    image.paste('white', (0, 0, 10, 20))  # The left half is white.
    exif = Image.Exif()
    exif[0x0112] = 6  # A quarter turn clockwise: shows white at the top.
    upright = images.decode(_encode(image, 'jpeg', exif=exif))
    self.assertEqual(upright.size, (20, 40))
    self.assertGreater(upright.getpixel((10, 3))[0], 200)
    self.assertLess(upright.getpixel((10, 30))[0], 50)

  def test_animations_are_reduced_to_their_first_frame(self):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    encoded = _encode(frames[0], 'gif', save_all=True, append_images=frames[1:])
    self.assertEqual(images.decode(encoded).getpixel((0, 0)), (255, 0, 0))

  @parameterized.parameters('jpeg', 'png', 'gif', 'webp', 'tiff')
  def test_truncated_files_are_errors(self, suffix):
    encoded = _encode(_noise(size=(64, 64)), suffix)
    with self.assertRaises(ValueError):
      images.decode(encoded[: len(encoded) // 2])

  @parameterized.parameters(
    (b'', 'empty'),
    (b'words', 'not an image'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'Git LFS'),
  )
  def test_files_that_are_not_images_are_errors(self, encoded, message):
    with self.assertRaisesRegex(ValueError, message):
      images.decode(encoded)

  def test_broken_exif_data_does_not_cost_the_image(self):
    image = Image.new('RGB', (40, 20), 'black')
    ratio = b'\x01\x1a\0\x0a\0\0\0\x01\0\0\0\x26'  # Tag 282, an SRATIONAL.
    exif = (
      b'Exif\0\0MM\0*\0\0\0\x08\0\x02'
      b'\x01\x12\0\x03\0\0\0\x01\0\x06\0\0' + ratio + b'\0\0\0\0'
      b'\xff\xff\xff\xf0\0\0\0\x01'
    )
    encoded = _encode(image, 'jpeg', exif=exif)
    with self.assertRaises(struct.error):
      ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    self.assertEqual(images.decode(encoded).size, (20, 40))
    broken = _encode(image, 'jpeg', exif=exif[:20])
    self.assertEqual(images.decode(broken).size, (40, 20))

  @parameterized.parameters(
    RuntimeError, NotImplementedError, AttributeError, struct.error, MemoryError
  )
  def test_whatever_a_decoder_raises_is_a_value_error(self, error):
    with mock.patch.object(
      ImageFile.ImageFile, 'load', side_effect=error('broken')
    ):
      with self.assertRaisesRegex(ValueError, 'broken'):
        images.decode(_encode(_noise()))
      with self.assertRaisesRegex(ValueError, 'broken'):
        images.as_rgb(Image.open(io.BytesIO(_encode(_noise()))))

  @parameterized.parameters(
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n',
    b'\xd7\xcd\xc6\x9a' + bytes(200),
  )
  def test_no_format_starts_another_program(self, encoded):
    with mock.patch.object(subprocess, 'Popen') as popen:
      with self.assertRaisesRegex(ValueError, 'not an image'):
        images.decode(encoded)
    popen.assert_not_called()

  def test_too_many_pixels_are_refused_before_decoding(self):
    with mock.patch.object(images, 'MAX_PIXELS', 599):
      with mock.patch.object(ImageFile.ImageFile, 'load') as load:
        with self.assertRaisesRegex(ValueError, '30 x 20 pixels .* 599'):
          images.decode(_encode(_noise()))
    load.assert_not_called()

  def test_large_images_are_decoded_one_at_a_time(self):
    loading, most = [], 0
    load = ImageFile.ImageFile.load

    def load_slowly(image):
      nonlocal most
      loading.append(image)
      most = max(most, len(loading))
      time.sleep(0.01)
      loading.pop()
      return load(image)

    with (
      mock.patch.object(images, '_LARGE_PIXELS', 599),
      mock.patch.object(ImageFile.ImageFile, 'load', load_slowly),
      futures.ThreadPoolExecutor(4) as pool,
    ):
      list(pool.map(images.decode, [_encode(_noise())] * 8))
    self.assertEqual(most, 1)


class ResizeTest(parameterized.TestCase):
  @parameterized.parameters(
    ('square', (24, 24)), ('shorter', (24, 36)), ('shorter', (24, 24))
  )
  def test_sizes(self, mode, expected):
    width, height = (60, 90) if expected == (24, 36) else (48, 48)
    image = images.resize(Image.new('RGB', (width, height)), side=24, mode=mode)
    self.assertEqual(image.size, expected)

  def test_side_zero_or_the_same_size_changes_nothing(self):
    image = _noise()
    for side in (0, 20):
      same = images.resize(image, side=side, mode='shorter')
      np.testing.assert_array_equal(same, image)

  def test_shrinking_is_antialiased(self):
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = 200
    small = images.resize(Image.fromarray(stripes), side=2, mode='square')
    self.assertBetween(int(np.min(small)), 80, 100)

  @parameterized.product(
    interpolation=('bilinear', 'bicubic'), side=(7, 20, 33)
  )
  def test_the_filters_are_the_antialiased_ones(self, interpolation, side):
    image = _noise(size=(20, 26))
    resized = images.resize(
      image, side=side, mode='square', interpolation=interpolation
    )
    filters = Image.Resampling
    expected = image.resize((side, side), filters[interpolation.upper()])
    np.testing.assert_array_equal(resized, expected)
    defined = oracles.resize(image, (side, side), interpolation)
    difference = np.abs(np.asarray(resized, np.float64) - defined)
    # Pillow's weights have 22 bits, so exact halves may round either way.
    self.assertLessEqual(difference.max(), 1)
    self.assertLess(np.mean(difference > 0), 0.03)

  def test_the_resized_shape_is_bounded(self):
    line = Image.new('L', (1, 8000))
    images.resize(line, side=256, mode='square')
    with mock.patch.object(Image.Image, 'resize') as resize:
      with self.assertRaisesRegex(ValueError, '1 x 8000 .* 256 x 2048000'):
        images.resize(line, side=256, mode='shorter')
      with mock.patch.object(images, 'MAX_PIXELS', 24 * 36 - 1):
        with self.assertRaisesRegex(ValueError, '863 pixels'):
          images.resize(Image.new('L', (60, 90)), side=24, mode='shorter')
    resize.assert_not_called()

  def test_unknown_names_list_the_choices(self):
    with self.assertRaisesRegex(ValueError, 'square or shorter'):
      images.resize(_noise(), side=4, mode='longer')
    with self.assertRaisesRegex(ValueError, 'bilinear or bicubic'):
      images.resize(_noise(), side=4, mode='square', interpolation='cubic')


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
    # Blended with black, the image's mean gray, and each pixel's gray.
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
        # Fitted to the pixels that are not clipped.
        kept = (actual > 0) & (actual < 255)
        factor = np.sum((actual - end[..., None])[kept] * offset[kept])
        factor /= np.sum(offset[kept] ** 2)
        expected = np.clip(end[..., None] + factor * offset, 0, 255)
        np.testing.assert_allclose(actual, expected, atol=2.5)
        factors.append(factor)
      self.assertBetween(min(factors), 0.48, 0.6)
      self.assertBetween(max(factors), 1.4, 1.52)

  def test_a_large_strength_stops_at_zero(self):
    # Negative factors would make the image black; these are in [0, 4].
    jittered = [self._jitter((3, 0, 0, 0), seed) for seed in range(60)]
    self.assertLess(min(image.mean() for image in jittered), 20)
    self.assertTrue(all(image.any() for image in jittered))

  def test_hue_is_rotated_at_constant_value_and_saturation(self):
    image = np.full((2, 2, 3), (200, 50, 50), np.uint8)
    rotated = {
      tuple(self._jitter((0, 0, 0, 0.5), seed, image)[0, 0])
      for seed in range(50)
    }
    self.assertGreater(len(rotated), 30)
    for color in rotated:
      self.assertEqual(max(color), 200)
      self.assertBetween(min(color), 49, 51)
    greenest = max(rotated, key=lambda color: int(color[1]) - int(color[0]))
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
  def test_areas_and_aspects_are_distributed_as_requested(self):
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

  def test_nothing_is_erased_if_no_rectangle_fits(self):
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

  def test_a_crop_of_the_whole_square_only_resizes(self):
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    expected = Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR)
    actual = self._crop(image, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(actual, expected)

  def test_the_requested_filter_is_used(self):
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    expected = Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC)
    whole = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    actual = self._crop(image, interpolation='bicubic', **whole)
    np.testing.assert_array_equal(actual, expected)

  @parameterized.parameters((10, 90), (90, 10))
  def test_the_center_is_cropped_if_no_rectangle_fits(self, *shape):
    # Colors encode coordinates; no allowed aspect fits the whole area.
    rows, columns = np.indices(shape).astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=-1)
    crop = self._crop(image, scale=(1.0, 1.0))
    along = crop[..., int(shape[1] > shape[0])]
    self.assertBetween(int(along.min()), 45 - 7, 45)
    self.assertBetween(int(along.max()), 45, 45 + 7)

  def test_areas_and_aspects_are_distributed_as_requested(self):
    # Colors encode coordinates: red is the column, green the row.
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
