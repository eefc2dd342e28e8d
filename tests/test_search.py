"""The commands of search, as a user calls them, on an untrained network."""

import contextlib
import copy
import csv
import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
import one_convolution
from absl.testing import absltest, parameterized
from PIL import Image

from proxy_nca_jax import (
  configuration,
  datasets,
  features,
  inference,
  models,
  train,
)
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import image_folder
from proxy_nca_jax.search import __main__ as search_main
from proxy_nca_jax.search import find
from proxy_nca_jax.search import index as index_lib


def _write_images(root: pathlib.Path, *, num_classes: int) -> None:
  rng = np.random.default_rng(0)
  for label in range(num_classes):
    (root / f'class{label}').mkdir(parents=True)
    color = rng.integers(0, 200, 3)
    for number in range(4):
      pixels = color + rng.integers(0, 56, (20, 20 + number, 3))
      Image.fromarray(pixels.astype(np.uint8)).save(
        root / f'class{label}' / f'{number}.png'
      )


class SearchTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(one_convolution.replaced())
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    cls.images = cls.root / 'images'
    _write_images(cls.images, num_classes=8)
    config = image_folder.get_config('scratch')
    config.update_from_flattened_dict(
      {
        'num_steps': 1,
        'batch_size': 8,
        'dataset.root': str(cls.images),
        'dataset.resize': 16,
        'dataset.image_size': 16,
        'model.width': 32,
        'model.embedding_dim': 8,
        'evaluation.batch_size': 8,
        'evaluation.kmeans_iterations': 0,
        'evaluation.baselines': False,
        'report': False,
      }
    )
    cls.workdirs = [str(cls.root / name) for name in ('run', 'other')]
    train.train_and_evaluate(config, cls.workdirs[0])
    embedder = inference.load(cls.workdirs[0])
    other = jax.tree.map(lambda x: x + 1, embedder.params)
    dataclasses.replace(embedder, params=other).save(cls.workdirs[1])
    cls.index = str(cls.root / 'index')
    cls._run(
      'index', workdir=cls.workdirs[0], images=cls.images, index=cls.index
    )

  @classmethod
  def _run(cls, command, *images, **flags):
    """Runs a command and returns its stdout."""
    flags = [f'--{name}={value}' for name, value in flags.items()]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      search_main.main([command, *map(str, images), *flags])
    return output.getvalue()

  def _error(self, *args, **flags):
    """Runs a command with wrong input and returns its error line."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
      with self.assertRaises(SystemExit) as raised:
        self._run(*args, **flags)
    self.assertEqual(raised.exception.code, 2)
    line = error.getvalue().splitlines()[-1]
    self.assertStartsWith(line, 'Error: ')
    return line

  def _rows(self, *args, **flags):
    return list(csv.DictReader(io.StringIO(self._run(*args, **flags))))

  def _copy(self):
    """Returns a copy of the images and the flags to index it."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=self.root))
    shutil.copytree(self.images, folder / 'images')
    flags = dict(
      workdir=self.workdirs[0], images=folder / 'images', index=folder / 'index'
    )
    return folder / 'images', flags

  def test_an_index_holds_the_embeddings_of_the_network(self):
    content = index_lib.read(self.index)
    self.assertLen(content.names, 32)
    self.assertEqual(content.names[5], 'class1/1.png')
    self.assertEqual(content.labels[5], 'class1')
    embedder = inference.load(self.workdirs[0])
    np.testing.assert_array_equal(content.embeddings, embedder(content.paths))

  def test_stored_features_of_a_frozen_network_are_used(self):
    folder, flags = self._copy()
    embedder = inference.load(self.workdirs[0])
    config = copy.deepcopy(embedder.config)
    config.num_steps = 0
    config.dataset.root = str(folder)
    config.dataset.data_dir = str(folder.parent / 'data')
    frozen = dataclasses.replace(embedder, config=config)
    data = datasets.load(config)
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    model = models.create_model(config)
    extract = features.make_extract(
      config,
      model,
      state_lib.read(os.path.join(self.workdirs[0], 'checkpoints')),
      mesh,
      records_digest=data.records_digest,
      weights_digest='w',
    )
    extract(data.train)
    saved = configuration.read_run(self.workdirs[0])

    def index(weights_digest):
      run = saved | {'weights_digest': weights_digest}
      with (
        mock.patch.object(inference, 'load', lambda _: frozen),
        mock.patch.object(configuration, 'read_run', lambda _: run),
        mock.patch.object(
          inference.Embedder,
          'read',
          autospec=True,
          side_effect=inference.Embedder.read,
        ) as read,
      ):
        self._run('index', **flags)
        pathlib.Path(flags['index']).rename(folder.parent / weights_digest)
      return read.call_count, index_lib.read(
        str(folder.parent / weights_digest)
      )

    computed, expected = index('other weights')
    self.assertEqual(computed, 32)
    computed, content = index('w')
    self.assertEqual(computed, 0)
    self.assertEqual(content.names, expected.names)
    np.testing.assert_allclose(
      content.embeddings, expected.embeddings, atol=1e-5
    )
    # A file that has changed makes all features those of another dataset.
    shutil.copy(folder / 'class1' / '0.png', folder / 'class0' / '1.png')
    self.assertEqual(features.read_by_file(config, 'w'), {})

  def test_only_new_or_changed_images_are_embedded(self):
    images, flags = self._copy()
    self.assertRegex(self._run('index', **flags), '32 added, 0 changed')
    (images / 'class0' / '0.png').unlink()
    shutil.copy(images / 'class1' / '0.png', images / 'class0' / '1.png')
    (images / 'more' / 'deep').mkdir(parents=True)
    shutil.copy(images / 'class2' / '0.png', images / 'more' / 'deep' / 'a.png')
    (images / 'notes.txt').write_text('text')
    with mock.patch.object(
      inference.Embedder,
      'read',
      autospec=True,
      side_effect=inference.Embedder.read,
    ) as read:
      output = self._run('index', **flags)
    self.assertEqual(read.call_count, 3)
    self.assertIn('skipped notes.txt: not an image', output)
    self.assertIn(
      '1 added, 1 changed, 1 removed, 30 unchanged, 1 unreadable', output
    )
    content = index_lib.read(flags['index'])
    embeddings = dict(zip(content.names, content.embeddings))
    np.testing.assert_array_equal(
      embeddings['class0/1.png'], embeddings['class1/0.png']
    )
    np.testing.assert_array_equal(
      embeddings['more/deep/a.png'], embeddings['class2/0.png']
    )
    self.assertNotIn('class0/0.png', embeddings)
    # Unreadable files are listed again, but not read again until they change.
    output = self._run('index', **flags)
    self.assertIn('skipped notes.txt', output)
    self.assertIn(
      '0 added, 0 changed, 0 removed, 32 unchanged, 1 unreadable', output
    )

  def test_rows_of_folders_that_cannot_be_listed_are_kept(self):
    images, flags = self._copy()
    moved = images.parent / 'disk'
    os.rename(images / 'class1', moved)
    (images / 'class1').symlink_to(moved)
    self.assertIn('32 added', self._run('index', **flags))
    os.rename(moved, images.parent / 'elsewhere')
    shutil.rmtree(images / 'class2')
    os.mkfifo(images / 'class3' / 'pipe.png')
    scandir = os.scandir

    def refuse(path):
      if str(path).endswith('class0'):
        raise PermissionError(13, 'Permission denied', path)
      return scandir(path)

    with mock.patch.object(os, 'scandir', refuse):
      output = self._run('index', **flags)
    self.assertIn(
      'skipped class0: Permission denied; its images are kept', output
    )
    self.assertIn(
      'skipped class1: a link to nothing; its images are kept', output
    )
    self.assertIn('skipped class3/pipe.png: a named pipe', output)
    self.assertIn('0 added, 0 changed, 4 removed', output)
    self.assertLen(index_lib.read(flags['index']).names, 28)

  def test_names_that_are_not_utf8_are_escaped(self):
    images, flags = self._copy()
    folder = os.path.join(os.fsencode(images), b'caf\xe9')
    os.rename(images / 'class0', folder)
    image = os.fsdecode(os.path.join(folder, b'0.png'))
    self._run('index', **flags)
    shown = str(images) + r'/caf\xe9/0.png'
    content = index_lib.read(flags['index'])
    self.assertIn(image, content.paths)
    self.assertIn(shown, content.escaped_paths)
    output = self.root / 'escaped'
    for ending in ('csv', 'json'):
      self._run(
        'query', image, index=flags['index'], k=1, output=f'{output}.{ending}'
      )
    for (row,) in (
      csv.DictReader(pathlib.Path(f'{output}.csv').open()),
      json.loads(pathlib.Path(f'{output}.json').read_text()),
    ):
      self.assertEqual((row['query'], row['picture']), (shown, shown))
    (row,) = self._rows('classify', image, index=flags['index'])
    self.assertEqual(row['class'], r'caf\xe9')
    self._run('query', image, index=flags['index'], html=f'{output}.html')
    os.remove(image)
    self.assertIn('1 removed', self._run('index', **flags))

  def test_a_foreign_database_is_refused_and_not_written(self):
    foreign, empty, text = (
      self.root / name for name in ('foreign.sqlite', 'empty', 'text')
    )
    with contextlib.closing(sqlite3.connect(foreign)) as database:
      database.execute('PRAGMA journal_mode = WAL')
      database.execute('CREATE TABLE about (name TEXT, value TEXT)')
      database.commit()
    empty.write_bytes(b'')
    text.write_text('text')
    image = self.images / 'class0' / '0.png'
    for path in (foreign, empty, text):
      before = path.read_bytes(), sorted(os.listdir(self.root))
      for command, flags in (
        ('query', {}),
        ('classify', {}),
        ('cluster', {'clusters': 2}),
        ('duplicates', {'threshold': 1}),
        ('export', {'output': 'x.npz'}),
        ('index', {'workdir': self.workdirs[0], 'images': self.images}),
      ):
        given = [image] if command in ('query', 'classify') else []
        line = self._error(command, *given, index=path, **flags)
        self.assertIn('is not a valid index', line)
      self.assertEqual(
        (path.read_bytes(), sorted(os.listdir(self.root))), before
      )

  @parameterized.parameters(
    ("DELETE FROM about WHERE name = 'root'", 'does not say its root'),
    ("DELETE FROM about WHERE name = 'digest'", 'does not say its digest'),
    ("UPDATE about SET value = x'00ff' WHERE name = 'workdir'", 'not a text'),
    ("UPDATE pictures SET name = x'ff' WHERE rowid = 1", 'not a text'),
    ("UPDATE pictures SET embedding = 'text' WHERE rowid = 1", 'float32'),
    ('UPDATE pictures SET embedding = NULL WHERE rowid = 1', 'float32'),
    ("UPDATE pictures SET embedding = x'00000000'", 'dimensions'),
    ("UPDATE pictures SET embedding = x'000000'", 'float32'),
    ("UPDATE pictures SET embedding = x''", 'float32'),
    ("UPDATE pictures SET embedding = x'0000c07f'", 'not finite'),
    ('UPDATE pictures SET embedding = zeroblob(8) WHERE rowid = 1', 'float32'),
    ('DROP TABLE pictures', 'no such table'),
    ('ALTER TABLE pictures RENAME COLUMN error TO x', 'no such column'),
  )
  def test_a_damaged_index_is_one_line(self, statement, expected):
    index = os.path.join(self.create_tempdir(), 'index')
    shutil.copy(self.index, index)
    with contextlib.closing(sqlite3.connect(index)) as database:
      database.execute(statement)
      database.commit()
    image = self.images / 'class0' / '0.png'
    commands = {
      'query': {},
      'classify': {},
      'cluster': {'clusters': 2},
      'duplicates': {'threshold': 1},
      'export': {'output': f'{index}.npz'},
    }
    for command, flags in commands.items():
      has_network = command in ('query', 'classify')
      if expected == 'dimensions' and not has_network:
        continue  # Without a network, an index of any dimension is complete.
      given = [image] if has_network else []
      line = self._error(command, *given, index=index, **flags)
      self.assertIn(expected, line)
      self.assertIn('index', line)
    # An update writes missing fields again, and reads no embeddings.
    flags = dict(workdir=self.workdirs[0], images=self.images, index=index)
    if expected in ('not a text', 'no such table', 'no such column'):
      self.assertIn(expected, self._error('index', **flags))
    else:
      self.assertIn('0 added', self._run('index', **flags))

  def test_a_file_overwritten_with_equal_size_and_time_is_embedded(self):
    folder, flags = self._copy()
    path = folder / 'class0' / '0.png'
    path.write_bytes(path.read_bytes().ljust(10**4, b'\0'))
    self._run('index', **flags)
    status = path.stat()
    other = (folder / 'class5' / '1.png').read_bytes()
    path.write_bytes(other.ljust(10**4, b'\0'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    self.assertIn('0 added, 1 changed', self._run('index', **flags))

  def test_the_counts_of_an_update_add_up(self):
    folder, flags = self._copy()
    (folder / 'class0' / 'text.png').write_text('text')
    line = '32 added, 0 changed, 0 removed, 0 unchanged, 1 unreadable'
    self.assertIn(line, self._run('index', **flags))
    (folder / 'class0' / '0.png').write_text('text')
    shutil.copy(folder / 'class0' / '1.png', folder / 'class1' / '2.png')
    (folder / 'class2' / '3.png').unlink()
    line = '0 added, 1 changed, 1 removed, 29 unchanged, 2 unreadable'
    self.assertIn(line, self._run('index', **flags))
    shutil.copy(folder / 'class0' / '1.png', folder / 'class0' / 'text.png')
    line = '0 added, 1 changed, 0 removed, 30 unchanged, 1 unreadable'
    self.assertIn(line, self._run('index', **flags))

  def test_an_index_of_an_unknown_version_is_refused(self):
    index = self.root / 'newer'
    shutil.copy(self.index, index)
    with contextlib.closing(sqlite3.connect(index)) as database:
      database.execute("UPDATE about SET value = '9' WHERE name = 'version'")
      database.commit()
    for command, flags in (
      ('cluster', {'clusters': 2}),
      ('index', {'workdir': self.workdirs[0], 'images': self.images}),
    ):
      line = self._error(command, index=index, **flags)
      self.assertIn("has version '9', and this program reads version '2'", line)

  def test_reading_an_index_writes_nothing(self):
    index = self.root / 'read only?#%'
    shutil.copy(self.index, index)
    before = index.stat().st_mtime_ns, index.read_bytes()
    self._run('duplicates', index=index, threshold=1)
    self.assertEqual((index.stat().st_mtime_ns, index.read_bytes()), before)
    with index_lib._open(str(index)) as database:
      with self.assertRaisesRegex(sqlite3.Error, 'readonly'):
        database.execute('DELETE FROM pictures')

  def test_a_killed_update_resumes(self):
    _, flags = self._copy()
    embed = inference.Embedder.embed

    num_calls = 0

    def embed_once(embedder, images):
      nonlocal num_calls
      num_calls += 1
      if num_calls > 1:
        signal.raise_signal(signal.SIGINT)
      return embed(embedder, images)

    with (
      mock.patch.object(index_lib, '_BATCH_SIZE', 10),
      mock.patch.object(inference.Embedder, 'embed', embed_once),
      mock.patch.object(os, '_exit', sys.exit),
      self.assertRaises(SystemExit) as raised,
    ):
      self._run('index', **flags)
    self.assertEqual(raised.exception.code, 130)
    self.assertLen(index_lib.read(flags['index']).names, 10)
    self.assertIn('22 added', self._run('index', **flags))

  def test_an_index_refuses_another_network_folder_or_file(self):
    flags = dict(workdir=self.workdirs[0], images=self.images, index=self.index)
    self.assertIn(
      'belongs to another network',
      self._error('index', **(flags | {'workdir': self.workdirs[1]})),
    )
    self.assertIn(
      f"belongs to another folder, '{self.images}'",
      self._error('index', **(flags | {'images': self.images / 'class0'})),
    )
    text = self.root / 'text'
    text.write_text('not a database, but long enough for one ' * 99)
    self.assertIn(
      'is not a valid index',
      self._error('index', **(flags | {'index': text})),
    )
    self.assertIn(
      'No folder', self._error('index', **(flags | {'images': '/nowhere'}))
    )
    image = self.images / 'class0' / '0.png'
    self.assertIn(
      'is not the one that made the index',
      self._error('query', image, index=self.index, workdir=self.workdirs[1]),
    )
    self.assertIn('No index', self._error('query', image, index='/nowhere'))

  def test_query_finds_the_nearest_by_a_full_sort(self):
    content = index_lib.read(self.index)
    numbers = (3, 17)
    rows = self._rows(
      'query', *(content.paths[i] for i in numbers), index=self.index, k=40
    )
    self.assertLen(rows, 64)  # The index has 32 images.
    for number in numbers:
      distances = np.linalg.norm(
        content.embeddings - content.embeddings[number], axis=1
      )
      neighbors = [row for row in rows if row['query'] == content.paths[number]]
      self.assertEqual([int(row['rank']) for row in neighbors], [*range(1, 33)])
      self.assertEqual(neighbors[0]['picture'], content.paths[number])
      np.testing.assert_allclose(
        [float(row['distance']) for row in neighbors],
        np.sort(distances),
        atol=1e-4,
      )

  def test_query_writes_a_page_csv_and_json(self):
    image = self.images / 'class3' / '0.png'
    csv_file, json_file, page = (
      self.root / f'found.{ending}' for ending in ('csv', 'json', 'html')
    )
    for file in (csv_file, json_file):
      self.assertEqual(
        self._run(
          'query', image, index=self.index, k=3, output=file, html=page
        ),
        '',
      )
    rows = json.loads(json_file.read_text())
    self.assertLen(rows, 3)
    self.assertEqual(
      [row['picture'] for row in csv.DictReader(csv_file.open())],
      [row['picture'] for row in rows],
    )
    html = page.read_text()
    self.assertEqual(html.count('<img src="data:image/jpeg;base64,'), 4)
    self.assertIn('0.000 0.png', html)
    self.assertNotRegex(html, 'https?://')
    self.assertIn(
      'must end with .csv or .json',
      self._error('query', image, index=self.index, output='found.txt'),
    )

  def test_faiss_finds_the_same_nearest_images(self):
    content = index_lib.read(self.index)
    expected = find.find(content.embeddings, content.embeddings, 1)
    with mock.patch.object(find, '_MIN_FAISS_IMAGES', 8):
      with contextlib.redirect_stderr(io.StringIO()) as error:
        for _ in range(2):
          actual = find.find_in_index(
            self.index, content, content.embeddings, 1
          )
    np.testing.assert_array_equal(actual[1], expected[1])
    self.assertEqual(error.getvalue().count('Building'), 1)
    self.assertIn('approximate', error.getvalue())

  def test_faiss_searches_more_lists_until_k_images_are_found(self):
    content = index_lib.read(self.index)
    index = str(self.root / 'lists')
    shutil.copy(self.index, index)
    queries = content.embeddings[:5]
    expected = find.find(queries, content.embeddings, 30)
    with mock.patch.object(find, '_MIN_FAISS_IMAGES', 8):
      with contextlib.redirect_stderr(io.StringIO()):
        distances, indices = find.find_in_index(index, content, queries, 30)
    self.assertGreaterEqual(indices.min(), 0)
    self.assertTrue(np.all(np.diff(distances, axis=1) >= 0))
    for found in indices:
      self.assertLen(set(found), 30)
    # All lists were searched, since 30 of 32 images were asked for.
    np.testing.assert_allclose(distances, expected[0], atol=1e-6)

  def test_a_faiss_file_of_other_images_or_damaged_is_built_again(self):
    content = index_lib.read(self.index)
    index = str(self.root / 'stale')
    shutil.copy(self.index, index)
    stored = pathlib.Path(f'{index}.faiss')
    with (
      mock.patch.object(find, '_MIN_FAISS_IMAGES', 8),
      contextlib.redirect_stderr(io.StringIO()) as error,
    ):
      fewer = content._replace(
        names=content.names[:28], embeddings=content.embeddings[:28]
      )
      find.find_in_index(index, fewer, content.embeddings, 1)
      find.find_in_index(index, content, content.embeddings, 1)
      stored.write_bytes(stored.read_bytes()[:200])
      find.find_in_index(index, content, content.embeddings, 1)
    self.assertEqual(error.getvalue().count('Building'), 3)

  def test_many_skipped_files_are_counted_by_kind(self):
    images, flags = self._copy()
    for number in range(30):
      (images / f'{number}.txt').write_text('text')
    output = self._run('index', **flags)
    self.assertEqual(output.count('.txt: not an image'), 20)
    self.assertIn('skipped in all: 30 x not an image', output)
    listed = pathlib.Path(f'{flags["index"]}.skipped.txt').read_text()
    self.assertLen(listed.splitlines(), 30)

  def test_an_update_killed_while_it_writes_is_repaired_by_the_next(self):
    _, flags = self._copy()
    self._run('index', **flags)
    killed = str(self.root / 'killed')
    with contextlib.closing(sqlite3.connect(flags['index'])) as database:
      # Writes pages before the transaction is complete.
      database.execute('PRAGMA cache_size = 1')
      database.execute('UPDATE pictures SET error = hex(zeroblob(5000))')
      for ending in ('', '-journal'):
        shutil.copy(f'{flags["index"]}{ending}', f'{killed}{ending}')
    self.assertIn(
      'start `index` again', self._error('cluster', index=killed, clusters=2)
    )
    self.assertIn(
      '32 unchanged', self._run('index', **flags | {'index': killed})
    )
    self._run('cluster', index=killed, clusters=2)

  def test_faiss_without_enough_images_is_an_error(self):
    lists = mock.Mock(nlist=4)
    lists.search.return_value = (None, np.array([[0, -1]]))
    with self.assertRaisesRegex(ValueError, 'fewer than 2 images for 1 quer'):
      find._search_lists(lists, np.ones((1, 3)), 2)

  def test_cluster_assigns_every_image(self):
    rows = self._rows('cluster', index=self.index, clusters=5)
    self.assertLen({row['picture'] for row in rows}, 32)
    clusters = [int(row['cluster']) for row in rows]
    self.assertEqual(clusters, sorted(clusters))
    self.assertEqual(set(clusters), set(range(5)))
    self.assertIn(
      'num_clusters', self._error('cluster', index=self.index, clusters=99)
    )

  def test_duplicates_lists_the_pairs_below_the_threshold(self):
    images, flags = self._copy()
    shutil.copy(images / 'class4' / '2.png', images / 'class6' / 'copy.png')
    self._run('index', **flags)
    (row,) = self._rows('duplicates', index=flags['index'], threshold=0.001)
    self.assertEqual(
      (row['picture'], row['other']),
      tuple(str(images / name) for name in ('class4/2.png', 'class6/copy.png')),
    )
    content = index_lib.read(self.index)
    distances = np.linalg.norm(
      content.embeddings[:, None] - content.embeddings, axis=2
    )
    distances = distances[np.triu_indices(32, 1)]
    threshold = np.median(distances)
    rows = self._rows('duplicates', index=self.index, threshold=threshold)
    self.assertLen(rows, np.sum(distances < threshold))
    self.assertEmpty(self._rows('duplicates', index=self.index, threshold=0))

  def test_duplicates_are_sorted_and_not_held_in_memory(self):
    embeddings = np.tile(np.float32([[1, 0], [0.8, 0.6]]), (40, 1))
    with search_main._sorted_pairs(embeddings, -2, 2) as pairs:
      self.assertIsInstance(pairs, sqlite3.Cursor)
      pairs = list(pairs)
    self.assertLen(pairs, 80 * 79 // 2)
    self.assertEqual(pairs, sorted(pairs))
    self.assertEqual(pairs[0], (0, 0, 2))
    with self.assertRaisesRegex(OSError, 'sorted on disk: database is full'):
      with search_main._sorted_pairs(embeddings, -2, 2):
        raise sqlite3.OperationalError('database is full')
    file = str(self.root / 'pairs.json')
    for rows in ([], [{'a': 'ü', 'b': 0.5}] * 3):
      search_main._write(iter(rows), file, columns=('a', 'b'))
      self.assertEqual(json.loads(pathlib.Path(file).read_text()), rows)

  def test_classify_by_neighbors_and_by_proxies(self):
    image = self.images / 'class5' / '3.png'
    (row,) = self._rows('classify', image, index=self.index)
    self.assertEqual((row['class'], row['distance']), ('class5', '0.0000'))
    embedder = inference.load(self.workdirs[0])
    proxies = embedder.params['proxies']
    proxies = proxies / np.linalg.norm(proxies, axis=1, keepdims=True)
    distances = np.linalg.norm(proxies - embedder([image]), axis=1)
    (row,) = self._rows('classify', image, index=self.index, by='proxies')
    self.assertEqual(row['class'], embedder.class_names[distances.argmin()])
    self.assertEqual(row['distance'], f'{distances.min():.4f}')
    (row,) = self._rows(
      'classify', image, index=self.index, by='proxies', threshold=0.001
    )
    self.assertEqual(row['class'], '')

  def test_the_most_frequent_class_of_the_neighbors_wins(self):
    content = index_lib.Content(
      '/', '', '', ('a/1', 'b/1', 'b/2'), np.eye(3, dtype=np.float32)
    )
    near = np.float32([[0.6, 0.5, 0.5]])
    embedder = mock.Mock(return_value=near)
    # a/1 is the nearest image; of b, b/1 is.
    a, b = ('a', '0.8402', 1), ('b', '0.9600', 2 / 3)
    for k, (expected, distance, votes) in (
      (1, a),
      (2, ('a', '0.8402', 1 / 2)),
      (3, b),
    ):
      with (
        mock.patch.object(index_lib, 'read', return_value=content),
        mock.patch.object(search_main, '_load_embedder', return_value=embedder),
      ):
        (row,) = self._rows('classify', 'x', index='', k=k)
      self.assertEqual(row['class'], expected)
      self.assertEqual(row['distance'], distance)
      self.assertEqual(row['votes'], f'{votes:.4f}')
    with (
      mock.patch.object(index_lib, 'read', return_value=content),
      mock.patch.object(search_main, '_load_embedder', return_value=embedder),
    ):
      (row,) = self._rows('classify', 'x', index='', k=3, threshold=0.9)
    self.assertEqual(row['class'], '')

  def test_embeddings_are_exported_as_arrays(self):
    content = index_lib.read(self.index)
    file = self.root / 'embeddings.npz'
    self._run('export', index=self.index, output=file)
    with np.load(file) as arrays:
      np.testing.assert_array_equal(arrays['embeddings'], content.embeddings)
      self.assertEqual(arrays['pictures'].tolist(), content.paths)
      self.assertEqual(arrays['labels'].tolist(), content.labels)
    self.assertIn(
      'must end with .npz or .parquet',
      self._error('export', index=self.index, output='x.npy'),
    )

  def test_embeddings_are_exported_as_parquet(self):
    from pyarrow import parquet

    content = index_lib.read(self.index)
    file = self.root / 'embeddings.parquet'
    self._run('export', index=self.index, output=file)
    table = parquet.read_table(file)
    np.testing.assert_array_equal(
      np.stack(table['embedding'].to_numpy()), content.embeddings
    )
    self.assertEqual(table['picture'].to_pylist(), content.paths)


if __name__ == '__main__':
  absltest.main()
