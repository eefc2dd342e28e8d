import contextlib
import errno
import io
import os
import pathlib
import shutil
import signal
from unittest import mock

import made_fonts
import numpy as np
from absl.testing import absltest
from PIL import Image

from proxy_nca_jax import datasets, images
from proxy_nca_jax.configs import glyphs as glyphs_config
from proxy_nca_jax.configs import image_folder as image_folder_config
from proxy_nca_jax.datasets import glyphs
from proxy_nca_jax.runtime import lock, signals


def _encode(image, suffix='png', **options):
  buffer = io.BytesIO()
  image.save(buffer, suffix, **options)
  return buffer.getvalue()


def _noise(seed=0, size=(20, 30)):
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


class GlyphsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.config = glyphs_config.get_config()
    self.config.dataset.data_dir = str(self.root / 'data')
    self.config.dataset.fonts_dir = str(self.root / 'fonts')
    self.config.dataset.min_styles = 2
    os.makedirs(self.root / 'fonts' / 'more')
    for path in ('STIXGeneral.ttf', 'more/STIXGeneralBol.ttf'):
      made_fonts.write(self.root / 'fonts' / path, path.split('/')[-1])

  def test_each_drawing_occurs_once_and_in_one_class(self):
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
    self.assertIn('Α', latin_a)  # The Greek homoglyph.

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

  def test_files_that_are_not_fonts_are_skipped(self):
    content = (made_fonts.FONTS / 'cmr10.ttf').read_bytes()
    (self.root / 'fonts' / 'torn.ttf').write_bytes(content[:1000])
    (self.root / 'fonts' / 'words.otf').write_text('no font')
    data = datasets.load(self.config)
    self.assertSameElements(
      [name for name, _ in data.skipped], ['torn.ttf', 'words.otf']
    )

  def test_half_written_records_are_written_again(self):
    data = datasets.load(self.config)
    (prepared,) = (self.root / 'data' / 'glyphs').glob('*/2.0.0')
    prepared.rename(prepared.parent / 'incomplete.ABC_2.0.0')
    self.assertEqual(datasets.load(self.config).digest, data.digest)
    self.assertLen(list(prepared.parent.iterdir()), 1)

  def test_fonts_are_listed_like_images(self):
    os.mkfifo(self.root / 'fonts' / 'pipe.ttf')
    os.rename(
      self.root / 'fonts' / 'STIXGeneral.ttf',
      os.path.join(os.fsencode(self.root), b'fonts', b'caf\xe9.ttf'),
    )
    data = datasets.load(self.config)
    names = {data.test[i]['name'].split()[1] for i in range(len(data.test))}
    self.assertContainsSubset([r'caf\xe9.ttf'], names)
    with mock.patch.object(os, 'scandir', side_effect=PermissionError(13, 'x')):
      with self.assertRaisesRegex(ValueError, 'cannot be listed'):
        datasets.load(self.config)

  def test_folders_without_fonts_are_errors(self):
    self.config.dataset.fonts_dir = '/nowhere'
    with self.assertRaisesRegex(ValueError, 'No folder .*fonts_dir'):
      datasets.load(self.config)
    self.config.dataset.fonts_dir = self.create_tempdir().full_path
    with self.assertRaisesRegex(ValueError, 'No readable font'):
      datasets.load(self.config)

  def test_too_many_min_styles_are_an_error(self):
    self.config.dataset.min_styles = 99
    with self.assertRaisesRegex(ValueError, '99 distinct drawings'):
      datasets.load(self.config)

  def test_without_a_folder_it_draws_the_text_fonts_of_matplotlib(self):
    builder, skipped = glyphs.make_builder(
      data_dir=self.config.dataset.data_dir, fonts_dir='', min_styles=8
    )
    self.assertEmpty(skipped)
    names = {face.name for face in builder.builder_config.faces}
    self.assertContainsSubset(
      ['DejaVuSans.ttf', 'DejaVuSerif-Bold.ttf', 'STIXGeneralItalic.ttf'], names
    )
    self.assertFalse([name for name in names if 'Display' in name])

  def test_drawings_are_centered_and_fit(self):
    face = glyphs.Face(str(made_fonts.FONTS / 'DejaVuSans.ttf'), 0)
    for character in map(ord, '.Wj\ufdfd'):  # Small, wide, low, far too wide.
      drawing = face.draw(character)
      self.assertEqual(drawing.shape, (32, 32))
      for axis in (0, 1):
        ink = np.flatnonzero(drawing.any(axis=axis))
        self.assertAlmostEqual((ink[0] + ink[-1]) / 2, 15.5, delta=1)

  def test_an_unknown_dataset_lists_the_choices(self):
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
        image = _noise(100 * number + index)
        self._write(f'{name}/{index}.png', _encode(image))

  def test_a_stop_during_preparation_leaves_no_incomplete_records(self):
    self._write_classes('abcd')
    encode, encoded = images.encode_png, []

    def encode_and_stop(image):
      encoded.append(image)
      if len(encoded) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
      return encode(image)

    with (
      mock.patch.object(images, 'encode_png', encode_and_stop),
      signals.StopSignals(),
      self.assertRaises(signals.Stopped),
    ):
      self._load()
    self.assertEmpty([*pathlib.Path(self.data_dir).rglob('*.array_record*')])
    self.assertLen(self._load().train, 6)

  def test_a_prepared_dataset_may_be_read_only(self):
    self._write_classes('abcd')
    expected = self._load().digest
    for code in (errno.EROFS, errno.EACCES):
      error = OSError(code, os.strerror(code))
      with mock.patch.object(lock, 'locked', side_effect=error):
        self.assertEqual(self._load().digest, expected)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(lock, 'locked', side_effect=full):
      with self.assertRaises(OSError):
        self._load()

  def test_home_is_expanded_in_the_folder_of_images(self):
    self._write_classes('abcd')
    home = {'HOME': str(self.root.parent)}
    with mock.patch.dict(os.environ, home):
      self.root = pathlib.Path('~', self.root.name)
      self.assertLen(self._load().train, 6)

  def test_a_run_that_waited_reads_what_another_has_prepared(self):
    self._write_classes('abcd')
    locked = lock.locked

    @contextlib.contextmanager
    def locked_later(path):
      with mock.patch.object(lock, 'locked', locked):
        self._load()  # The other run.
      with locked(path):
        yield

    with mock.patch.object(lock, 'locked', locked_later):
      data = self._load()
    self.assertEqual((len(data.train), len(data.test)), (6, 6))

  def _load(self, **fields):
    config = image_folder_config.get_config('scratch')
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

  def test_folders_become_disjoint_train_and_test_classes(self):
    self._write_classes('abcdef')
    data = self._load()
    self.assertEqual((data.train.num_classes, data.test.num_classes), (3, 3))
    self.assertEmpty(set(data.train.class_names) & set(data.test.class_names))
    for record in self._records(data):
      self.assertEqual(record['name'].split('/')[0], record['class'])
      self.assertEqual(images.decode(record['image']).size, (24, 24))

  def test_images_are_only_resized(self):
    self._write_classes('abcd')
    records = self._records(self._load())
    (record,) = [r for r in records if r['name'] == 'b/1.png']
    expected = _noise(101).resize((24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(images.decode(record['image']), expected)

  def test_another_interpolation_makes_another_dataset(self):
    self._write_classes('abcd')
    self._load()
    records = self._records(self._load(interpolation='bicubic'))
    (record,) = [r for r in records if r['name'] == 'b/1.png']
    expected = _noise(101).resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images.decode(record['image']), expected)

  def test_unreadable_files_are_skipped_by_name(self):
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

  def test_a_class_with_one_image_is_kept(self):
    self._write_classes('abcd', count=1)
    self.assertLen(self._records(self._load()), 4)

  def test_held_out_images_query_the_train_images(self):
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

  def test_train_and_test_folders_define_the_split(self):
    self._write_classes(['train/a', 'train/b', 'test/b', 'test/c', 'test/d'])
    data = self._load()
    self.assertEqual(data.train.class_names, ('train/a', 'train/b'))
    self.assertEqual(data.test.class_names, ('test/b', 'test/c', 'test/d'))
    self.assertEqual(data.num_shared_classes, 1)

  def test_val_is_the_test_split_if_there_is_no_test_folder(self):
    self._write_classes(['Train/a', 'Train/b', 'valid/c', 'valid/d'])
    (self.root / 'other').mkdir()
    with self.assertLogs('proxy_nca_jax') as logs:
      data = self._load()
    self.assertEqual(data.train.class_names, ('Train/a', 'Train/b'))
    self.assertEqual(data.test.class_names, ('valid/c', 'valid/d'))
    self.assertIn('2 class folders in valid, the test split', str(logs.output))
    self.assertEqual(dict(data.skipped), {'other': 'not in Train or valid'})
    with self.assertRaisesRegex(ValueError, 'needs an image folder with'):
      self._load(validation='folder')

  def test_val_is_the_validation_split_beside_train_and_test(self):
    names = [f'{part}/{x}' for part in ('train', 'val', 'test') for x in 'ab']
    self._write_classes(names)
    self._write('train/0/x.png', b'x')  # Moves the numbers of the classes.
    self._write('val/0/x.png', b'x')
    with self.assertLogs('proxy_nca_jax') as logs:
      unused = self._load()
    self.assertIn('The 2 validation classes', str(logs.output))
    self.assertIsNone(unused.validation)
    data = self._load(validation='folder')
    self.assertEqual(
      [s.class_names for s in (data.train, data.validation, data.test)],
      [tuple(names[i : i + 2]) for i in (0, 2, 4)],
    )
    self.assertNotEqual(data.digest, unused.digest)

  def test_folders_named_as_splits_are_not_classes(self):
    self._write_classes(['train/a', 'train/b'])
    with self.assertRaisesRegex(ValueError, 'has the folders train, which'):
      self._load()
    self._write_classes(['val/a', 'valid/b'])
    with self.assertRaisesRegex(ValueError, 'folders train, val, valid'):
      self._load()

  def test_the_log_lists_the_classes_and_merged_levels(self):
    self._write_classes(['a/x', 'a/y/z', 'b', 'c', 'd'])
    with self.assertLogs('proxy_nca_jax') as logs:
      self._load()
    self.assertIn('4 class folders: a, b, c, d', str(logs.output))
    self.assertIn('up to 2 levels of sub-folders are merged', str(logs.output))

  def test_class_folders_that_cannot_be_listed_are_errors(self):
    self._write_classes('abcd')
    scandir = os.scandir

    def refuse(path):
      if str(path).endswith('/c'):
        raise PermissionError(13, 'Permission denied', path)
      return scandir(path)

    with mock.patch.object(os, 'scandir', refuse):
      with self.assertRaisesRegex(ValueError, "'c' .Permission denied. in"):
        self._load()
    (self.root / 'e').symlink_to('/nowhere/disk')
    with self.assertRaisesRegex(ValueError, "'e' .a link to nothing. in"):
      self._load()

  def test_linked_classes_are_read_and_special_files_are_named(self):
    self._write_classes('abc')
    elsewhere = pathlib.Path(self.create_tempdir().full_path)
    shutil.copytree(self.root / 'a', elsewhere / 'x')
    (self.root / 'd').symlink_to(elsewhere / 'x')
    (self.root / 'b' / 'loop').symlink_to(self.root)
    (self.root / 'b' / 'gone.png').symlink_to('/nowhere')
    (self.root / 'b' / 'zero.png').symlink_to('/dev/zero')
    os.mkfifo(self.root / 'b' / 'pipe.png')
    (self.root / 'empty').mkdir()
    data = self._load()
    self.assertLen(self._records(data), 12)
    self.assertIn('d', data.train.class_names + data.test.class_names)
    self.assertSameElements(
      dict(data.skipped),
      ['b/loop', 'b/gone.png', 'b/zero.png', 'b/pipe.png', 'empty'],
    )

  def test_names_that_are_not_utf8_are_escaped(self):
    self._write_classes('ab')
    for name in (b'caf\xe9', b'\xff\\'):
      folder = os.path.join(os.fsencode(self.root), name)
      os.mkdir(folder)
      shutil.copy(self.root / 'a' / '0.png', os.path.join(folder, b'\xe9.png'))
      with open(os.path.join(folder, b'bad\xe9.png'), 'wb') as file:
        file.write(b'bad')
    for _ in range(2):  # Prepared, and read.
      data = self._load()
      names = data.train.class_names + data.test.class_names
      self.assertSameElements(names, ['a', 'b', r'caf\xe9', r'\xff\\'])
      names = [record['name'] for record in self._records(data)]
      self.assertIn(r'caf\xe9/\xe9.png', names)
      self.assertIn(r'\xff\\/bad\xe9.png', dict(data.skipped))
    self.data_dir = os.path.join(self.data_dir, os.fsdecode(b'\xe9'))
    with self.assertRaisesRegex(ValueError, r'data_dir. is ".*/.xe9"'):
      self._load()

  def test_an_image_without_memory_for_it_is_skipped_by_name(self):
    self._write_classes('abcd')
    decode, small = images.decode, (self.root / 'b' / '1.png').read_bytes()

    def exhaust(encoded, **options):
      if encoded == small:
        raise MemoryError
      return decode(encoded, **options)

    with mock.patch.object(images, 'decode', exhaust):
      data = self._load()
    self.assertEqual([name for name, _ in data.skipped], ['b/1.png'])

  def test_an_unreadable_class_moves_no_other_between_splits(self):
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

  def test_a_changed_file_makes_a_new_dataset(self):
    self._write_classes('abcd')
    before = self._load()
    self._write('a/new.png', _encode(_noise(7)))
    after = self._load()
    self.assertLen(self._records(after), len(self._records(before)) + 1)
    self.assertNotEqual(before.digest, after.digest)

  def test_a_file_overwritten_with_equal_size_and_time_is_noticed(self):
    self._write_classes('abcd')
    path = self.root / 'a' / '1.png'
    # What follows the end of a PNG is ignored.
    path.write_bytes(_encode(_noise(7)).ljust(10**5, b'\0'))
    status = path.stat()
    before = self._load()
    path.write_bytes(_encode(_noise(8)).ljust(10**5, b'\0'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    self.assertEqual(path.stat().st_size, status.st_size)
    self.assertNotEqual(self._load().digest, before.digest)

  def test_the_digest_covers_names_and_images_but_no_paths_or_times(self):
    self._write_classes('abcd')
    before = self._load()
    # In another data_dir, from files with other modification times.
    self.data_dir = self.create_tempdir().full_path
    for path in self.root.rglob('*.png'):
      os.utime(path, (0, 0))
    self.assertEqual(self._load().digest, before.digest)
    moved = self.root.parent / f'{self.root.name}-moved'
    self.addCleanup(shutil.rmtree, moved)
    shutil.copytree(self.root, moved)
    self.assertEqual(self._load(root=str(moved)).digest, before.digest)
    os.rename(self.root / 'a' / '1.png', self.root / 'a' / '1b.png')
    renamed = self._load()
    self.assertNotEqual(renamed.digest, before.digest)
    # The same names and labels, but other images.
    self._write('a/1b.png', _encode(_noise(77)))
    self.assertNotIn(self._load().digest, (before.digest, renamed.digest))

  def test_resized_images_of_other_records_are_not_reused(self):
    self._write_classes('abcd')
    before = self._load(cache_size=24)
    self._write('a/1.png', _encode(_noise(77)))
    after = self._load(cache_size=24)
    self.assertNotEqual(before.digest, after.digest)
    self.assertLen(list(pathlib.Path(self.data_dir, 'resized').glob('*/')), 2)

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
