"""Vectors from files: read, checked, mapped, and trained on."""

import os
import pathlib
import pickle
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow
from absl.testing import absltest, parameterized
from jax import export as jax_export
from pyarrow import parquet

import proxy_nca_jax
from proxy_nca_jax import (
  configuration,
  datasets,
  input_pipeline,
  losses,
  models,
  train,
  train_step,
)
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import embeddings as embeddings_config
from proxy_nca_jax.datasets import embeddings
from proxy_nca_jax.search import __main__ as search

_NUM_CLASSES, _PER_CLASS, _DIM = 8, 6, 5


def _make_vectors(dtype=np.float32):
  """Returns vectors that differ by class, and their labels, in mixed order."""
  rng = np.random.default_rng(0)
  labels = rng.permutation(np.repeat(np.arange(_NUM_CLASSES), _PER_CLASS))
  vectors = 3 * rng.normal(size=(_NUM_CLASSES, _DIM))[labels]
  vectors += rng.normal(size=vectors.shape)
  return vectors.astype(dtype), labels


def _write_parquet(path, vectors, labels, **columns):
  if isinstance(vectors, np.ndarray):
    vectors = list(vectors)
  columns = {'embedding': vectors, 'label': labels} | columns
  parquet.write_table(pyarrow.table(columns), path, row_group_size=20)


def _write_npy(path, vectors, labels):
  np.save(path, vectors)
  np.save(path.removesuffix('.npy') + '.labels.npy', labels)


