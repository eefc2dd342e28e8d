import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import train_step as train_step_benchmark
from proxy_nca_jax import models
from proxy_nca_jax.configs import default


def _config(**fields):
  config = default.get_config()
  config.model.width = 4
  config.model.embedding_dim = 6
  config.model.update(fields)
  return config


def _images(batch=5, size=32):
  return jax.random.normal(jax.random.key(1), (batch, size, size, 3))


class ModelsTest(parameterized.TestCase):
  @parameterized.parameters(32, 33, 64)
  def test_normalized_embeddings_have_unit_norm(self, size):
    model = models.create_model(_config())
    images = _images(size=size)
    variables = model.init(jax.random.key(0), images, train=False)
    embeddings = model.apply(variables, images, train=False)
    self.assertEqual(embeddings.shape, (5, 6))
    np.testing.assert_allclose(
      jnp.linalg.norm(embeddings, axis=1), 1, rtol=1e-6
    )

  def test_normalization_divides_by_the_norm(self):
    images = _images()
    plain = models.create_model(_config(normalize=False))
    unit = models.create_model(_config())
    variables = plain.init(jax.random.key(0), images, train=False)
    expected = plain.apply(variables, images, train=False)
    expected /= jnp.linalg.norm(expected, axis=1, keepdims=True)
    actual = unit.apply(variables, images, train=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)

  def test_training_uses_and_updates_batch_statistics(self):
    model = models.create_model(_config())
    images = _images()
    variables = model.init(jax.random.key(0), images, train=False)
    _, updated = model.apply(
      variables, images, train=True, mutable=['batch_stats']
    )
    before = jax.tree.leaves(variables['batch_stats'])
    after = jax.tree.leaves(updated['batch_stats'])
    self.assertTrue(all(np.any(a != b) for a, b in zip(after, before)))
    # In evaluation, an embedding must not depend on the rest of the batch.
    single = model.apply(variables, images[:1], train=False)
    batch = model.apply(variables, images, train=False)
    np.testing.assert_allclose(single[0], batch[0], rtol=1e-4, atol=1e-5)

  def test_bfloat16_keeps_float32_parameters_and_embeddings(self):
    images = _images()
    full = models.create_model(_config())
    half = models.create_model(_config(dtype='bfloat16'))
    variables = half.init(jax.random.key(0), images, train=False)
    self.assertEqual(
      {x.dtype for x in jax.tree.leaves(variables)}, {jnp.dtype('float32')}
    )
    actual = half.apply(variables, images, train=False)
    self.assertEqual(actual.dtype, jnp.float32)
    expected = full.apply(variables, images, train=False)
    np.testing.assert_allclose(actual, expected, atol=0.05)
    self.assertTrue(np.any(actual != expected))

  def test_normalize_by_hand(self):
    images = jnp.array([[[[0, 100, 255]]]], jnp.uint8)
    statistics = dict(mean=(0.0, 50.0, 127.5), std=(1.0, 25.0, 127.5))
    actual = models.normalize(images, **statistics)
    np.testing.assert_allclose(actual, [[[[0, 2, 1]]]])
    self.assertEqual(actual.dtype, jnp.float32)
    # Blue comes first in the result and in the statistics.
    actual = models.normalize(images, is_bgr=True, **statistics)
    np.testing.assert_allclose(actual, [[[[255, 2, -1]]]])

  @parameterized.parameters('small_cnn', 'bn_inception')
  def test_a_model_normalizes_as_its_weights_expect(self, name):
    backbone = models.BACKBONES[name]
    model = models.create_model(_config(name=name))
    self.assertEqual(
      (model.mean, model.std, model.is_bgr),
      (backbone.mean, backbone.std, backbone.is_bgr),
    )


class BenchmarkTest(parameterized.TestCase):
  @parameterized.parameters(*train_step_benchmark.RECIPES)
  def test_its_network_can_be_built(self, name):
    model = train_step_benchmark.make_model(name, 'float32', 64)
    variables = jax.eval_shape(
      lambda images: model.init(jax.random.key(0), images, train=False),
      model.example(2),
    )
    dim = train_step_benchmark.RECIPES[name][-1]
    kernel = variables['params']['head']['embedding']['kernel']
    self.assertEqual(kernel.shape[1], dim)


if __name__ == '__main__':
  absltest.main()
