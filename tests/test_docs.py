"""Tests that the Python and the commands of README.md and docs/ run."""

import importlib.util
import json
import operator
import os
import pathlib
import re
import shlex
import shutil
import sys
import tempfile
from unittest import mock

import jax
import made_fonts
import numpy as np
import one_convolution
import whole_runs
from absl.testing import absltest, parameterized
from PIL import Image

from proxy_nca_jax import train
from proxy_nca_jax.configs import default, image_folder
from proxy_nca_jax.configs import glyphs as glyphs_config
from proxy_nca_jax.datasets import glyphs
from proxy_nca_jax.models import backbones
from proxy_nca_jax.report import literature
from proxy_nca_jax.runtime import command_line
from proxy_nca_jax.search import serve

_ROOT = pathlib.Path(__file__).parent.parent
_PAGES = (
  'README.md',
  'docs/data.md',
  'docs/losses.md',
  'docs/search.md',
  'docs/pytorch_metric_learning.md',
)
_COMMANDS = ('evaluate', 'search', 'report', 'datasets', 'models')
_SMALL_CNN = backbones.BACKBONES['small_cnn']
_ALL_PAGES = (*_ROOT.glob('*.md'), *_ROOT.glob('docs/*.md'))


def _blocks(page: str) -> list[str]:
  text = (_ROOT / page).read_text()
  return re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def _commands(*pages: pathlib.Path) -> list[list[str]]:
  """Returns the arguments of `python` in indented lines and inline code.

  `proxy-nca` becomes the equivalent call of `python`.
  """
  commands = []
  for page in pages:
    text = page.read_text().replace('\\\n', ' ')
    for match in re.finditer(r"(?:^    .*?|`)\b(python [^`'\n#]+)", text, re.M):
      commands.append(shlex.split(match[1])[1:])
    # `proxy-nca train|evaluate|...` lists several commands.
    for match in re.finditer(r'`proxy-nca ([^`|]+)`', text):
      name, *arguments = shlex.split(match[1])
      if name in _COMMANDS:
        commands.append(['-m', f'proxy_nca_jax.{name}', *arguments])
      elif name == 'train':
        commands.append(['main.py', *arguments])
      else:
        commands.append(['main.py', name, *arguments])
  return commands


class DocsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(one_convolution.replaced())
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    rng = np.random.default_rng(0)
    for label in range(4):  # At least 50 images, for 50 clusters.
      (cls.root / 'images' / str(label)).mkdir(parents=True)
      for index in range(13):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(
          cls.root / 'images' / str(label) / f'{index}.png'
        )
    for name in ('a.jpg', 'b.jpg', 'b.png', 'query.jpg'):
      Image.fromarray(pixels).save(cls.root / name)
    np.save(cls.root / 'x.npy', rng.normal(size=(12, 5)).astype(np.float32))
    np.save(cls.root / 'y.npy', np.arange(12) % 4)
    config = image_folder.get_config('scratch')
    config.update_from_flattened_dict(
      {
        'num_steps': 1,
        'batch_size': 8,
        'dataset.resize': 16,
        'dataset.image_size': 16,
        'model.width': 4,
        'report': False,
        'dataset.root': str(cls.root / 'images'),
        'evaluation.batch_size': 8,
        'evaluation.kmeans_iterations': 0,
        'evaluation.baselines': False,
      }
    )
    train.train_and_evaluate(config, str(cls.root / 'run'))

  def test_the_python_of_every_page_is_tested(self):
    pages = [str(path.relative_to(_ROOT)) for path in _ALL_PAGES]
    self.assertEqual({page for page in pages if _blocks(page)}, set(_PAGES))

  @parameterized.parameters(*_PAGES)
  def test_its_python_runs_in_order(self, page):
    rng = np.random.default_rng(0)
    image = Image.open(self.root / 'a.jpg')
    # Names that the text assumes.
    names = {
      'apply_fn': lambda network, images: images.reshape(8, -1) @ network,
      'array': np.asarray(image),
      'pil_image': image,
      'images': rng.integers(0, 256, (3, 16, 16, 3), np.uint8),
      'vectors': rng.normal(size=(12, 5)),
      'labels': np.arange(12) % 4,
    }
    self._go_to_root()
    for block in _blocks(page):
      code = block.replace('/tmp/run', str(self.root / 'run'))
      exec(compile(code, page, 'exec'), names)
    if 'objective' in names:
      params = {
        'network': rng.normal(size=(768, 5)).astype(np.float32),
        'proxies': rng.normal(size=(4, 5)).astype(np.float32),
      }
      images = rng.normal(size=(8, 16, 16, 3)).astype(np.float32)
      gradients = jax.grad(names['objective'])(params, images, np.arange(8) % 4)
      self.assertGreater(np.abs(gradients['proxies']).max(), 0)
    if 'train_step' in names:
      self.assertTrue(np.isfinite(names['loss']))
      self.assertLessEqual({'recall@1', 'map@r', 'nmi'}, set(names['scores']))
    if 'network' in names:
      np.testing.assert_allclose(
        names['embeddings'],
        names['embedder'].embed(names['images']),
        atol=1e-5,
      )

  def _go_to_root(self):
    self.addCleanup(os.chdir, os.getcwd())
    os.chdir(self.root)

  @parameterized.parameters('README.md', 'docs/search.md', 'docs/evaluation.md')
  def test_its_commands_run_in_order(self, page):
    self._go_to_root()
    commands = [
      arguments[1:]
      for arguments in _commands(_ROOT / page)
      if arguments[0] == '-m' and arguments[1].startswith('proxy_nca_jax.')
    ]
    self.assertNotEmpty(commands)
    replacements = {
      '/tmp/run': 'run',
      '/tmp/mine': 'run',
      '/tmp/images': 'images',
      '=DIR': '=images',
    }
    for module, *arguments in commands:
      for old, new in replacements.items():
        arguments = [x.replace(old, new) for x in arguments]
      # A server would not end.
      with mock.patch.object(serve, 'serve') as run:
        importlib.import_module(f'{module}.__main__').main(arguments)
      self.assertEqual(run.called, 'serve' in arguments)
    written = ('images.index', 'found.html', 'images.npz', 'scores.json')
    for name in written:
      if name in (_ROOT / page).read_text():
        self.assertTrue(os.path.exists(name), name)

  def test_configs_and_flags_of_training_commands_exist(self):
    _, help_text = whole_runs.finish(
      whole_runs.start([sys.executable, str(_ROOT / 'main.py'), '--help'])
    )
    commands = [x for x in _commands(*_ALL_PAGES) if x[0] == 'main.py']
    self.assertGreater(len(commands), 9)
    for _, *arguments in commands:
      flags = dict(
        x.removeprefix('--').split('=', 1) for x in arguments if '=' in x
      )
      path, *recipe = command_line._find_config(flags['config']).split(':')
      spec = importlib.util.spec_from_file_location('config', _ROOT / path)
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
      config = module.get_config(*recipe)
      for argument in arguments:
        name = argument.removeprefix('--').split('=')[0]
        if name.startswith('config.'):
          operator.attrgetter(name.removeprefix('config.'))(config)
        else:
          self.assertRegex(help_text, rf'--(\[no\])?{name}:')

  def test_published_results_equal_those_in_reports(self):
    text = (_ROOT / 'README.md').read_text()
    published = [
      literature.PUBLISHED[name] for name in ('cub200', 'cars196', 'sop')
    ]
    for rows in zip(*(rows[:3] for rows in published)):
      self.assertLen({row.name for row in rows}, 1)
      numbers = (f'{100 * row.scores["recall@1"]:.2f}' for row in rows)
      self.assertRegex(
        text,
        rf'\| {re.escape(rows[0].name)}.* \| {" . ".join(numbers)} \| not yet',
      )

  def test_programs_and_their_flags_exist(self):
    commands = [
      x
      for x in _commands(*_ALL_PAGES)
      if x[0].startswith(('benchmarks/', 'experiments/'))
    ]
    self.assertGreater(len(commands), 9)
    config = default.get_config()
    for program, *arguments in commands:
      text = (_ROOT / program).read_text()
      if program.startswith('experiments/'):
        text += (_ROOT / 'experiments' / 'runs.py').read_text()
      for argument in arguments:
        name = argument.split('=')[0]
        if name.startswith('--config.'):
          operator.attrgetter(name.removeprefix('--config.'))(config)
        else:
          self.assertIn(name.removeprefix('--'), text)

  @parameterized.parameters('evaluation', 'loss_parity', 'losses', 'parity')
  def test_help_of_benchmarks_works_without_the_other_libraries(self, name):
    program = _ROOT / 'benchmarks' / f'{name}.py'
    _, help_text = whole_runs.finish(
      whole_runs.start([sys.executable, str(program), '--help'])
    )
    self.assertIn('pip install', help_text)
    self.assertIn('show this help message', help_text)

  def test_the_notebook_runs(self):
    import matplotlib

    matplotlib.use('agg')
    notebook = json.loads((_ROOT / 'docs' / 'tour.ipynb').read_text())
    self.enter_context(
      mock.patch.dict(backbones.BACKBONES, small_cnn=_SMALL_CNN)
    )
    make_config = glyphs_config.get_config

    def without_clusters_and_report():
      config = make_config()
      config.update_from_flattened_dict(
        {'report': False, 'evaluation.kmeans_iterations': 0}
      )
      return config

    # The text shows neither.
    self.enter_context(
      mock.patch.object(
        glyphs_config, 'get_config', without_clusters_and_report
      )
    )
    fonts = glyphs._fonts_in(made_fonts.folder())
    self.enter_context(
      mock.patch.object(glyphs, '_text_fonts', return_value=fonts)
    )
    names = {}
    for cell in notebook['cells']:
      if cell['cell_type'] == 'code':
        exec(''.join(cell['source']), names)
    recall = {
      title: names['results'][title]['recall@1']
      for title in ('untrained', 'trained')
    }
    self.assertGreater(recall['trained'], recall['untrained'])
    self.assertTrue(np.isfinite(names['value']))
    self.assertEqual(names['neighbors'].shape, (5, 4))


if __name__ == '__main__':
  absltest.main()
