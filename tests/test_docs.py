"""The Python of README and docs runs as it stands there."""

import json
import os
import pathlib
import re
import shutil
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from configs import image_folder
from proxy_nca_jax import train

_ROOT = pathlib.Path(__file__).parent.parent
_PAGES = ('README.md', 'docs/search.md')


def _blocks(page: str) -> list[str]:
  text = (_ROOT / page).read_text()
  return re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


class DocsTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    rng = np.random.default_rng(0)
    for label in range(4):
      (cls.root / 'pictures' / str(label)).mkdir(parents=True)
      for number in range(4):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(
          cls.root / 'pictures' / str(label) / f'{number}.png'
        )
    for name in ('a.jpg', 'b.jpg', 'b.png'):
      Image.fromarray(pixels).save(cls.root / name)
    config = image_folder.get_config()
    config.update_from_flattened_dict({
      'num_steps': 1, 'batch_size': 8, 'dataset.resize': 16,
      'dataset.image_size': 16, 'model.width': 4, 'report': False,
      'dataset.root': str(cls.root / 'pictures'), 'evaluation.batch_size': 8,
      'evaluation.kmeans_iterations': 0, 'evaluation.baselines': False,
    })
    train.train_and_evaluate(config, str(cls.root / 'run'))

  def test_every_page_with_python_is_run(self):
    pages = [
      str(path.relative_to(_ROOT))
      for path in (*_ROOT.glob('*.md'), *_ROOT.glob('docs/*.md'))
    ]
    self.assertEqual({page for page in pages if _blocks(page)}, set(_PAGES))

  @parameterized.parameters(*_PAGES)
  def test_its_blocks_run_one_after_the_other(self, page):
    rng = np.random.default_rng(0)
    image = Image.open(self.root / 'a.jpg')
    # What the text takes as given.
    names = {
      'apply_fn': lambda network, images: images.reshape(8, -1) @ network,
      'array': np.asarray(image),
      'pil_image': image,
      'pictures': rng.integers(0, 256, (3, 16, 16, 3), np.uint8),
    }
    before = os.getcwd()
    self.addCleanup(os.chdir, before)
    os.chdir(self.root)
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
    if 'network' in names:
      np.testing.assert_allclose(
        names['embeddings'], names['embedder'].embed(names['pictures']),
        atol=1e-5,
      )


  def test_the_notebook_runs(self):
    import matplotlib

    matplotlib.use('agg')
    notebook = json.loads((_ROOT / 'docs' / 'tour.ipynb').read_text())
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
    self.assertEqual(names['neighbours'].shape, (5, 4))


if __name__ == '__main__':
  absltest.main()
