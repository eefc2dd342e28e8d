import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import numpy as np
import one_convolution
from absl.testing import absltest, parameterized
from PIL import Image

import proxy_nca_jax
from proxy_nca_jax import (
  datasets,
  evaluate,
  images,
  inference,
  models,
  train,
)
from proxy_nca_jax.configs import default, image_folder


def _write_images(root: pathlib.Path) -> list[pathlib.Path]:
  """Eight classes of four images of several sizes."""
  rng = np.random.default_rng(0)
  paths = []
  for label in range(8):
    (root / f'class{label}').mkdir(parents=True)
    color = rng.integers(0, 200, 3)
    for number in range(4):
      shape = (20 + 3 * number, 30 - 2 * number, 3)
      pixels = color + rng.integers(0, 56, shape)
      paths.append(root / f'class{label}' / f'{number}.png')
      Image.fromarray(pixels.astype(np.uint8)).save(paths[-1])
  return paths


def _make_zeros(config):
  """Returns parameters of 0 with two proxies, and the other variables."""
  model = models.create_model(config)
  shapes = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    model.example(1),
  )
  variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  params = variables.pop('params') | {'proxies': np.zeros((2, 8), np.float32)}
  return params, variables


class InferenceTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(one_convolution.replaced())
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    cls.paths = _write_images(cls.root / 'pixels')
    cls.config = image_folder.get_config('scratch')
    cls.config.update_from_flattened_dict(
      {
        'num_steps': 4,
        'batch_size': 8,
        'save_every': 2,
        'eval_every': 2,
        'dataset.root': str(cls.root / 'pixels'),
        'dataset.validation': '2/2',
        'evaluation.baselines': False,
        'report': False,
        'dataset.resize': 18,
        'dataset.resize_mode': 'shorter',
        'dataset.image_size': 16,
        'model.width': 4,
        'model.embedding_dim': 5,
        'evaluation.batch_size': 8,
        'evaluation.kmeans_iterations': 0,
      }
    )
    cls.workdir = str(cls.root / 'run')
    cls.results = train.train_and_evaluate(cls.config, cls.workdir)
    cls.embedder = proxy_nca_jax.load(cls.workdir)

  def test_embeddings_have_the_scores_of_the_run(self):
    test = datasets.load(self.config).test
    records = [test[i] for i in range(len(test))]
    embeddings = self.embedder(
      [self.root / 'pixels' / record['name'] for record in records]
    )
    scores = evaluate.score(embeddings, test.labels, kmeans_iterations=0)
    # The state that the validation classes selected.
    expected = self.results['selected']
    for name in ('recall@1', 'recall@4', 'map@r', 'mrr'):
      self.assertAlmostEqual(scores[name], expected[name])

  def test_every_kind_of_image_is_embedded_alike(self):
    path = self.paths[1]
    image = Image.open(path)
    embeddings = self.embedder(
      [path, str(path), path.read_bytes(), image, np.asarray(image)]
    )
    self.assertEqual(embeddings.shape, (5, 5))
    self.assertEqual(embeddings.dtype, np.float32)
    np.testing.assert_array_equal(embeddings, np.tile(embeddings[0], (5, 1)))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)

  def test_gray_arrays_and_turned_images_are_seen_as_they_look(self):
    gray = np.asarray(Image.open(self.paths[0]).convert('L'))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by 90 degrees.
    Image.fromarray(np.rot90(gray)).save(buffer, 'png', exif=exif)
    plain, turned = self.embedder([gray, buffer.getvalue()])
    np.testing.assert_array_equal(plain, turned)

  def test_the_number_of_images_does_not_matter(self):
    together = self.embedder(self.paths * 3)  # Of 96, three batches.
    self.assertLen(together, 96)
    few = self.embedder(iter(self.paths[:3]))
    np.testing.assert_array_equal(together[32:35], few)
    self.assertEqual(self.embedder([]).shape, (0, 5))

  def test_what_cannot_be_read_is_named(self):
    broken = self.root / 'broken.png'
    broken.write_bytes(self.paths[0].read_bytes()[:60])
    for image, message in (
      (broken, f'Image .{broken}. cannot be read: '),
      ('/nowhere.png', 'Image ./nowhere.png. cannot be read: .*No such file'),
      (b'text', 'Image number 1 cannot be read: not an image'),
      (np.zeros((4, 4, 3)), r'number 1 .* float64 \(4, 4, 3\); expected uint8'),
      (np.zeros((4, 4, 4), np.uint8), r'uint8 \(4, 4, 4\)'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        self.embedder([self.paths[0], image])
    with self.assertRaisesRegex(ValueError, 'Give a list'):
      self.embedder(str(self.paths[0]))

  def test_new_classes_get_the_means_of_their_images_as_proxies(self):
    old = self.embedder
    images, labels = self.paths[:5], ['x', 'y', 'x', 'x', 'y']
    new = old.add_classes(images, labels)
    self.assertEqual(new.class_names, (*old.class_names, 'x', 'y'))
    proxies, before = new.params['proxies'], old.params['proxies']
    np.testing.assert_array_equal(proxies[: len(before)], before)
    embeddings = old(images)
    for proxy, rows in zip(proxies[-2:], ([0, 2, 3], [1, 4])):
      mean = np.mean(embeddings[rows], axis=0)
      norm = np.mean(np.linalg.norm(before, axis=1))
      np.testing.assert_allclose(
        proxy, norm * mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5
      )
    # It can be saved, and the given one is as before.
    new.save(self.root / 'extended')
    loaded = proxy_nca_jax.load(self.root / 'extended')
    np.testing.assert_array_equal(loaded.params['proxies'], proxies)
    self.assertLen(old.class_names, len(before))

  def test_classes_that_cannot_be_added_are_named(self):
    known = self.embedder.class_names[0]
    for count, labels, message in (
      (2, ['x', known], f"1 of the 2 classes .* such as '{known}'"),
      (2, ['x'], 'There are 2 images and 1 labels'),
      (0, [], 'There are 0 images and 0 labels'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        self.embedder.add_classes(self.paths[:count], labels)
    config = self.config.copy_and_resolve_references()
    config.loss.name = 'triplet'
    other = dataclasses.replace(self.embedder, config=config)
    with self.assertRaisesRegex(ValueError, 'loss of this run is triplet'):
      other.add_classes(self.paths[:1], ['x'])

  def test_a_saved_embedder_is_the_same(self):
    folder = self.root / 'saved'
    self.embedder.save(folder)
    self.embedder.save(folder)  # Again is no harm.
    loaded = proxy_nca_jax.load(folder)
    np.testing.assert_array_equal(loaded(self.paths), self.embedder(self.paths))
    self.assertEqual(loaded.class_names, self.embedder.class_names)
    self.assertEqual(loaded.digest, self.embedder.digest)
    jax.tree.map(
      np.testing.assert_array_equal, loaded.params, self.embedder.params
    )
    with self.assertRaisesRegex(ValueError, 'holds other files'):
      self.embedder.save(self.root / 'pixels')

  def test_a_changed_byte_is_noticed(self):
    folder = self.root / 'changed'
    self.embedder.save(folder)
    file = folder / 'arrays.safetensors'
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with self.assertRaisesRegex(ValueError, 'bytes of .* have changed'):
      proxy_nca_jax.load(folder)

  def test_the_exported_network_runs_without_this_package(self):
    exported = self.root / 'network.stablehlo'
    exported.write_bytes(self.embedder.export())
    for number, shape in enumerate(((3, 16, 16, 3), (7, 18, 25, 3))):
      pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
      np.save(self.root / 'pixels.npy', pixels)
      program = (
        'import sys, numpy as np\n'
        'from jax import export\n'
        'data = open("network.stablehlo", "rb").read()\n'
        'network = export.deserialize(bytearray(data))\n'
        'embeddings = network.call(np.load("pixels.npy"))\n'
        'np.save("embeddings.npy", embeddings)\n'
        'assert "proxy_nca_jax" not in sys.modules\n'
        'assert "flax" not in sys.modules\n'
      )
      subprocess.run(
        [sys.executable, '-I', '-c', program], cwd=self.root, check=True
      )
      cropped = [images.center_crop(x, 16) for x in pixels]
      np.testing.assert_allclose(
        np.load(self.root / 'embeddings.npy'),
        self.embedder.embed(np.stack(cropped)),
        atol=1e-6,
      )

  def test_the_step_can_be_read_while_a_run_is_at_work(self):
    being_written = pathlib.Path(
      self.workdir, 'checkpoints', '6.orbax-checkpoint-tmp'
    )
    being_written.mkdir()
    self.addCleanup(being_written.rmdir)
    inference.load(self.workdir)
    self.assertTrue(being_written.exists())

  def test_its_text_is_two_lines(self):
    self.assertRegex(
      repr(self.embedder),
      r'^Embedder: small_cnn, 16 x 16 pixels to 5 dimensions,\n'
      r'trained with proxy_nca on 2 classes of image_folder$',
    )

  def test_what_is_no_run_is_said(self):
    with self.assertRaisesRegex(ValueError, 'neither the workdir of a run nor'):
      proxy_nca_jax.load(self.root)
    os.makedirs(self.root / 'begun', exist_ok=True)
    (self.root / 'begun' / 'run.json').write_text(
      pathlib.Path(self.workdir, 'run.json').read_text()
    )
    with self.assertRaisesRegex(ValueError, 'There is no checkpoint in'):
      proxy_nca_jax.load(self.root / 'begun')


class SavedTest(parameterized.TestCase):
  @parameterized.parameters(
    ('config.model.embedding_dim', 16, 'head.embedding.bias of shape'),
    ('config.model.width', 8, 'of shape'),
    ('config.model.name', 'resnet18', 'of shape'),
    ('class_names', ['a'], 'it has 1 class_names, .* 2 proxies'),
  )
  def test_a_config_of_another_network_is_damaged(self, field, value, message):
    config = default.get_config()
    config.update_from_flattened_dict(
      {
        'dataset.name': 'glyphs',
        'dataset.image_size': 16,
        'model.name': 'small_cnn',
        'model.width': 4,
        'model.embedding_dim': 8,
      }
    )
    params, variables = _make_zeros(config)
    folder = self.create_tempdir().full_path
    embedder = inference.Embedder(config, params, variables, ('a', 'b'))
    embedder.save(folder)
    self.assertEqual(inference.load(folder).digest, embedder.digest)
    path = pathlib.Path(folder, 'embedder.json')
    content = json.loads(path.read_text())
    *groups, last = field.split('.')
    functools.reduce(dict.get, groups, content)[last] = value
    path.write_text(json.dumps(content))
    with self.assertRaisesRegex(
      ValueError, rf'embedder.json. is damaged: .*{message}'
    ):
      inference.load(folder)

  def test_a_saved_network_is_loaded_in_the_groups_it_had(self):
    # Groups have names such as blocks.0, and so have flattened arrays.
    config = image_folder.get_config('scratch')
    config.model.name = 'efficientnet_lite0'
    config.dataset.image_size = 16
    params, variables = _make_zeros(config)
    folder = self.create_tempdir().full_path
    inference.Embedder(config, params, variables, ('a', 'b')).save(folder)
    loaded = inference.load(folder)
    self.assertEqual(
      jax.tree.structure((loaded.params, loaded.model_state)),
      jax.tree.structure((params, variables)),
    )


if __name__ == '__main__':
  absltest.main()
