import contextlib
import io
import os
import pathlib
import shutil
import signal
from unittest import mock

import matplotlib
import numpy as np
import oracles
from absl.testing import absltest, parameterized
from PIL import Image

from proxy_nca_jax import datasets, images
from proxy_nca_jax.configs import glyphs as glyphs_config
from proxy_nca_jax.configs import image_folder as image_folder_config
from proxy_nca_jax.datasets import glyphs
from proxy_nca_jax.runtime import lock, signals

_FONTS = pathlib.Path(matplotlib.get_data_path(), 'fonts', 'ttf')


def _encode(picture, suffix='png', **options):
  buffer = io.BytesIO()
  picture.save(buffer, suffix, **options)
  return buffer.getvalue()


def _noise(seed=0, size=(20, 30)):
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


class DecodeTest(parameterized.TestCase):
  @parameterized.parameters('png', 'bmp', 'tiff', 'webp', 'gif', 'jpeg')
  def test_any_format_becomes_rgb(self, suffix):
    picture = images.decode(_encode(_noise(), suffix))
    self.assertEqual((picture.mode, picture.size), ('RGB', (30, 20)))

  def test_lossless_pixels_are_kept(self):
    picture = _noise()
    np.testing.assert_array_equal(images.decode(_encode(picture)), picture)

  def test_gray_becomes_equal_channels(self):
    gray = _noise().convert('L')
    pixels = np.asarray(images.decode(_encode(gray)))
    for channel in range(3):
      np.testing.assert_array_equal(pixels[..., channel], gray)

  def test_sixteen_bit_gray_is_scaled_not_clipped(self):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    pixels = np.asarray(images.decode(_encode(Image.fromarray(values))))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 1, 128, 255])

  def test_cmyk_has_its_colours(self):
    red = Image.new('RGB', (16, 16), (250, 10, 10)).convert('CMYK')
    pixels = np.asarray(images.decode(_encode(red, 'jpeg')), int)
    np.testing.assert_allclose(pixels[8, 8], (250, 10, 10), atol=12)

  def test_transparency_is_laid_on_white(self):
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
    picture = Image.new('RGB', (40, 20), 'black')
    picture.paste('white', (0, 0, 10, 20))  # The left is white.
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown after a quarter turn clockwise: the top.
    upright = images.decode(_encode(picture, 'jpeg', exif=exif))
    self.assertEqual(upright.size, (20, 40))
    self.assertGreater(upright.getpixel((10, 3))[0], 200)
    self.assertLess(upright.getpixel((10, 30))[0], 50)

  def test_the_first_frame_of_an_animation_is_taken(self):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    encoded = _encode(frames[0], 'gif', save_all=True, append_images=frames[1:])
    self.assertEqual(images.decode(encoded).getpixel((0, 0)), (255, 0, 0))

  @parameterized.parameters('jpeg', 'png', 'gif', 'webp', 'tiff')
  def test_a_part_of_a_file_is_an_error(self, suffix):
    encoded = _encode(_noise(size=(64, 64)), suffix)
    with self.assertRaises(ValueError):
      images.decode(encoded[: len(encoded) // 2])

  @parameterized.parameters((b'', 'empty'), (b'words', 'not an image'))
  def test_what_is_no_picture_says_so(self, encoded, message):
    with self.assertRaisesRegex(ValueError, message):
      images.decode(encoded)


class ResizeTest(parameterized.TestCase):
  @parameterized.parameters(
    ('square', (24, 24)), ('shorter', (24, 36)), ('shorter', (24, 24))
  )
  def test_sizes(self, mode, expected):
    width, height = (60, 90) if expected == (24, 36) else (48, 48)
    picture = images.resize(
      Image.new('RGB', (width, height)), side=24, mode=mode
    )
    self.assertEqual(picture.size, expected)

  def test_zero_and_the_right_size_change_nothing(self):
    picture = _noise()
    for side in (0, 20):
      same = images.resize(picture, side=side, mode='shorter')
      np.testing.assert_array_equal(same, picture)

  def test_the_filter_averages_when_it_shrinks(self):
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = 200
    small = images.resize(Image.fromarray(stripes), side=2, mode='square')
    self.assertBetween(int(np.min(small)), 80, 100)

  @parameterized.product(
    interpolation=('bilinear', 'bicubic'), side=(7, 20, 33)
  )
  def test_the_filters_are_the_antialiased_ones(self, interpolation, side):
    picture = _noise(size=(20, 26))
    resized = images.resize(
      picture, side=side, mode='square', interpolation=interpolation
    )
    filters = Image.Resampling
    expected = picture.resize((side, side), filters[interpolation.upper()])
    np.testing.assert_array_equal(resized, expected)
    defined = oracles.resize(picture, (side, side), interpolation)
    difference = np.abs(np.asarray(resized, np.float64) - defined)
    # Pillow's weights have 22 bits: what ends in a half may round either way.
    self.assertLessEqual(difference.max(), 1)
    self.assertLess(np.mean(difference > 0), 0.03)

  def test_unknown_names_list_the_choices(self):
    with self.assertRaisesRegex(ValueError, 'square or shorter'):
      images.resize(_noise(), side=4, mode='longer')
    with self.assertRaisesRegex(ValueError, 'bilinear or bicubic'):
      images.resize(_noise(), side=4, mode='square', interpolation='cubic')


class GlyphsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.config = glyphs_config.get_config()
    self.config.dataset.data_dir = str(self.root / 'data')
    self.config.dataset.fonts_dir = str(self.root / 'fonts')
    self.config.dataset.min_styles = 2
    os.makedirs(self.root / 'fonts' / 'more')
    shutil.copy(_FONTS / 'STIXGeneral.ttf', self.root / 'fonts')
    shutil.copy(_FONTS / 'STIXGeneralBol.ttf', self.root / 'fonts' / 'more')

  def test_each_drawing_is_there_once_and_in_one_class(self):
    data = datasets.load(self.config)
    seen = {}
    for split in (data.train, data.test):
      counts = np.bincount(split.labels)
      self.assertGreaterEqual(counts.min(), 2)
      self.assertLen(counts, split.num_classes)
      for index in range(len(split)):
        record = split[index]
        pixels = split.image(index).tobytes()
        self.assertNotIn(pixels, seen, record['name'])
        seen[pixels] = record['name']
    names = data.train.class_names + data.test.class_names
    self.assertLen(set(names), len(names))
    (latin_a,) = [name for name in names if 'A' in name]
    self.assertIn('Α', latin_a)  # The Greek capital looks the same.

  def test_the_second_load_prepares_nothing(self):
    first = datasets.load(self.config)
    files = {
      path: path.stat().st_mtime_ns
      for path in (self.root / 'data').rglob('*record*')
    }
    self.assertNotEmpty(files)
    second = datasets.load(self.config)
    self.assertEqual(first.digest, second.digest)
    for path, time in files.items():
      self.assertEqual(path.stat().st_mtime_ns, time)
    self.config.dataset.split_seed = 1
    self.assertNotEqual(datasets.load(self.config).digest, first.digest)

  def test_a_file_that_is_no_font_is_named(self):
    content = (_FONTS / 'cmr10.ttf').read_bytes()
    (self.root / 'fonts' / 'torn.ttf').write_bytes(content[:1000])
    (self.root / 'fonts' / 'words.otf').write_text('no font')
    data = datasets.load(self.config)
    self.assertSameElements(
      [name for name, _ in data.skipped], ['torn.ttf', 'words.otf']
    )

  def test_half_written_records_are_written_again(self):
    data = datasets.load(self.config)
    (prepared,) = (self.root / 'data' / 'glyphs').glob('*/1.0.0')
    prepared.rename(prepared.parent / 'incomplete.ABC_1.0.0')
    self.assertEqual(datasets.load(self.config).digest, data.digest)
    self.assertLen(list(prepared.parent.iterdir()), 1)

  def test_folders_without_fonts_are_errors(self):
    self.config.dataset.fonts_dir = '/nowhere'
    with self.assertRaisesRegex(ValueError, 'No folder .*fonts_dir'):
      datasets.load(self.config)
    self.config.dataset.fonts_dir = self.create_tempdir().full_path
    with self.assertRaisesRegex(ValueError, 'No readable font'):
      datasets.load(self.config)

  def test_too_many_styles_asked_for_are_an_error(self):
    self.config.dataset.min_styles = 99
    with self.assertRaisesRegex(ValueError, '99 distinct drawings'):
      datasets.load(self.config)

  def test_drawings_are_centred_and_fit(self):
    face = glyphs.Face(str(_FONTS / 'DejaVuSans.ttf'), 0)
    for character in map(ord, '.Wj\ufdfd'):  # Small, wide, low, far too wide.
      drawing = face.draw(character)
      self.assertEqual(drawing.shape, (32, 32))
      for axis in (0, 1):
        ink = np.flatnonzero(drawing.any(axis=axis))
        self.assertAlmostEqual((ink[0] + ink[-1]) / 2, 15.5, delta=1)

  def test_an_unknown_data_set_lists_the_choices(self):
    self.config.dataset.name = 'mnist'
    with self.assertRaisesRegex(ValueError, 'glyphs, image_folder'):
      datasets.load(self.config)


class ImageFolderTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.data_dir = self.create_tempdir().full_path
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def _write(self, name, content):
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)

  def _write_classes(self, names, count=3):
    for number, name in enumerate(names):
      for index in range(count):
        picture = _noise(100 * number + index)
        self._write(f'{name}/{index}.png', _encode(picture))

  def test_a_stop_while_it_is_prepared_leaves_nothing_half(self):
    self._write_classes('abcd')
    encode, pictures = images.encode_png, []

    def encode_and_stop(picture):
      pictures.append(picture)
      if len(pictures) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
      return encode(picture)

    with (
      mock.patch.object(images, 'encode_png', encode_and_stop),
      signals.StopSignals(),
      self.assertRaises(signals.Stopped),
    ):
      self._load()
    self.assertEmpty([*pathlib.Path(self.data_dir).rglob('*.array_record*')])
    self.assertLen(self._load().train, 6)

  def test_who_waited_for_another_to_prepare_reads_what_it_prepared(self):
    self._write_classes('abcd')
    locked = lock.locked

    @contextlib.contextmanager
    def locked_later(path):
      with mock.patch.object(lock, 'locked', locked):
        self._load()  # The other one.
      with locked(path):
        yield

    with mock.patch.object(lock, 'locked', locked_later):
      data = self._load()
    self.assertEqual((len(data.train), len(data.test)), (6, 6))

  def _load(self, **fields):
    config = image_folder_config.get_config()
    config.dataset.root = str(self.root)
    config.dataset.data_dir = self.data_dir
    config.dataset.resize = 24
    config.dataset.update(fields)
    return datasets.load(config)

  def _records(self, data):
    return [
      split[i] | {'class': split.class_names[split.labels[i]]}
      for split in (data.train, data.test)
      for i in range(len(split))
    ]

  def test_folders_are_classes_split_without_overlap(self):
    self._write_classes('abcdef')
    data = self._load()
    self.assertEqual((data.train.num_classes, data.test.num_classes), (3, 3))
    self.assertEmpty(set(data.train.class_names) & set(data.test.class_names))
    for record in self._records(data):
      self.assertEqual(record['name'].split('/')[0], record['class'])
      self.assertEqual(images.decode(record['image']).size, (24, 24))

  def test_a_picture_is_resized_and_nothing_else(self):
    self._write_classes('abcd')
    records = self._records(self._load())
    (record,) = [r for r in records if r['name'] == 'b/1.png']
    expected = _noise(101).resize((24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(images.decode(record['image']), expected)

  def test_another_filter_makes_another_data_set(self):
    self._write_classes('abcd')
    self._load()
    records = self._records(self._load(interpolation='bicubic'))
    (record,) = [r for r in records if r['name'] == 'b/1.png']
    expected = _noise(101).resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images.decode(record['image']), expected)

  def test_bad_files_are_named_and_the_rest_is_used(self):
    self._write_classes('abcd')
    whole = _encode(_noise(size=(64, 64)), 'jpeg')
    self._write('a/zero.jpg', b'')
    self._write('a/torn.jpg', whole[: len(whole) // 2])
    self._write('b/notes.txt', b'hello')
    self._write('only bad/x.png', b'x')
    self._write('stray.png', _encode(_noise()))
    self._write('c/.hidden.png', b'')
    self._write('c/Thumbs.db', b'')
    data = self._load()
    reasons = dict(data.skipped)
    self.assertSameElements(
      reasons,
      [
        'a/zero.jpg',
        'a/torn.jpg',
        'b/notes.txt',
        'only bad/x.png',
        'only bad/',
        'stray.png',
      ],
    )
    self.assertIn('empty', reasons['a/zero.jpg'])
    self.assertIn('truncated', reasons['a/torn.jpg'])
    self.assertLen(self._records(data), 12)
    self.assertEqual(data.train.num_classes + data.test.num_classes, 4)

  def test_names_and_nesting_do_not_matter(self):
    self._write_classes('abc')
    self._write('Ünï cödé/deep/er/my picture.JPG', _encode(_noise(), 'jpeg'))
    self._write('Ünï cödé/wrong suffix.png', _encode(_noise(), 'jpeg'))
    names = [r['name'] for r in self._records(self._load())]
    self.assertIn('Ünï cödé/deep/er/my picture.JPG', names)
    self.assertIn('Ünï cödé/wrong suffix.png', names)

  def test_a_class_with_one_picture_stays(self):
    self._write_classes('abcd', count=1)
    self.assertLen(self._records(self._load()), 4)

  def test_held_out_pictures_search_those_that_are_learned(self):
    self._write_classes('abcd')
    whole, data = self._load(), self._load(long_tail=2.0)
    self.assertIsNone(whole.seen)
    self.assertLess(len(data.train), len(whole.train))
    self.assertNotEqual(data.digest, whole.digest)
    np.testing.assert_array_equal(
      data.seen.rows[~data.seen.is_query], data.train.rows
    )
    self.assertContainsSubset(data.seen.rows, whole.train.rows)
    self.assertSameElements(data.seen.labels, range(whole.train.num_classes))

  def test_train_and_test_folders_are_taken_as_they_are(self):
    self._write_classes(['train/a', 'train/b', 'test/b', 'test/c', 'test/d'])
    data = self._load()
    self.assertEqual(data.train.class_names, ('train/a', 'train/b'))
    self.assertEqual(data.test.class_names, ('test/b', 'test/c', 'test/d'))
    self.assertEqual(data.num_shared_classes, 1)

  def test_a_bad_class_moves_no_other_from_train_to_test(self):
    self._write_classes(['train/a', 'train/c', 'test/d', 'test/e'])
    self._write('train/b/x.png', b'x')
    data = self._load()
    self.assertEqual(data.train.class_names, ('train/a', 'train/c'))
    self.assertEqual(data.test.class_names, ('test/d', 'test/e'))

  def test_records_keep_their_order_over_several_chunks(self):
    self._write_classes('abcd', count=300)
    data = self._load()
    names = [record['name'] for record in self._records(data)]
    self.assertLen(set(names), 1200)
    for split in (data.train, data.test):
      self.assertTrue(np.all(np.diff(split.rows) > 0))
      for index in range(0, len(split), 97):
        record = split[index]
        self.assertEqual(
          record['name'].split('/')[0],
          split.class_names[split.labels[index]],
        )

  def test_a_changed_file_makes_a_new_data_set(self):
    self._write_classes('abcd')
    before = self._load()
    self._write('a/new.png', _encode(_noise(7)))
    after = self._load()
    self.assertLen(self._records(after), len(self._records(before)) + 1)
    self.assertNotEqual(before.digest, after.digest)

  def test_roots_without_classes_are_errors(self):
    with self.assertRaisesRegex(ValueError, 'no sub-folder'):
      self._load()
    for root, message in (('', 'is empty'), ('/nowhere', 'No folder')):
      with self.assertRaisesRegex(ValueError, message):
        self._load(root=root)
    self._write('a/x.png', b'x')
    with self.assertRaisesRegex(ValueError, 'No file .* is a readable image'):
      self._load()


if __name__ == '__main__':
  absltest.main()
