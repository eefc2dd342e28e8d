"""Tables of images as input of image_folder."""

import csv
import importlib.util
import io
import os
import pathlib
from unittest import mock

import made_archives
import numpy as np
import pyarrow
from absl.testing import absltest, parameterized
from PIL import Image
from pyarrow import parquet

import proxy_nca_jax
from proxy_nca_jax import datasets, input_pipeline
from proxy_nca_jax.configs import default
from proxy_nca_jax.configs import image_folder as image_folder_config
from proxy_nca_jax.datasets import tables


def _noise(seed, size=(20, 30)):
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


class _Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.data_dir = self.create_tempdir().full_path
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def _write_images(self, names):
    for seed, name in enumerate(names):
      path = self.root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      _noise(seed).save(path)

  def _write_table(self, columns, rows, name='table.csv'):
    """Writes a table: columns as in 'path label', cells as they are."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([columns.split(), *rows])
    return self._write_text(buffer.getvalue(), name)

  def _write_text(self, text, name='table.csv'):
    path = self.root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)

  def _load(self, table, **fields):
    config = image_folder_config.get_config('scratch')
    config.dataset.table = str(table)
    config.dataset.data_dir = self.data_dir
    config.dataset.resize = 16
    config.dataset.update(fields)
    return datasets.load(config)


def _contents(split):
  return [
    (split[i]['name'], split[i]['class_name'], split.image(i).tobytes())
    for i in range(len(split))
  ]


class TablesTest(_Test):
  def test_a_table_of_a_folder_is_the_same_dataset_in_any_order(self):
    names = [f'{label}/{i}.png' for label in 'dabc' for i in range(3)]
    folder = pathlib.Path(self.create_tempdir().full_path)
    self.root = folder
    self._write_images(names)
    folder = self._load('', root=str(folder))
    rows = [(name, name[0]) for name in names]
    table = self._load(self._write_table('path label', rows))
    self.assertEqual(table.digest, folder.digest)
    for split in ('train', 'test'):
      self.assertEqual(
        _contents(getattr(table, split)), _contents(getattr(folder, split))
      )
    turned = self._load(self._write_table('path label', rows[::-1]))
    self.assertEqual(turned.digest, folder.digest)

  def test_the_column_split_defines_the_split(self):
    words = ('Train', 'TRAIN', 'val', 'valid', 'validation', 'test', 'test')
    names = [f'{i}.png' for i in range(len(words))]
    self._write_images(names)
    rows = list(zip(names, (1, 2, 3, 4, 3, 2, 7), words))
    table = self._write_table('path label split', rows)
    data = self._load(table, validation='folder')
    self.assertEqual(data.train.class_names, ('1', '2'))
    self.assertEqual(data.validation.class_names, ('3', '4'))
    self.assertEqual(data.test.class_names, ('2', '7'))
    self.assertEqual(data.num_shared_classes, 1)
    self.assertIsNone(data.test.is_query)
    without = [row for row in rows if row[2] != 'test']
    data = self._load(self._write_table('path label split', without))
    self.assertEqual(data.test.class_names, ('3', '4'))
    self.assertEqual(data.num_shared_classes, 0)

  def test_labels_with_slashes_share_only_whole_names(self):
    names = [f'{i}.png' for i in range(4)]
    self._write_images(names)
    labels = ('fruit/apple', 'fruit/pear', 'tree/apple', 'tree/pear')
    splits = ('train', 'train', 'test', 'test')
    table = self._write_table('path label split', zip(names, labels, splits))
    self.assertEqual(self._load(table).num_shared_classes, 0)

  def test_spreadsheets_quotes_and_spaces_are_understood(self):
    names = ['a, b.png', 'ü.png', 'c.png', 'd.png']
    self._write_images(names)
    text = (
      '\ufeffPath, Label , note\r\n'
      '"a, b.png",  first ,x\r\n'
      '\r\n'
      'ü.png,"second, ""quoted""",\r\n'
      'c.png,third,"two\r\nlines"\r\n'
      'd.png,zero,\r\n'
    )
    with self.assertLogs('proxy_nca_jax') as logs:
      data = self._load(self._write_text(text))
    self.assertIn('not used: note', str(logs.output))
    labels = data.train.class_names + data.test.class_names
    self.assertSameElements(
      labels, ['first', 'second, "quoted"', 'third', 'zero']
    )
    tabs = ''.join(f'{name}\tx{i}\n' for i, name in enumerate(names))
    table = self._write_text(f'path\tlabel\n{tabs}', 'table.TSV')
    self.assertLen(self._load(table).train, 2)

  def test_paths_start_from_the_root_or_the_table_or_are_absolute(self):
    names = [f'images/{i}.png' for i in range(4)]
    self._write_images(names)
    rows = [(name, i) for i, name in enumerate(names)]
    rows[2] = (str(self.root / names[2]), 2)
    self.assertLen(self._load(self._write_table('path label', rows)).test, 2)
    (self.root / 'tables').mkdir()
    table = self._write_table('path label', rows, 'tables/table.csv')
    self.assertLen(self._load(table, root=str(self.root)).test, 2)
    with self.assertRaisesRegex(
      ValueError, r"line 2: 'images/0.png' in '.*/ta"
    ):
      self._load(table)

  def test_boxes_are_cropped_before_resizing(self):
    self._write_images(['a.png', 'b.png'])
    rows = [
      ('a.png', 1, '0 0 20 20'),
      ('a.png', 2, '5.0, 2.0, 25.4, 18.0'),
      ('b.png', 3, ''),
      ('b.png', 4, '0 0 30 20'),
    ]
    table = self._write_table('path label box', rows)
    data = self._load(table)
    crop = _noise(0).crop((5, 2, 25, 18)).resize((16, 16), 2)
    whole = _noise(1).resize((16, 16), 2)
    pixels = {
      record[1]: record[2]
      for split in (data.train, data.test)
      for record in _contents(split)
    }
    self.assertEqual(pixels['2'], crop.tobytes())
    self.assertEqual(pixels['3'], whole.tobytes())
    self.assertEqual(pixels['4'], whole.tobytes())
    apart = [
      (path, label, *(box.replace(',', ' ').split() or [''] * 4))
      for path, label, box in rows
    ]
    columns = 'path label left top right bottom'
    self.assertEqual(
      self._load(self._write_table(columns, apart)).digest, data.digest
    )
    rows[1] = ('a.png', 2, '5 2 31 18')
    table = self._write_table('path label box', rows)
    with self.assertRaisesRegex(
      ValueError, r'table.csv, line 3: the box .* outside of .* 30 x 20 pixels'
    ):
      self._load(table)

  def test_boxes_count_in_the_upright_image(self):
    exif = Image.Exif()
    exif[0x112] = 6  # Rotated: 30 x 20 pixels are shown as 20 x 30.
    _noise(0).save(self.root / 'a.jpg', exif=exif)
    self._write_images(['b.png'])
    rows = [('a.jpg', i, f'0 {i} 20 30') for i in range(3)]
    table = self._write_table('path label box', [*rows, ('b.png', 3, '')])
    self.assertEmpty(self._load(table).skipped)

  def test_unreadable_images_are_skipped_and_counted(self):
    self._write_images([f'{i}.png' for i in range(4)])
    self._write_text('no image', '4.png')
    os.mkfifo(self.root / '5.png')
    rows = [(f'{i}.png', i) for i in range(6)]
    data = self._load(self._write_table('path label', rows))
    self.assertEqual(len(data.train) + len(data.test), 4)
    reasons = dict(data.skipped)
    self.assertSameElements(reasons, ['4.png', '4/', '5.png', '5/'])
    self.assertIn('not an image', reasons['4.png'])
    self.assertIn('a named pipe', reasons['5.png'])

  def test_any_change_makes_another_dataset(self):
    self._write_images(['0.png', '1.png', '2.png', '3.png', '4.png'])
    columns = 'path label split query camera box'
    rows = [
      ['0.png', 'a', 'train', '', '', ''],
      ['1.png', 'b', 'train', '', '', ''],
      ['2.png', 'c', 'train', '0', 'x', ''],
      ['3.png', 'd', 'test', 'true', 'x', ''],
      ['4.png', 'e', 'test', 'FALSE', 'y', '0 0 9 9'],
    ]
    table = self._write_table(columns, rows)
    digests = {self._load(table).digest}
    for row, column, value in (
      (4, 1, 'f'),
      (2, 2, 'test'),
      (2, 2, 'val'),
      (2, 3, '1'),
      (4, 4, 'z'),
      (4, 5, '0 0 9 8'),
    ):
      changed = [list(row) for row in rows]
      changed[row][column] = value
      digests.add(self._load(self._write_table(columns, changed)).digest)
    self._write_table(columns, rows)
    _noise(9).save(self.root / '4.png')
    digests.add(self._load(table).digest)
    self.assertLen(digests, 8)

  def test_parquet_files_hold_the_same_as_text(self):
    names = [f'{i}.png' for i in range(6)]
    self._write_images(names)
    columns = {
      'path': names,
      'label': pyarrow.array(
        ['a', 'b', 'a', 'a', 'b', 'b']
      ).dictionary_encode(),
      'split': ['train', 'train', *['test'] * 4],
      'query': [None, None, True, False, True, False],
      'camera': pyarrow.array([None, 1, 1, 2, 2, 1], pyarrow.int64()),
      'box': [None, [0, 0, 9, 9], None, None, [1.0, 2.0, 9.0, 9.0], None],
      'image': [b'\xff'] * 6,
    }
    parquet.write_table(pyarrow.table(columns), self.root / 'table.parquet')
    rows = zip(
      names,
      'abaabb',
      columns['split'],
      ['', '', 'true', 'false', '1', '0'],
      ['', 1, 1, 2, 2, 1],
      ['', '0 0 9 9', '', '', '1 2 9 9', ''],
    )
    text = self._write_table('path label split query camera box', rows)
    data = self._load(self.root / 'table.parquet')
    self.assertEqual(data.digest, self._load(text).digest)
    np.testing.assert_array_equal(data.test.is_query, [1, 0, 1, 0])
    columns['label'] = ['a', 'b', 'a', None, 'b', 'b']
    parquet.write_table(pyarrow.table(columns), self.root / 'table.parquet')
    with self.assertRaisesRegex(ValueError, 'parquet, row 4: the label is em'):
      self._load(self.root / 'table.parquet')
    self._write_text('no table', 'wrong.parquet')
    with self.assertRaisesRegex(ValueError, 'not a readable Parquet file'):
      self._load(self.root / 'wrong.parquet')
    with mock.patch.object(importlib.util, 'find_spec', return_value=None):
      with self.assertRaisesRegex(ValueError, 'pip install pyarrow'):
        self._load(self.root / 'table.parquet')

  def test_a_split_by_class_without_a_query_is_an_error(self):
    names = [f'{i}.png' for i in range(8)]
    self._write_images(names)
    rows = [(name, i // 2, int(i == 0)) for i, name in enumerate(names)]
    table = self._write_table('path label query', rows)
    messages = set()
    for seed in range(4):
      try:
        data = self._load(table, split_seed=seed)
        self.assertEqual(data.test.is_query.sum(), 1)
      except ValueError as error:
        messages.add(str(error))
    (message,) = messages
    self.assertIn('no query among its 4 images', message)


class WrongTablesTest(_Test):
  def setUp(self):
    super().setUp()
    self._write_images(['a.png', 'b.png', 'c.png', 'd.png'])
    (self.root / 'folder').mkdir()

  @parameterized.parameters(
    ('', 'header: there is no column path; there is no column label'),
    ('path;label\na.png;1\n', "no column path.*columns are 'path;label'"),
    ('path,name\na.png,1\n', 'header: there is no column label'),
    ('path,label\n', 'has no row below its header'),
    ('path,label,Path\na.png,1,a.png\n', 'header: there are 2 columns path'),
    ('path,label,box,top\na.png,1,,\n', 'there are columns box and top'),
    ('path,label,left\na.png,1,2\n', 'there is a column left, but no top'),
    ('path,label\n,1\n', 'line 2: the path is empty'),
    ('path,label\na.png,1\n\nb.png, \n', 'line 4: the label is empty'),
    ('path,label\na.png\n', 'line 2: 1 cells, but 2 in the header'),
    ('path,label\na.png,1,2\n', 'line 2: 3 cells, but 2 in the header'),
    ('path,label\n"a.png,1\nb.png,2\n', 'line 2: unexpected end of data'),
    ('path,label\nx.png,1\n', "line 2: 'x.png' in '.*': No such file"),
    ('path,label\n/x.png,1\n', "line 2: '/x.png': No such file"),
    ('path,label\nfolder,1\n', "line 2: 'folder' is a folder"),
    ('path,label\na\0.png,1\n', 'line 2: .*null'),
    (
      'path,label\na.png,"1\n2"\n./b.png,1\nb.png,2\n',
      "line 5: 'b.png' is in line 4 already",
    ),
    (b'path,label\na.png,1\nb.png,caf\xe9\n', 'line 3: not UTF-8'),
    ('path,label\na.png,1\n'.encode('utf-16'), 'line 1: not UTF-8'),
    (
      'path,label,split\na.png,1,trian\n',
      "line 2: split is 'trian', expected one of train, .*query, gallery",
    ),
    ('path,label,split\na.png,1,\n', "line 2: split is ''"),
    ('path,label,split\na.png,1,train\n', 'has only train, expected train and'),
    ('path,label,split\na.png,1,test\nb.png,1,val\n', 'has only test and val'),
    (
      'path,label,split\na.png,1,train\nb.png,2,test\nc.png,2,query\n',
      'line 4: some test images have split test, others query',
    ),
    (
      'path,label,split\na.png,1,train\nb.png,2,query\n',
      'no gallery image among its test images',
    ),
    (
      'path,label,split\na.png,1,train\nb.png,2,gallery\n',
      'no query among its test images',
    ),
    (
      'path,label,split,query\na.png,1,train,\nb.png,2,test,0\n',
      'no query among its test images',
    ),
    (
      'path,label,split,query\na.png,1,query,1\n',
      "line 2: split is 'query', but there is a column query",
    ),
    (
      'path,label,query\na.png,1,yes\n',
      "line 2: query is 'yes', expected true",
    ),
    ('path,label,query\na.png,1,\n', "line 2: query is ''"),
    ('path,label,camera\na.png,1,\n', 'line 2: the camera is empty'),
    ('path,label,box\na.png,1,1 2 3\n', "line 2: the box is '1 2 3', expected"),
    ('path,label,box\na.png,1,1 2 3 nan\n', 'expected four numbers'),
    ('path,label,box\na.png,1,5 5 5 9\n', "line 2: the box '5 5 5 9' is empty"),
    ('path,label,box\na.png,1,-1 0 5 9\n', 'is empty or outside'),
    (
      'path,label,left,top,right,bottom\na.png,1,1,2,,4\n',
      "line 2: the box is '1 2  4', expected four",
    ),
  )
  def test_a_wrong_table_is_one_line_that_names_file_and_line(
    self, text, message
  ):
    table = self._write_text(text)
    with self.assertRaisesRegex(ValueError, message) as raised:
      tables.read(table, str(self.root))
    self.assertStartsWith(str(raised.exception), table)
    self.assertNotIn('\n', str(raised.exception))

  def test_files_that_are_no_tables_are_errors(self):
    for table, message in (
      ('/nowhere/table.csv', 'No folder .*/nowhere'),
      (str(self.root / 'x.csv'), 'No file .*config.dataset.table'),
      (str(self.root / 'a.png'), 'must end in .csv, .tsv or .parquet'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        self._load(table)
    table = self._write_table('path label', [('a.png', 1)])
    with self.assertRaisesRegex(ValueError, 'No folder .*config.dataset.root'):
      self._load(table, root='/nowhere')


class ProtocolsTest(_Test):
  """The protocols of published datasets, on tables of their images."""

  def _load_published(self, name, files):
    folder = self.create_tempdir().full_path
    made_archives.write_folder(folder, files)
    config = default.get_config()
    config.dataset.update(
      name=name,
      manual_dir=folder,
      data_dir=self.data_dir,
      allow_incomplete=True,
      resize=16,
    )
    return datasets.load(config)

  def _load_as_table(self, data, columns):
    """Loads a dataset again, as a table with these columns."""
    rows = []
    for title, split in (('train', data.train), ('test', data.test)):
      for i in range(len(split)):
        record = split[i]
        name = f'{title}{i}.jpg'
        (self.root / name).write_bytes(record['image'])
        is_query = title == 'test' and split.is_query[i]
        values = {
          'path': name,
          'label': record['class_name'],
          'split': title,
          'query': str(is_query),
          'camera': f'camera {record.get("camera")}',
        }
        if 'query' not in columns and title == 'test':
          values['split'] = 'Query' if is_query else 'gallery'
        rows.append([values[column] for column in columns.split()])
    return self._load(self._write_table(columns, rows))

  def _score(self, split):
    return proxy_nca_jax.score(
      input_pipeline.raw_pixels(split, size=16),
      split.labels,
      is_query=split.is_query,
      cameras=split.cameras,
      kmeans_iterations=0,
    )

  @parameterized.parameters('path label split', 'path label split query')
  def test_queries_search_a_gallery_as_in_inshop(self, columns):
    images, beside = made_archives.inshop()
    files = {f'Img/{name}': image for name, image in images.items()} | beside
    published = self._load_published('inshop', files)
    data = self._load_as_table(published, columns)
    self.assertEqual(self._score(data.test), self._score(published.test))
    self.assertEqual(self._score(data.test)['num_queries'], 6)
    self.assertIsNone(data.test.cameras)
    self.assertEqual(data.train.class_names, published.train.class_names)

  def test_queries_ignore_their_camera_as_in_market1501(self):
    published = self._load_published('market1501', made_archives.market1501())
    data = self._load_as_table(published, 'path label split query camera')
    scores = self._score(data.test)
    self.assertEqual(scores, self._score(published.test))
    self.assertContainsSubset(['cmc@1', 'map'], scores)
    # Each query's own image is in the gallery, from the same camera.
    blind = self._load_as_table(published, 'path label split query')
    self.assertEqual(self._score(blind.test)['recall@1'], 1)
    self.assertLess(scores['cmc@1'], 1)
    self.assertEqual(data.test[0]['camera'], 'camera 1')


if __name__ == '__main__':
  absltest.main()