class _Case(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def _path(self, name):
    return str(self.root / name)

  def _open(self, path):
    return embeddings.open_dataset(data_dir=self._path('data'), root=path)

  def _config(self, path, **fields) -> ml_collections.ConfigDict:
    config = embeddings_config.get_config()
    with config.unlocked():
      config.update_from_flattened_dict(
        {
          'dataset.root': path,
          'dataset.data_dir': self._path('data'),
          'model.embedding_dim': 4,
          'batch_size': 8,
          **fields,
        }
      )
    return config

  def _split(self, **fields) -> tuple[datasets.Datasets, dict]:
    path = self._path('x.npz')
    vectors, labels = _make_vectors()
    np.savez(path, embeddings=vectors, labels=labels)
    config = self._config(path, **fields)
    return datasets.load(config), config


class FilesTest(_Case):
  @parameterized.product(
    form=('npz', 'compressed', 'npy', 'fortran', 'big endian', 'parquet'),
    dtype=(np.float16, np.float32, np.float64),
  )
  def test_all_formats_give_the_same_vectors(self, form, dtype):
    vectors, labels = _make_vectors(dtype)
    path = self._path('x.npz')
    if form == 'npz':
      np.savez(path, embeddings=vectors, labels=labels)
    elif form == 'compressed':
      np.savez_compressed(path, embeddings=vectors, labels=labels)
    elif form == 'parquet':
      path = self._path('x.parquet')
      _write_parquet(path, vectors, labels)
    else:
      path = self._path('x.npy')
      given = vectors
      if form == 'fortran':
        given = np.asfortranarray(vectors)
      elif form == 'big endian':
        given = vectors.astype(vectors.dtype.newbyteorder('>'))
      _write_npy(path, given, labels)
    with mock.patch.object(embeddings, '_BLOCK', 7):
      opened, metadata = self._open(path)
    self.assertEqual(opened.shape, vectors.shape)
    self.assertEqual(opened[:].dtype, np.float32)
    np.testing.assert_array_equal(opened[:], vectors.astype(np.float32))
    np.testing.assert_array_equal(metadata['labels'], labels)
    self.assertEqual(metadata['class_names'], list(map(str, range(8))))
    # Only what cannot be mapped is copied.
    copies = list(pathlib.Path(self._path('data')).rglob('vectors.npy'))
    is_mapped = form in ('npz', 'npy', 'big endian')
    self.assertEqual(len(copies), 0 if is_mapped else 1)
    for copy in copies:
      np.testing.assert_array_equal(np.load(copy), vectors)

  @parameterized.parameters(
    (pyarrow.list_(pyarrow.float32(), _DIM), pyarrow.string()),
    (pyarrow.large_list(pyarrow.float32()), pyarrow.large_string()),
    (
      pyarrow.list_(pyarrow.float16()),
      pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ),
  )
  def test_types_of_parquet_columns(self, kind, label_kind):
    vectors, labels = _make_vectors(np.float16)
    names = [f'class {label}' for label in labels]
    path = self._path('x.parquet')
    _write_parquet(
      path, pyarrow.array(list(vectors), kind), pyarrow.array(names, label_kind)
    )
    opened, metadata = self._open(path)
    np.testing.assert_array_equal(opened[:], vectors.astype(np.float32))
    np.testing.assert_array_equal(metadata['labels'], labels)
    self.assertEqual(metadata['class_names'][3], 'class 3')

  def test_labels_that_are_not_utf8_are_escaped(self):
    path = self._path('x.npz')
    labels = np.array([b'b', b'caf\xe9', b'b', b'caf\xe9'])
    np.savez(path, embeddings=np.ones((4, 2)), labels=labels)
    _, metadata = self._open(path)
    self.assertEqual(metadata['class_names'], ['b', r'caf\xe9'])

  def test_a_changed_value_is_noticed_and_another_name_is_not(self):
    vectors, labels = _make_vectors()
    paths = [self._path(name) for name in ('a.npy', 'b.npy')]
    for path in paths:
      _write_npy(path, vectors, labels)
    first, second = (self._open(path)[1]['digest'] for path in paths)
    self.assertEqual(first, second)
    status = os.stat(paths[0])
    vectors[17, 2] += 1e-3
    _write_npy(paths[0], vectors, labels)
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    self.assertNotEqual(self._open(paths[0])[1]['digest'], first)
    np.save(self._path('b.labels.npy'), labels[::-1])
    self.assertNotEqual(self._open(paths[1])[1]['digest'], first)

  def test_pickled_vectors_are_not_copied(self):
    path = self._path('x.npy')
    vectors, labels = np.ones((10_000, 4), np.float32), np.arange(10_000) % 2
    vectors[7] = 2
    _write_npy(path, vectors, labels)
    content = pickle.dumps(self._open(path)[0].subset(np.array([6, 7])))
    self.assertLess(len(content), 1000)
    np.testing.assert_array_equal(pickle.loads(content)[:], vectors[6:8])


def _with(row, value, dtype=np.float32):
  vectors = np.ones((20_000, 2), dtype)
  vectors[row] = value
  return vectors


_MANY_LABELS = np.arange(20_000)


class ErrorsTest(_Case):
  @parameterized.parameters(
    (_with(9000, np.nan), _MANY_LABELS, 'in the rows 9000, counted from 0'),
    (
      _with(slice(5, 12), np.inf),
      _MANY_LABELS,
      'rows 5, 6, 7, 8, 9 and 2 more',
    ),
    (_with(3, 1e39, float), _MANY_LABELS, 'beyond float32, in the rows 3,'),
    (np.ones((4, 2), complex), np.arange(4), 'is complex128: expected float16'),
    (np.ones((4, 2), int), np.arange(4), 'is int64: expected float16'),
    (np.ones(4), np.arange(4), r'the shape \(4,\): expected one row'),
    (np.ones((0, 2)), np.arange(0), r'the shape \(0, 2\): expected one row'),
    (np.ones((4, 2)), np.arange(5), r'shape \(5,\), and there are 4 vectors'),
    (np.ones((4, 2)), np.ones(4), 'is float64: expected integers or texts'),
    (
      np.ones((4, 2)),
      np.array(['a', 1, 2, 3], object),
      'is object: expected integers or texts',
    ),
  )
  def test_wrong_arrays(self, vectors, labels, message):
    for write in (np.savez, np.savez_compressed):
      path = self._path(f'{write.__name__}.npz')
      write(path, embeddings=vectors, labels=labels)
      with self.assertRaisesRegex(ValueError, message) as raised:
        self._open(path)
      self.assertIn(path, str(raised.exception))
    self.assertEmpty(list(pathlib.Path(self._path('data')).glob('*/?????*')))

  @parameterized.parameters(
    ({'embedding': [[1.0], [2.0, 3.0]], 'label': [1, 2]}, '2 values in row 1,'),
    ({'embedding': [[1.0], None], 'label': [1, 2]}, '0 values in row 1,'),
    ({'embedding': [[], []], 'label': [1, 2]}, 'embedding .* is list<.*null>'),
    ({'embedding': [[1.0], [None]], 'label': [1, 2]}, 'NaN.* in the rows 1,'),
    ({'embedding': [1.0, 2.0], 'label': [1, 2]}, 'is double: expected lists'),
    ({'embedding': [[1], [2]], 'label': [1, 2]}, 'is list<.*int64>'),
    (
      {'embedding': [[1.0], [2.0]], 'label': [1, None]},
      'rows, the first .* 1,',
    ),
    ({'embedding': [[1.0], [2.0]], 'label': [1.0, 2.0]}, 'is double: expected'),
    ({'embedding': [[1.0], [2.0]]}, "columns 'embedding': expected embedding"),
    ({'embedding': [], 'label': []}, 'embedding .* is null'),
  )
  def test_wrong_columns(self, columns, message):
    path = self._path('x.parquet')
    parquet.write_table(pyarrow.table(columns), path)
    with self.assertRaisesRegex(ValueError, message):
      self._open(path)

  @parameterized.parameters(
    ('x.csv', b'1', 'must be an .npz file with'),
    ('x.npz', None, "No file '.*x.npz'"),
    ('x.npz', b'', 'cannot be read: File is not a zip file'),
    ('x.npy', b'\x93NUMPY', "No file '.*x.labels.npy'"),
    ('x.parquet', b'PAR1', 'cannot be read: '),
    ('x.npz', b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'),
  )
  def test_wrong_files(self, name, content, message):
    path = self._path(name)
    if content is not None:
      pathlib.Path(path).write_bytes(content)
    with self.assertRaisesRegex(ValueError, message):
      self._open(path)

  def test_a_pipe_is_not_opened(self):
    os.mkfifo(self._path('x.npz'))
    with self.assertRaisesRegex(ValueError, 'not a regular file'):
      self._open(self._path('x.npz'))

  @parameterized.parameters('npy', 'npz', 'compressed', 'parquet')
  def test_damaged_files(self, form):
    vectors, labels = _make_vectors()
    path = self._path(f'x.{"npz" if form == "compressed" else form}')
    if form == 'npy':
      _write_npy(path, vectors, labels)
    elif form == 'parquet':
      _write_parquet(path, vectors, labels)
    else:
      write = np.savez if form == 'npz' else np.savez_compressed
      write(path, embeddings=vectors, labels=labels)
    content = bytearray(pathlib.Path(path).read_bytes())
    if form == 'compressed':
      content[200:600] = bytes(400)
    else:
      del content[-600:]
    pathlib.Path(path).write_bytes(content)
    with self.assertRaisesRegex(ValueError, 'x.*(truncated|cannot be read: )'):
      self._open(path)

  def test_parquet_without_pyarrow(self):
    path = self._path('x.parquet')
    _write_parquet(path, *_make_vectors())
    with (
      mock.patch.object(
        embeddings.importlib.util, 'find_spec', return_value=None
      ),
      self.assertRaisesRegex(ValueError, 'pip install pyarrow'),
    ):
      self._open(path)


class SplitsTest(_Case):
  def _load(self, split, labels=None, **fields):
    vectors, own = _make_vectors()
    labels = own if labels is None else labels
    path = self._path('x.npz')
    np.savez(path, embeddings=vectors, labels=labels, split=np.array(split))
    return datasets.load(self._config(path, **fields)), vectors, labels

  def test_the_split_of_the_file_is_taken(self):
    _, labels = _make_vectors()
    split = np.array(['train', 'validation', 'test'])[labels // 3]
    data, vectors, _ = self._load(
      split, **{'dataset.validation': 'column', 'eval_every': 1}
    )
    for name in ('train', 'validation', 'test'):
      part = getattr(data, name)
      np.testing.assert_array_equal(part.vectors[:], vectors[split == name])
      names = np.array(part.class_names)[part.labels]
      np.testing.assert_array_equal(names, labels[split == name].astype(str))
    self.assertEqual(data.num_shared_classes, 0)

  def test_classes_of_both_splits_are_counted(self):
    split = np.resize(['train', 'test'], _NUM_CLASSES * _PER_CLASS)
    data, _, _ = self._load(split)
    self.assertEqual(data.num_shared_classes, _NUM_CLASSES)

  def test_labels_with_slashes_are_compared_in_full(self):
    _, labels = _make_vectors()
    split = np.where(labels < 4, 'train', 'test')
    names = np.char.add(
      np.where(labels < 4, 'a/', 'b/'), (labels % 4).astype(str)
    )
    data, _, _ = self._load(split, names)
    self.assertEqual(data.num_shared_classes, 0)

  @parameterized.parameters(
    (['train', 'dev'], "values 'dev', 'train': expected train and test"),
    (['train', 'train'], "values 'train': expected train and test"),
  )
  def test_wrong_splits(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      self._load(np.resize(values, _NUM_CLASSES * _PER_CLASS))

  def test_too_few_classes(self):
    path = self._path('x.npz')
    np.savez(path, embeddings=np.ones((3, 2)), labels=np.arange(3))
    with self.assertRaisesRegex(ValueError, 'needs at least 2 of each'):
      datasets.load(self._config(path))


class BatchesTest(_Case):
  def _take(self, split, config, num_batches, **kwargs):
    batches = input_pipeline.train_batches(split, config, **kwargs)
    taken = [next(batches) for _ in range(num_batches)]
    batches.close()
    return taken

  def test_each_epoch_has_every_vector_in_a_new_order(self):
    data, config = self._split()
    batches = self._take(data.train, config, 6)
    ids = np.concatenate([batch['id'] for batch in batches])
    epochs = ids.reshape(2, len(data.train))  # 24 vectors, batches of 8.
    np.testing.assert_array_equal(np.sort(epochs, axis=1)[0], np.arange(24))
    np.testing.assert_array_equal(np.sort(epochs, axis=1)[1], np.arange(24))
    self.assertFalse(np.array_equal(*epochs))
    for batch in batches:
      np.testing.assert_array_equal(
        batch['image'], data.train.vectors[batch['id']]
      )
      np.testing.assert_array_equal(
        batch['label'], data.train.labels[batch['id']]
      )

  @parameterized.parameters(0, 2)
  def test_any_step_begins_in_place_on_any_number_of_processes(self, per_class):
    data, config = self._split(**{'dataset.images_per_class': per_class})
    straight = self._take(data.train, config, 5)
    for index in (0, 1):
      parts = self._take(
        data.train, config, 3, first_step=2, process=(index, 2)
      )
      for part, whole in zip(parts, straight[2:], strict=True):
        rows = slice(4 * index, 4 * index + 4)
        for name, value in part.items():
          np.testing.assert_array_equal(value, whole[name][rows], name)

  def test_evaluation_has_every_vector_once(self):
    data, _ = self._split()
    ids = []
    for index in (0, 1):
      batches = list(
        input_pipeline.evaluation_batches(
          data.test, image_size=1, batch_size=10, process=(index, 2)
        )
      )
      self.assertEqual([len(batch['image']) for batch in batches], [5, 5, 5])
      for batch in batches:
        own = batch['id'][batch['mask']]
        np.testing.assert_array_equal(
          batch['image'][batch['mask']], data.test.vectors[own]
        )
        ids.append(own.tolist())
    expected = [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [20, 21, 22, 23]]
    expected += [[5, 6, 7, 8, 9], [15, 16, 17, 18, 19], []]
    self.assertEqual(ids, expected)


class ConfigTest(_Case):
  @parameterized.parameters(
    ({'dataset.flip': False}, 'config.dataset.flip: vectors are neither'),
    (
      {'dataset.crop': 'random_resized', 'model.pooling': 'gem'},
      'config.dataset.crop, config.model.pooling: vectors',
    ),
    ({'head_steps': 3}, 'config.head_steps: vectors are neither'),
    ({'dataset.on_device': True}, 'config.dataset.on_device: vectors'),
    ({'model.name': 'small_cnn'}, 'embeddings and the network vectors need'),
    ({'dataset.name': 'glyphs'}, 'embeddings and the network vectors need'),
    (
      {'model.head_hidden': 3},
      r'head_init=lda starts a linear head, and config.model.head_hidden .3.',
    ),
    (
      {'dataset.validation': 'folder', 'eval_every': 1},
      'image_folder; embeddings has none',
    ),
  )
  def test_fields_that_do_not_fit(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      configuration.check(self._config('', **fields))

  def test_column_without_a_split(self):
    with self.assertRaisesRegex(ValueError, 'needs vectors with a split'):
      self._split(**{'dataset.validation': 'column', 'eval_every': 1})


class StepTest(_Case):
  @parameterized.parameters(*losses.LOSSES)
  def test_the_step_of_every_loss_takes_vectors(self, name):
    config = self._config(
      '',
      **{
        'loss.name': name,
        'model.normalize': name != 'adaface',
        'model.head_init': 'random',
        'model.head_hidden': 6,
        'proxies.init': 'random',
      },
    )
    configuration.check(config)
    model = models.create_model(config, vector_dim=_DIM)
    optimizer = optimizer_lib.make_optimizer(config)
    state = state_lib.abstract(
      config,
      model,
      optimizer,
      class_sizes=np.full(_NUM_CLASSES, _PER_CLASS),
      mesh=mesh_lib.make_mesh(jax.devices()[:1]),
    )
    step = train_step.make_train_step(
      model, optimizer, train_step.make_loss(config)
    )
    batch = {
      'image': jax.ShapeDtypeStruct((8, _DIM), jnp.float32),
      'label': jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    new, metrics = jax.eval_shape(step, state, batch)
    self.assertEqual(metrics['loss'].shape, ())
    self.assertIn('gradient_norm.head', metrics)
    self.assertNotIn('gradient_norm.backbone', metrics)
    head = new.params['head']
    self.assertEqual(head['hidden']['kernel'].shape, (_DIM, 6))
    self.assertEqual(head['embedding']['kernel'].shape, (6, 4))


class RunTest(_Case):
  def test_a_run_and_what_follows(self):
    vectors, labels = _make_vectors()
    path, workdir = self._path('x.npz'), self._path('run')
    np.savez(path, embeddings=vectors, labels=labels)
    config = self._config(
      path,
      **{
        'num_epochs': 1.0,
        'evaluation.batch_size': 8,
        'evaluation.kmeans_iterations': 0,
        'evaluation.nearest_only': True,
      },
    )
    with config.unlocked():
      config.dry_run = True
      config.model.head_init = 'identity'
    with self.assertRaisesRegex(ValueError, 'keeps the 5 .* set it to 5'):
      train.train_and_evaluate(config, workdir)
    with config.unlocked():
      config.dry_run = False
      config.model.head_init = 'lda'
    results = train.train_and_evaluate(config, workdir)
    self.assertEqual(results['step'], 3)
    self.assertContainsSubset(
      ('trained', 'untrained', 'as_given'), results.keys()
    )
    self.assertNoCommonElements(('raw_pixels', 'pretrained'), results.keys())
    # The nearest neighbors of the vectors themselves, by cosine.
    test = datasets.load(config).test
    unit = test.vectors[:] / np.linalg.norm(
      test.vectors[:], axis=1, keepdims=True
    )
    cosines = unit @ unit.T - 3 * np.eye(len(unit))
    nearest = test.labels[cosines.argmax(axis=1)]
    self.assertAlmostEqual(
      results['as_given']['recall@1'], np.mean(nearest == test.labels)
    )
    page = pathlib.Path(workdir, 'report.html').read_text()
    self.assertNotIn('<img', page)
    self.assertIn('this run, as given', page)
    self.assertIn('nearest vectors', page)

    embedder = proxy_nca_jax.load(workdir)
    self.assertIn('vectors of 5 dimensions to 4', repr(embedder))
    embedded = embedder(vectors)
    self.assertEqual(embedded.shape, (48, 4))
    exported = jax_export.deserialize(embedder.export())
    np.testing.assert_allclose(exported.call(vectors), embedded, atol=1e-6)
    embedder.save(self._path('saved'))
    again = proxy_nca_jax.load(self._path('saved'))
    np.testing.assert_array_equal(again(vectors), embedded)
    for wrong, message in (
      (vectors[:, 1:], r'float32 \(48, 4\): expected .*\[num_vectors, 5\]'),
      (vectors[0], r'\(5,\): expected'),
      (vectors.astype(complex), 'complex128'),
      (['a.jpg'], '<U5'),
      (np.full((40, 5), np.nan), 'row 0, counted from 0, has NaN'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        embedder(wrong)
    with (
      mock.patch('sys.stderr') as stderr,
      self.assertRaises(SystemExit),
    ):
      index = self._path('x.index')
      search.main(
        ['index', f'--workdir={workdir}', '--images=/', f'--index={index}']
      )
    written = ''.join(call.args[0] for call in stderr.write.call_args_list)
    self.assertRegex(written, 'takes vectors, and an index is of files')


if __name__ == '__main__':
  absltest.main()
