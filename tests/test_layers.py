"""The imports of the package go down its layers, and libraries stay fenced."""

import ast
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGE = _ROOT / 'proxy_nca_jax'

# Highest first; a module imports only from layers below its own.
_LAYERS = (
  ('main', 'search'),
  ('command_line',),
  ('train', 'inference'),
  ('report',),
  ('scoring', 'selection', 'plan', 'provenance'),
  ('evaluate',),
  ('train_step',),
  (
    'state', 'optimizer', 'input_pipeline', 'device_data', 'metric_writer',
    'workdir',
  ),
  ('augmentation',),
  (
    'models', 'datasets', 'proxies', 'losses', 'retrieval', 'clustering',
    'mirror', 'index', 'pages',
  ),
  (
    'metrics', 'distances', 'mesh', 'locks', 'watch', 'processes', 'errors',
    'config_checks',
  ),
  ('interruption',),
)
_PURE = (
  'losses', 'proxies', 'metrics', 'distances', 'retrieval', 'clustering'
)
_FENCES = {
  'flax': ('models',),
  'fsspec': ('mirror',),
  'tensorflow_datasets': ('datasets',),
  'grain': ('input_pipeline',),
  'orbax': ('state',),
  'sklearn': ('report',),
  'absl': ('main', 'command_line'),
  'tensorboardX': ('metric_writer',),
  'matplotlib': ('datasets',),
  'tensorflow': (),
  'torch': (),
}


def _room(path):
  """The name of a file's room: its top-level module in the package."""
  if path.parent == _ROOT:
    return path.stem
  return path.relative_to(_PACKAGE).with_suffix('').parts[0]


def _files():
  files = [_ROOT / 'main.py', *_PACKAGE.rglob('*.py')]
  return [file for file in files if _room(file) != '__init__']


def _imports(path):
  """Yields the dotted names that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{name.name}' for name in node.names)


def _rooms_imported(path):
  parts = (name.split('.') for name in _imports(path))
  return {p[1] for p in parts if p[0] == 'proxy_nca_jax' and len(p) > 1}


class LayersTest(parameterized.TestCase):

  def test_every_room_has_a_layer(self):
    known = {room for layer in _LAYERS for room in layer}
    self.assertLessEqual({_room(file) for file in _files()}, known)

  @parameterized.parameters(*(str(p.relative_to(_ROOT)) for p in _files()))
  def test_imports_go_down(self, name):
    path = _ROOT / name
    depth = {r: i for i, layer in enumerate(_LAYERS) for r in layer}
    for room in _rooms_imported(path) - {_room(path)}:
      self.assertGreater(depth[room], depth[_room(path)], f'imports {room}')

  @parameterized.parameters(*_FENCES)
  def test_library_stays_inside_its_fence(self, library):
    users = {
      _room(path)
      for path in _files()
      if library in {name.split('.')[0] for name in _imports(path)}
    }
    self.assertLessEqual(users, set(_FENCES[library]))

  @parameterized.parameters(*_PURE)
  def test_pure_rooms_import_arrays_alone(self, room):
    allowed = {
      'jax', 'numpy', 'scipy', 'chex', 'proxy_nca_jax', 'collections',
      'functools', 'heapq', 'typing',
    }
    for path in _files():
      if _room(path) == room:
        libraries = {name.split('.')[0] for name in _imports(path)}
        self.assertLessEqual(libraries, allowed, path)

  def test_the_step_needs_no_library_of_data_or_configs(self):
    # benchmarks/train_step.py runs on machines that have none.
    program = (
      'import sys\n'
      'from proxy_nca_jax import models, optimizer, train_step\n'
      'print(*sorted({name.split(".")[0] for name in sys.modules}))'
    )
    loaded = subprocess.run(
      [sys.executable, '-c', program], cwd=_ROOT, check=True,
      capture_output=True, text=True,
    ).stdout.split()
    self.assertIn('optax', loaded)
    self.assertNoCommonElements(
      loaded,
      ('clu', 'grain', 'ml_collections', 'tensorboardX', 'tensorflow_datasets'),
    )


if __name__ == '__main__':
  absltest.main()
