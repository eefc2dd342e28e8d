import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
from http import server

import made_archives
import numpy as np
import one_convolution
from absl.testing import absltest, parameterized
from PIL import Image

from proxy_nca_jax import datasets, input_pipeline, train
from proxy_nca_jax.configs import default
from proxy_nca_jax.datasets import __main__ as command
from proxy_nca_jax.datasets import annotations, downloads

_ROOT = pathlib.Path(__file__).parent.parent


def _write(name, folder):
  """Writes a dataset in its published layout; Cars196 as two archives."""
  folder = str(folder)
  if name == 'cub200':
    made_archives.write_tgz(
      f'{folder}/CUB_200_2011.tgz', made_archives.cub200()
    )
  elif name == 'cars196':
    images, beside = made_archives.cars196()
    made_archives.write_tgz(f'{folder}/car_ims.tgz', images)
    made_archives.write_folder(folder, beside)
  elif name == 'cars196_for_classification':
    parts = made_archives.cars196_for_classification()
    archives = ('cars_train', 'cars_test', 'car_devkit')
    for archive, files in zip(archives, parts):
      made_archives.write_tgz(f'{folder}/{archive}.tgz', files)
    made_archives.write_folder(folder, parts[-1])
  elif name == 'sop':
    made_archives.write_zip(
      f'{folder}/Stanford_Online_Products.zip', made_archives.sop()
    )
  elif name == 'inshop':
    images, beside = made_archives.inshop()
    os.makedirs(f'{folder}/Img')
    made_archives.write_zip(f'{folder}/Img/img.zip', images)
    made_archives.write_folder(folder, beside)
  elif name == 'market1501':
    made_archives.write_zip(
      f'{folder}/Market-1501-v15.09.15.zip', made_archives.market1501()
    )


class _Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.manual_dir = pathlib.Path(self.create_tempdir().full_path)
    self.data_dir = pathlib.Path(self.create_tempdir().full_path)

  def _config(self, name, **fields):
    config = default.get_config()
    config.dataset.update(
      name=name,
      data_dir=str(self.data_dir),
      manual_dir=str(self.manual_dir),
      allow_incomplete=True,
      resize=16,
    )
    config.dataset.update(fields)
    return config

  def _load(self, name, **fields):
    return datasets.load(self._config(name, **fields))


