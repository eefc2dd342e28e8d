"""Imports go down the layers of the package, and libraries stay fenced."""

import ast
import collections
import functools
import pathlib
import subprocess
import sys

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGE = _ROOT / 'proxy_nca_jax'

# Highest first; a module imports only from layers below its own. A room is a
# folder or a module; modules of `runtime` that need others of the package have
# a place of their own.
_LAYERS = (
  ('main',),
  ('commands',),
  ('search',),
  ('train', 'inference'),
  ('report', 'dry_run', 'loop'),
  ('weights', 'features', 'warm_start'),
  ('evaluate.embed', 'evaluate.selection'),
  ('train_step',),
  ('state', 'input_pipeline'),
  ('configuration',),
  ('optimizer',),
  ('fine_tuning',),
  ('models', 'datasets', 'losses', 'evaluate'),
  ('proxies', 'retrieval', 'clustering', 'images'),
  ('blocked', 'distances', 'masks', 'metrics', 'mesh'),
  ('runtime',),
  ('configs',),
)
_PURE = (
  'losses',
  'proxies',
  'metrics',
  'distances',
  'masks',
  'blocked',
  'retrieval',
  'clustering',
)
_ARRAYS = {
  'jax',
  'numpy',
  'scipy',
  'chex',
  'proxy_nca_jax',
  'collections',
  'functools',
  'heapq',
  'typing',
}
_FENCES = {
  'flax': ('models',),
  'fsspec': ('runtime',),
  'tensorflow_datasets': ('datasets',),
  'grain': ('input_pipeline',),
  'orbax': ('state',),
  'sklearn': ('report',),
  'absl': ('commands', 'runtime'),
  'tensorboardX': ('runtime',),
  'matplotlib': ('datasets',),
  'tensorflow': (),
  'torch': (),
}


def _module(path):
  """The dotted name of a file, below the package: 'losses.proxy', 'main'."""
  if path.parent == _ROOT:
    return path.stem
  parts = path.relative_to(_PACKAGE).with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


def _room(module):
  """The name of a module's place in `_LAYERS`."""
  rooms = {room for layer in _LAYERS for room in layer}
  return module if module in rooms else module.split('.')[0]


@functools.cache
def _imports():
  """{module: the dotted names that it imports}, of all files."""
  files = [_ROOT / 'main.py', *_PACKAGE.rglob('*.py')]
  imports = {}
  for path in files:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names |= {name.name for name in node.names}
      elif isinstance(node, ast.ImportFrom):
        names |= {f'{node.module}.{name.name}' for name in node.names}
    imports[_module(path)] = names
  del imports['']  # The package itself, which offers what users import.
  return imports


def _arrows():
  """{(importing module, imported module)} within the package."""
  modules = set(_imports())
  arrows = set()
  for module, names in _imports().items():
    for name in names:
      name = name.removeprefix('proxy_nca_jax.')
      while name and name not in modules:
        name = name.rpartition('.')[0]
      if name and name != module:
        arrows.add((module, name))
  return arrows


class LayersTest(absltest.TestCase):
  def test_every_room_has_a_layer(self):
    known = {room for layer in _LAYERS for room in layer}
    self.assertLessEqual({_room(module) for module in _imports()}, known)

  def test_imports_go_down(self):
    depth = {room: i for i, layer in enumerate(_LAYERS) for room in layer}
    upwards = {
      f'{module} imports {imported}'
      for module, imported in _arrows()
      if _room(module) != _room(imported)
      and depth[_room(imported)] <= depth[_room(module)]
    }
    self.assertEmpty(upwards)

  def test_no_imports_are_circular(self):
    below = collections.defaultdict(set)
    for module, imported in _arrows():
      # A package's __init__ gathers its modules, which may use one another.
      if not module.startswith(f'{imported}.'):
        below[module].add(imported)
    done = set()

    def visit(module, path):
      self.assertNotIn(module, path, ' -> '.join((*path, module)))
      if module not in done:
        for imported in sorted(below[module]):
          visit(imported, (*path, module))
        done.add(module)

    for module in sorted(_imports()):
      visit(module, ())

  def test_libraries_stay_inside_their_fences(self):
    for library, rooms in _FENCES.items():
      users = {
        module.split('.')[0]
        for module, names in _imports().items()
        if library in {name.split('.')[0] for name in names}
      }
      self.assertLessEqual(users, set(rooms), library)

  def test_pure_rooms_import_only_arrays(self):
    for module, names in _imports().items():
      if module.split('.')[0] in _PURE:
        libraries = {name.split('.')[0] for name in names}
        self.assertLessEqual(libraries, _ARRAYS, module)

  def test_the_step_needs_no_library_of_data_or_configs(self):
    # benchmarks/train_step.py runs on machines that have none.
    program = (
      'import sys\n'
      'from proxy_nca_jax import models, optimizer, train_step\n'
      'print(*sorted({name.split(".")[0] for name in sys.modules}))'
    )
    loaded = subprocess.run(
      [sys.executable, '-c', program],
      cwd=_ROOT,
      check=True,
      capture_output=True,
      text=True,
    ).stdout.split()
    self.assertIn('optax', loaded)
    self.assertNoCommonElements(
      loaded,
      ('clu', 'grain', 'ml_collections', 'tensorboardX', 'tensorflow_datasets'),
    )


if __name__ == '__main__':
  absltest.main()
