import copy
import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from proxy_nca_jax import configuration, inference
from proxy_nca_jax.configs import default
from proxy_nca_jax.report import __main__ as comparison
from proxy_nca_jax.report import charts, results
from proxy_nca_jax.runtime import metric_writer, saved_json

_SCORES = {
  'recall@1': 0.5,
  'num_queries': 3,
  'queries_without_match': 0,
  'intervals': {'recall@1': [0.4, 0.6]},
}


def _files():
  config = configuration.as_json(default.get_config())
  config['model']['name'] = 'small_cnn'
  config['dataset']['name'] = 'glyphs'
  return {
    'run.json': {
      'config': config,
      'dataset_digest': 'a',
      'weights_digest': None,
      'class_names': ['a', 'b'],
    },
    'results.json': {
      'trained': copy.deepcopy(_SCORES),
      'step': 4,
      'versions': {'jax': '1'},
      'dataset': {'digest': 'a', 'test': {'classes': 3}},
    },
    'metrics.jsonl': {'step': 4, 'loss': 0.5},
    'embedder.json': {'config': config, 'class_names': [], 'sha256': 'a'},
  }


_READERS = {
  'run.json': configuration.read_run,
  'results.json': results.read,
  'metrics.jsonl': metric_writer.read_metrics,
  'embedder.json': inference.load,
}
_DEEP = '[' * 300 + ']' * 300
# (file, path of a field, JSON in its place, the field's name in the message).
_WRONG = (
  ('run.json', 'config', '[]', 'config'),
  ('run.json', 'config', 'null', 'config'),
  ('run.json', 'config.dataset', '5', 'config.dataset'),
  ('run.json', 'config.seed', '{"a": 1}', 'config.seed.a'),
  ('run.json', 'config.seed', '-1', 'config.seed'),
  ('run.json', 'config.batch_size', 'NaN', 'config.batch_size'),
  ('run.json', 'config.model.embedding_dim', '1e999', 'config.model.embedding'),
  ('run.json', 'config.dataset.image_size', '"x"', 'config.dataset.image_size'),
  ('run.json', 'config.dataset.image_size', _DEEP, 'config.dataset.image_size'),
  ('run.json', 'class_names', '[1]', 'class_names'),
  ('run.json', 'class_names', '"ab"', 'class_names'),
  ('run.json', 'dataset_digest', '1', 'dataset_digest'),
  ('results.json', 'step', '4.5', 'step'),
  ('results.json', 'step', '-1', 'step'),
  ('results.json', 'step', '1' + '0' * 400, 'step'),
  ('results.json', 'trained', None, 'trained is missing'),
  ('results.json', 'trained.recall@1', 'NaN', 'trained'),
  ('results.json', 'trained.recall@1', '1' + '0' * 400, 'trained'),
  ('results.json', 'trained.intervals', '{"recall@1": [0.1]}', 'trained'),
  ('results.json', 'trained.num_queries', '0.5', 'trained'),
  ('results.json', 'raw_pixels', '[]', 'raw_pixels'),
  ('results.json', 'dataset', '"x"', 'dataset'),
  ('results.json', 'dataset.test', None, 'dataset.test is missing'),
  ('results.json', 'dataset.test.classes', '"3"', 'dataset.test.classes'),
  ('results.json', 'versions', '3', 'versions'),
  ('metrics.jsonl', 'step', 'true', 'step'),
  ('metrics.jsonl', 'step', '1e3', 'step'),
  ('metrics.jsonl', 'loss', '"x"', 'loss'),
  ('metrics.jsonl', 'loss', '[1]', 'loss'),
  ('metrics.jsonl', 'loss', '1' + '0' * 400, 'loss'),
  ('embedder.json', 'sha256', '3', 'sha256'),
  ('embedder.json', 'config', None, 'config is missing'),
  ('embedder.json', 'config.model.width', '0', 'config.model.width'),
)


def _set(content, field, text):
  *groups, last = field.split('.')
  for group in groups:
    content = content[group]
  if text is None:
    del content[last]
  else:
    content[last] = '<here>'


class SavedJsonTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(tempfile.mkdtemp())

  @parameterized.parameters(*_WRONG)
  def test_a_wrong_field_is_named_with_its_file(self, name, field, text, named):
    content = _files()[name]
    _set(content, field, text)
    written = json.dumps(content).replace('"<here>"', text or '')
    (self.folder / name).write_text(f'{written}\n')
    with self.assertRaisesRegex(
      ValueError, rf'{name}. is damaged: .*{named}.* Restore'
    ):
      _READERS[name](str(self.folder))

  @parameterized.product(
    name=tuple(_READERS),
    content=(b'[' * 9**5 + b'\n', b'\xff\xfe\n', b'[]\n', b'{"a": \n', None),
  )
  def test_a_file_that_is_no_object_is_named(self, name, content):
    path = self.folder / name
    if content is None:
      path.mkdir()
    else:
      path.write_bytes(content)
    with self.assertRaisesRegex(ValueError, rf'{name}. is ') as raised:
      _READERS[name](str(self.folder))
    self.assertLess(len(str(raised.exception)), 300)

  def test_a_text_that_is_not_unicode_is_damaged(self):
    (self.folder / 'a.json').write_text('{"a": "\\ud800"}')
    with self.assertRaisesRegex(ValueError, 'a.json. is damaged'):
      saved_json.read(str(self.folder / 'a.json'))

  def test_complete_files_are_read(self):
    files = _files()
    for name, content in files.items():
      (self.folder / name).write_text(json.dumps(content) + '\n')
    for name in ('run.json', 'results.json'):
      self.assertEqual(_READERS[name](str(self.folder)), files[name])
    self.assertEqual(
      _READERS['metrics.jsonl'](str(self.folder)), [files['metrics.jsonl']]
    )
    self.assertIn('50.00', comparison.compare([str(self.folder)]))

  def test_files_of_earlier_versions_are_read(self):
    run = _files()['run.json']
    run['config']['removed'] = {'field': 1}
    del run['weights_digest'], run['config']['seed']
    (self.folder / 'run.json').write_text(json.dumps(run))
    self.assertEqual(configuration.read_run(str(self.folder)), run)

  def test_charts_ignore_points_that_are_not_finite(self):
    nan, infinity = float('nan'), float('inf')
    drawn, expected = (
      charts.lines({'a': series}, title='a', x_label='x', y_label='y')
      for series in (
        ((1, 2, 3, 4), (0.5, nan, 0.25, infinity)),
        ((1, 3), (0.5, 0.25)),
      )
    )
    self.assertEqual(drawn, expected)
    self.assertEqual(
      charts.lines({'a': ((1,), (nan,))}, title='a', x_label='', y_label=''), ''
    )


if __name__ == '__main__':
  absltest.main()