class LayoutsTest(_Test):
  def test_cub200_is_split_by_species(self):
    _write('cub200', self.manual_dir)
    data = self._load('cub200')
    self.assertEqual(
      data.train.class_names, ('001.Bird_1', '002.Bird_2', '100.Bird_100')
    )
    self.assertEqual(
      data.test.class_names, ('101.Bird_101', '199.Bird_199', '200.Bird_200')
    )
    self.assertEqual((len(data.train), len(data.test)), (9, 9))
    record = data.test[4]
    self.assertEqual(
      record['name'], 'images/199.Bird_199/Bird_199_0001_199001.jpg'
    )
    self.assertEqual(record['class_name'], '199.Bird_199')
    self.assertEqual(record['image'], made_archives.make_image(19901))

  @parameterized.parameters('cars196', 'cars196_for_classification')
  def test_cars196_is_read_from_both_sets_of_archives(self, name):
    _write(name, self.manual_dir)
    data = self._load('cars196')
    self.assertEqual(
      data.train.class_names,
      tuple(f'Make Model C/V {number} 2012' for number in (1, 2, 98)),
    )
    self.assertEqual(
      data.test.class_names,
      tuple(f'Make Model C/V {number} 2012' for number in (99, 195, 196)),
    )
    images = 3 if name == 'cars196' else 4
    np.testing.assert_array_equal(
      data.train.labels, np.repeat(range(3), images)
    )
    expected = {made_archives.make_image(19500 + i) for i in range(images)}
    mine = [i for i in range(len(data.test)) if data.test.labels[i] == 1]
    self.assertEqual({data.test[i]['image'] for i in mine}, expected)

  def test_sop_has_super_classes(self):
    _write('sop', self.manual_dir)
    data = self._load('sop')
    self.assertEqual(data.train.class_names, ('1', '2', '3', '4'))
    self.assertEqual(data.test.class_names, ('5', '6', '7'))
    record = data.test[0]
    self.assertEqual(record['name'], 'cabinet_final/110000000005_0.JPG')
    self.assertEqual(record['super_class'], 'cabinet')
    self.assertIsNone(data.test.is_query)

  def test_inshop_has_queries_and_a_gallery(self):
    _write('inshop', self.manual_dir)
    data = self._load('inshop')
    self.assertLen(data.train, 12)
    self.assertIsNone(data.train.is_query)
    np.testing.assert_array_equal(data.test.is_query, [True] * 6 + [False] * 6)
    np.testing.assert_array_equal(
      data.test.labels, [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    )
    self.assertEqual(data.test[0]['super_class'], 'WOMEN/Dresses')
    self.assertEqual(data.test[0]['class_name'], 'id_00000004')

  def test_market1501_has_cameras_distractors_and_no_junk(self):
    _write('market1501', self.manual_dir)
    data = self._load('market1501')
    self.assertEqual(data.train.class_names, ('0001', '0002', '0003'))
    self.assertEqual(data.test.class_names, ('0004', '0005', '0006', '0000'))
    self.assertEqual(data.test.is_query.sum(), 3)
    names = [data.test[i]['name'] for i in range(len(data.test))]
    self.assertFalse(any('-1_c1' in name for name in names))
    for name, camera, record in zip(names, data.test.cameras, data.test):
      self.assertIn(f'_c{camera}s', name)
      self.assertEqual(record['camera'], camera)
    skipped = dict(data.skipped)
    self.assertIn('system', skipped['bounding_box_test/Thumbs.db'])

  def test_extracted_folders_are_accepted(self):
    folder = self.manual_dir / 'my data'
    made_archives.write_folder(folder, made_archives.cub200())
    self.assertLen(self._load('cub200').train, 9)
    images, beside = made_archives.inshop()
    made_archives.write_folder(folder / 'Img', images)
    made_archives.write_folder(folder, beside)
    self.assertLen(self._load('inshop').train, 12)
    # The user's files are kept.
    self.assertTrue((folder / 'CUB_200_2011' / 'images.txt').exists())
    self.assertTrue((folder / 'Eval').exists())

  def test_the_case_of_file_names_does_not_matter(self):
    files = {
      name.replace('.JPG', '.jpg'): content
      for name, content in made_archives.sop().items()
    }
    made_archives.write_zip(
      self.manual_dir / 'stanford_online_products.ZIP', files
    )
    data = self._load('sop')
    self.assertLen(data.train, 12)
    self.assertEqual(data.train[0]['name'], 'cabinet_final/110000000001_0.jpg')

  @parameterized.parameters(
    ('cub200', 'recall@1'),
    ('cars196', 'recall@1'),
    ('sop', 'recall@1'),
    ('inshop', 'recall@1'),
    ('market1501', 'cmc@1'),
  )
  def test_from_the_archive_to_the_metrics(self, name, score):
    self.enter_context(one_convolution.replaced())
    _write(name, self.manual_dir)
    config = self._config(name, image_size=16, num_classes=0)
    config.update(num_steps=2, batch_size=8, log_every=1, report=False)
    config.evaluation.batch_size = 8
    config.model.width = 4
    results = train.train_and_evaluate(config, self.create_tempdir().full_path)
    for title in ('trained', 'untrained', 'raw_pixels'):
      self.assertBetween(results[title][score], 0, 1)
    self.assertNotEmpty(results['dataset']['skipped'])
    self.assertEqual('nmi' in results['trained'], name != 'market1501')


class TrustTest(_Test):
  def test_deviating_counts_are_refused_and_listed(self):
    _write('sop', self.manual_dir)
    with self.assertRaisesRegex(
      ValueError,
      'train: 12 images of 4 classes, expected 59,551 of 11,318.*test: 9 ',
    ):
      self._load('sop', allow_incomplete=False)
    self.assertEmpty(list(self.data_dir.rglob('*array_record*')))

  def test_all_problems_are_listed_at_once(self):
    files = made_archives.sop()
    root = 'Stanford_Online_Products'
    del files[f'{root}/cabinet_final/110000000001_0.JPG']
    files[f'{root}/cabinet_final/._110000000001_1.JPG'] = b'x'
    files[f'{root}/chair_final/Thumbs.db'] = b'x'
    files[f'{root}/chair_final/more.JPG'] = made_archives.make_image(0)
    files[f'{root}/chair_final/110000000002_2.JPG'] = b'not an image'
    files[f'{root}/Ebay_test.txt'] += (
      b'98 7 1 coffee_maker_final/110000000007_0.JPG\n99 7\n'
      b'97 7 1 ../../../../etc/passwd\n96 7 1 /etc/passwd\n'
    )
    made_archives.write_zip(
      self.manual_dir / 'Stanford_Online_Products.zip', files
    )
    with self.assertLogs('proxy_nca_jax', 'WARNING') as logs:
      data = self._load('sop')
    skipped = dict(data.skipped)
    for name, reason in {
      'cabinet_final/110000000001_0.JPG': 'missing',
      'cabinet_final/._110000000001_1.JPG': 'operating system',
      'chair_final/Thumbs.db': 'operating system',
      'chair_final/more.JPG': 'unlisted',
      'chair_final/110000000002_2.JPG': 'not an image',
      'coffee_maker_final/110000000007_0.JPG': 'twice',
      'Ebay_test.txt:12': 'expected image_id class_id',
      '../../../../etc/passwd': 'missing',
      '/etc/passwd': 'missing',
      'train': '11 images',
    }.items():
      self.assertIn(reason, skipped[name])
    self.assertIn('/etc/passwd: annotated, but missing', ''.join(logs.output))
    self.assertEqual((len(data.train), len(data.test)), (10, 9))
    listed = (self.data_dir / 'downloads' / 'sop.problems.txt').read_text()
    for name, reason in data.skipped:
      self.assertIn(f'{name}: {reason}\n', listed)

  def test_many_problems_are_counted_by_kind(self):
    problems = [(str(i), 'annotated, but missing') for i in range(990)]
    problems += [(str(i), f'class {i}, expected 1 to 1,96') for i in range(9)]
    counts = '990 x annotated, but missing, 9 x class N, expected N to N'
    _write('sop', self.manual_dir)
    with (
      absltest.mock.patch.object(
        annotations, 'compare_counts', return_value=problems
      ),
      self.assertLogs('proxy_nca_jax', 'WARNING') as logs,
    ):
      data = self._load('sop')
    self.assertLen(data.skipped, 999)
    self.assertLen([line for line in logs.output if ':sop: ' in line], 21)
    self.assertIn(counts, logs.output[-1])
    listed = self.data_dir / 'downloads' / 'sop.problems.txt'
    self.assertIn(str(listed), logs.output[-1])
    self.assertLen(listed.read_text().splitlines(), 999)

  @parameterized.parameters('annotated', 'readable')
  def test_a_split_without_images_is_an_error(self, kind):
    files = made_archives.sop()
    root = 'Stanford_Online_Products'
    tests = [
      line.split()[-1].decode()
      for line in files[f'{root}/Ebay_test.txt'].splitlines()[1:]
    ]
    for name in tests:
      files[f'{root}/{name}'] = b'x'
      if kind == 'annotated':
        del files[f'{root}/{name}']
    made_archives.write_zip(
      self.manual_dir / 'Stanford_Online_Products.zip', files
    )
    with self.assertRaisesRegex(ValueError, 'sop has no image of the test spl'):
      self._load('sop')
    self.assertEmpty(list(self.data_dir.rglob('*array_record*')))

  @parameterized.parameters(
    ('cub200', 'images.txt'),
    ('cars196', 'cars_annos.mat'),
    ('sop', 'Ebay_test.txt'),
    ('inshop', 'list_eval_partition.txt'),
  )
  def test_a_missing_annotation_is_named_before_a_download(self, name, missing):
    files = getattr(made_archives, name)()
    for part in (files,) if isinstance(files, dict) else files:
      made_archives.write_folder(self.manual_dir / 'copy', part)
    (found,) = self.manual_dir.rglob(missing)
    found.unlink()
    with absltest.mock.patch.object(downloads, 'fetch') as fetch:
      with self.assertRaisesRegex(ValueError, f'but not .*{missing}'):
        self._load(name)
    fetch.assert_not_called()

  def test_an_unreadable_image_is_refused_by_name(self):
    files = made_archives.cub200()
    name = 'CUB_200_2011/images/002.Bird_2/Bird_2_0001_2001.jpg'
    files[name] = files[name][:300]
    made_archives.write_tgz(self.manual_dir / 'CUB_200_2011.tgz', files)
    counts = {'train': (9, 3), 'test': (9, 3)}
    with absltest.mock.patch.object(
      datasets.PUBLISHED['cub200'], 'counts', counts
    ):
      with self.assertRaisesRegex(ValueError, r'Bird_2_0001_2001.jpg: Trunc'):
        self._load('cub200', allow_incomplete=False)

  def test_a_class_in_both_splits_is_an_error(self):
    files = made_archives.sop()
    files['Stanford_Online_Products/Ebay_test.txt'] += (
      b'98 1 1 cabinet_final/110000000001_0.JPG\n'
    )
    train = files['Stanford_Online_Products/Ebay_train.txt'].splitlines(True)
    files['Stanford_Online_Products/Ebay_train.txt'] = b''.join(
      line for line in train if b'110000000001_0' not in line
    )
    made_archives.write_zip(
      self.manual_dir / 'Stanford_Online_Products.zip', files
    )
    with self.assertRaisesRegex(ValueError, "in train and in test.*'1'"):
      self._load('sop')

  @parameterized.parameters('cars_annos.mat', 'devkit/cars_meta.mat')
  def test_a_broken_matrix_is_named(self, name):
    folder = self.manual_dir / 'cars'
    parts = (
      made_archives.cars196()
      if name == 'cars_annos.mat'
      else made_archives.cars196_for_classification()
    )
    for files in parts:
      made_archives.write_folder(folder, files)
    (folder / name).write_bytes(b'MATLAB 5.0 MAT-file' + bytes(200))
    with self.assertRaisesRegex(ValueError, f'{name} cannot be read'):
      self._load('cars196')

  def test_an_unsafe_archive_writes_nothing(self):
    files = made_archives.sop() | {'../evil': b'x'}
    made_archives.write_zip(
      self.manual_dir / 'Stanford_Online_Products.zip', files
    )
    with self.assertRaisesRegex(ValueError, 'evil'):
      self._load('sop')
    self.assertEmpty(list(self.data_dir.rglob('evil')))
    self.assertEmpty(list(self.data_dir.rglob('*.JPG')))

  def test_a_manual_dir_that_cannot_be_listed_starts_no_download(self):
    error = PermissionError(13, 'Permission denied', str(self.manual_dir))
    with (
      absltest.mock.patch.object(os, 'listdir', side_effect=error),
      absltest.mock.patch.object(downloads, 'fetch') as fetch,
      self.assertRaisesRegex(OSError, f'denied.*{self.manual_dir}'),
    ):
      self._load('sop')
    fetch.assert_not_called()

  def test_missing_files_are_described(self):
    config = self._config('inshop', allow_incomplete=False)
    with self.assertRaises(ValueError) as caught:
      datasets.load(config)
    for part in ('img.zip', 'cfada103', str(self.manual_dir), 'DeepFashion'):
      self.assertIn(part, str(caught.exception))
    config.dataset.manual_dir = '/nowhere'
    with self.assertRaisesRegex(ValueError, "No folder '/nowhere'.*img.zip"):
      datasets.load(config)

  def test_missing_files_are_downloaded_and_verified(self):
    served = pathlib.Path(self.create_tempdir().full_path)
    _write('sop', served)
    archive = served / 'Stanford_Online_Products.zip'
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    handler = functools.partial(
      server.SimpleHTTPRequestHandler, directory=str(served)
    )
    with server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as http:
      threading.Thread(target=http.serve_forever, daemon=True).start()
      base = f'http://127.0.0.1:{http.server_port}'
      urls = (f'{base}/nothing', f'{base}/{archive.name}')
      for checksum, message in (
        ('sha256:' + '0' * 64, f'sha256 is {digest}'),
        (f'sha256:{digest}', ''),
      ):
        file = downloads.RemoteFile(
          archive.name, urls, archive.stat().st_size, checksum
        )
        with absltest.mock.patch.object(
          datasets.PUBLISHED['sop'], 'files', ((file,),)
        ):
          if message:
            with self.assertRaisesRegex(ValueError, f'404 .*{message}'):
              self._load('sop')
          else:
            self.assertLen(self._load('sop').train, 12)
      http.shutdown()
    self.assertTrue((self.data_dir / 'downloads' / archive.name).exists())

  def test_a_truncated_archive_is_named(self):
    _write('cub200', self.manual_dir)
    archive = self.manual_dir / 'CUB_200_2011.tgz'
    archive.write_bytes(archive.read_bytes()[:5000])
    with self.assertRaisesRegex(ValueError, 'CUB_200_2011.tgz is damaged'):
      self._load('cub200')

  def test_the_second_load_needs_no_archive(self):
    _write('sop', self.manual_dir)
    counts = {'train': (12, 4), 'test': (9, 3)}
    with absltest.mock.patch.object(
      datasets.PUBLISHED['sop'], 'counts', counts
    ):
      first = self._load('sop', allow_incomplete=False)
    self.assertEmpty(first.skipped)
    self.assertEmpty(list((self.data_dir / 'downloads').glob('sop*')))
    second = self._load('sop', allow_incomplete=False, manual_dir='')
    self.assertEqual(first.digest, second.digest)

  def test_files_in_the_wrong_archive_are_an_error(self):
    made_archives.write_zip(
      self.manual_dir / 'Stanford_Online_Products.zip', {'a/b.txt': b'x'}
    )
    with self.assertRaisesRegex(ValueError, 'Ebay_train.txt'):
      self._load('sop')

  def test_rows_with_too_few_words_are_problems(self):
    root = self.manual_dir
    (root / 'x.txt').write_text('header\n1 a b c\n\n2\n')
    rows, problems = annotations.read_rows(
      str(root), 'x.txt', ('id', 'path'), skip=1
    )
    self.assertEqual(rows, [{'id': '1', 'path': 'a b c'}])
    self.assertEqual([name for name, _ in problems], ['x.txt:4'])


class CacheTest(_Test):
  def _images(self, split):
    return [split.image(i) for i in range(len(split))]

  @parameterized.parameters('square', 'shorter')
  def test_cached_images_equal_those_of_the_recipe(self, mode):
    _write('sop', self.manual_dir)
    plain = self._load('sop', resize_mode=mode)
    stored = self._load('sop', resize_mode=mode, cache_size=16)
    for name in ('train', 'test'):
      expected = self._images(getattr(plain, name))
      actual = self._images(getattr(stored, name))
      self.assertLen(actual, len(expected))
      for a, b in zip(actual, expected):
        np.testing.assert_array_equal(a, b)
    image = Image.open(self._write_image(plain.train[3]['image']))
    size = (16, 16) if mode == 'square' else (16 * 24 // 20, 16)
    np.testing.assert_array_equal(
      stored.train.image(3), image.resize(size, Image.Resampling.BILINEAR)
    )

  def test_training_sees_the_same_batches(self):
    _write('sop', self.manual_dir)
    batches = []
    for cache_size in (0, 16):
      config = self._config('sop', image_size=12, cache_size=cache_size)
      config.batch_size = 8
      iterator = input_pipeline.train_batches(
        datasets.load(config).train, config
      )
      batches.append([next(iterator) for _ in range(4)])
      iterator.close()
    for decoded, stored in zip(*batches):
      for name in decoded:
        np.testing.assert_array_equal(stored[name], decoded[name])

  def _write_image(self, encoded):
    path = self.data_dir / 'image.jpg'
    path.write_bytes(encoded)
    return path

  def test_the_file_is_written_once_and_read_by_all(self):
    _write('sop', self.manual_dir)
    self._load('sop', cache_size=16)
    (file,) = self.data_dir.glob('resized/*/pixels.bin')
    before = file.stat()
    self._load('sop', cache_size=16)
    self.assertEqual(file.stat().st_mtime_ns, before.st_mtime_ns)
    self._load('sop', cache_size=12, resize=12)
    self.assertLen(list(self.data_dir.glob('resized/*/pixels.bin')), 2)
    data = self._load('sop', cache_size=16, interpolation='bicubic')
    self.assertLen(list(self.data_dir.glob('resized/*/pixels.bin')), 3)
    image = Image.open(self._write_image(data.train[3]['image']))
    np.testing.assert_array_equal(
      data.train.image(3), image.resize((16, 16), Image.Resampling.BICUBIC)
    )

  def test_a_bilinear_cache_keeps_its_first_name(self):
    _write('sop', self.manual_dir)
    self._load('sop', cache_size=16)
    (file,) = self.data_dir.glob('resized/*/inputs.json')
    self.assertEqual(
      set(json.loads(file.read_text())),
      {'bytes', 'dataset', 'mode', 'pillow', 'records', 'side'},
    )

  def test_an_incomplete_cache_is_written_again(self):
    _write('sop', self.manual_dir)
    data = self._load('sop', cache_size=16)
    expected = data.train.image(2).copy()
    (folder,) = self.data_dir.glob('resized/*[0-9a-f]')
    folder.rename(str(folder) + '.part')
    (folder.with_suffix('.part') / 'pixels.bin').write_bytes(b'')
    data = self._load('sop', cache_size=16)
    np.testing.assert_array_equal(data.train.image(2), expected)
    self.assertEmpty(list(self.data_dir.glob('resized/*.part')))

  def test_a_truncated_or_missing_cache_is_named(self):
    _write('sop', self.manual_dir)
    self._load('sop', cache_size=16)
    (file,) = self.data_dir.glob('resized/*/pixels.bin')
    message = (
      f'cannot be read from .{file.parent}. .{{}}[)][.] Delete that folder'
    )
    data = self._load('sop', cache_size=16)
    data.train.image(0)
    os.truncate(file, 5)  # While it is open.
    with self.assertRaisesRegex(
      ValueError, message.format('the file is truncated')
    ):
      data.train.image(0)
    file.unlink()
    with self.assertRaisesRegex(ValueError, message.format('No such file.*')):
      self._load('sop', cache_size=16).train.image(0)

  def test_recipes_crop_originals_unless_only_resized_images_are_stored(self):
    _write('sop', self.manual_dir)
    fields = dict(cache_size=16, crop='random_resized')
    data = self._load('sop', allow_resized_source=True, **fields)
    self.assertTrue(data.is_resized_source)
    self.assertEqual(data.train.image(0).shape, (16, 16, 3))
    data = self._load('sop', crop='random_resized')
    self.assertFalse(data.is_resized_source)
    self.assertEqual(data.train.image(0).shape, (20, 24, 3))
    self.assertEqual(data.test.image(0).shape, (16, 16, 3))


class CommandTest(_Test):
  def _run(self, *arguments):
    return subprocess.run(
      [sys.executable, '-m', 'proxy_nca_jax.datasets', *arguments],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
    )

  def test_prepare_and_list(self):
    _write('market1501', self.manual_dir)
    folders = [f'--data_dir={self.data_dir}', f'--manual_dir={self.manual_dir}']
    listed = self._run('list', *folders)
    self.assertEqual(listed.returncode, 0, listed.stderr)
    self.assertRegex(listed.stdout, r'market1501 +gallery +751 +15,913 +arch')
    self.assertRegex(listed.stdout, r'sop +train +11,318 +59,551 +-')
    refused = self._run('prepare', 'market1501', *folders)
    self.assertEqual(refused.returncode, 2)
    self.assertRegex(refused.stderr.splitlines()[-1], 'Error: .*12,936 of 751')
    self.assertNotIn('Traceback', refused.stderr)
    taken = self._run('prepare', 'market1501', '--allow_incomplete', *folders)
    self.assertEqual(taken.returncode, 0, taken.stderr)
    self.assertRegex(taken.stdout, 'query: 3 images')

  def test_a_prepared_dataset_is_listed_as_such(self):
    _write('sop', self.manual_dir)
    counts = {'train': (12, 4), 'test': (9, 3)}
    arguments = [
      f'--data_dir={self.data_dir}',
      f'--manual_dir={self.manual_dir}',
    ]
    output = absltest.mock.Mock()
    with (
      absltest.mock.patch.object(datasets.PUBLISHED['sop'], 'counts', counts),
      absltest.mock.patch('builtins.print', output),
    ):
      command.main(['prepare', 'sop', *arguments])
      command.main(['list', *arguments])
    lines = [call.args[0] for call in output.mock_calls]
    self.assertTrue(
      any(x.startswith('sop') and x.endswith('prepared') for x in lines), lines
    )


if __name__ == '__main__':
  absltest.main()
