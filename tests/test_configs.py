"""Every config loads, and what it names can be built."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from configs import default
from proxy_nca_jax import models, train, workdir
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib

_CONFIGS = [
  path.stem
  for path in (pathlib.Path(__file__).parent.parent / 'configs').glob('*.py')
]


def _load(name):
  return importlib.import_module(f'configs.{name}').get_config()


class ConfigsTest(parameterized.TestCase):

  @parameterized.parameters(*_CONFIGS)
  def test_config_loads_and_its_shapes_evaluate(self, name):
    config = _load(name)
    train.check_config(config)
    train.make_loss(config)
    model = models.create_model(config)
    optimizer = optimizer_lib.make_optimizer(config)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def embed(images):
      state = state_lib.create(
        config, model, optimizer, num_classes=7, sharding=sharding
      )
      self.assertSameElements(state.params, ('backbone', 'head', 'proxies'))
      params = {k: state.params[k] for k in ('backbone', 'head')}
      variables = {'params': params, **state.model_state}
      return model.apply(variables, images, train=False)

    size = config.dataset.image_size
    embeddings = jax.eval_shape(
      embed, jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32)
    )
    self.assertEqual(embeddings.shape, (3, config.model.embedding_dim))
    self.assertEqual(embeddings.dtype, jnp.float32)

  @parameterized.parameters(*_CONFIGS)
  def test_config_has_no_field_beside_the_defaults(self, name):
    def fields(config):
      return set(workdir.flatten(config.to_dict()))

    self.assertEqual(fields(_load(name)), fields(default.get_config()))

  def test_a_misspelled_field_is_refused(self):
    with self.assertRaisesRegex(AttributeError, 'num_stepz'):
      default.get_config().num_stepz = 3


if __name__ == '__main__':
  absltest.main()
