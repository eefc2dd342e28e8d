"""The commands of search, as a user calls them, on an untrained network."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from proxy_nca_jax import inference, train
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
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    cls.images = cls.root / 'images'
    _write_images(cls.images, num_classes=8)
    config = image_folder.get_config()
    config.update_from_flattened_dict(
      {
        'num_steps': 1,
        'batch_size': 8,
        'dataset.root': str(cls.images),
        'dataset.resize': 16,
        'dataset.image_size': 16,
        'model.width': 4,
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
      '2 added, 1 changed, 1 removed, 30 unchanged, 1 unreadable', output
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
    self.assertIn('0 added, 0 changed, 0 removed, 33 unchanged', output)

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
    for k, expected in ((1, 'a'), (2, 'a'), (3, 'b')):
      with (
        mock.patch.object(index_lib, 'read', return_value=content),
        mock.patch.object(search_main, '_load_embedder', return_value=embedder),
      ):
        (row,) = self._rows('classify', 'x', index='', k=k)
      self.assertEqual(row['class'], expected)

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
