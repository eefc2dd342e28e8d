import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from configs import default
from proxy_nca_jax import optimizer as optimizer_lib


def _config(**fields):
  config = default.get_config()
  config.num_steps = 100
  config.update_from_flattened_dict(
    {f'optimizer.{name}': value for name, value in fields.items()}
  )
  return config


def _params():
  return {
    'backbone': {'kernel': jnp.ones((2, 2))},
    'head': {'kernel': jnp.ones((2,))},
    'proxies': jnp.ones((3, 2)),
  }


def _step(config, gradients, num_steps=1):
  optimizer = optimizer_lib.make_optimizer(config)
  params = _params()
  state = optimizer.init(params)
  for _ in range(num_steps):
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  return params


class OptimizerTest(parameterized.TestCase):

  def test_each_group_has_its_own_learning_rate(self):
    config = _config(**{
      'name': 'sgd', 'momentum': 0.0, 'backbone.learning_rate': 0.1,
      'head.learning_rate': 0.0, 'proxies.learning_rate': 10.0,
    })
    params = _step(config, _params())
    np.testing.assert_allclose(params['backbone']['kernel'], 0.9, rtol=1e-6)
    np.testing.assert_array_equal(params['head']['kernel'], 1)
    np.testing.assert_allclose(params['proxies'], -9, rtol=1e-6)

  @parameterized.parameters('adam', 'rmsprop', 'sgd')
  def test_proxies_move_against_their_gradient(self, name):
    params = _step(_config(name=name), _params())
    self.assertLess(jnp.max(params['proxies']), 1)

  def test_schedules_by_hand(self):
    def rate(step, **fields):
      fields = {f'head.{name}': value for name, value in fields.items()}
      config = _config(**fields)
      schedule = optimizer_lib.make_schedule(config.optimizer, 'head', 100)
      return float(schedule(step))

    self.assertAlmostEqual(rate(0, learning_rate=2.0), 2)
    self.assertAlmostEqual(
      rate(5, learning_rate=2.0, warmup_steps=10), 1, places=6
    )
    self.assertAlmostEqual(
      rate(55, learning_rate=2.0, warmup_steps=10, schedule='cosine'), 1, 6
    )
    self.assertAlmostEqual(rate(100, learning_rate=2.0, schedule='cosine'), 0)
    self.assertAlmostEqual(
      rate(25, learning_rate=1.0, schedule='exponential', decay_every=10,
           decay_rate=0.5),
      0.25,
      places=6,
    )

  def test_clipping_is_by_the_norm_of_all_groups(self):
    config = _config(**{
      'name': 'sgd', 'momentum': 0.0, 'clip_norm': 1.0,
      'backbone.learning_rate': 1.0, 'head.learning_rate': 1.0,
      'proxies.learning_rate': 1.0,
    })
    params = _step(config, _params())
    # Twelve ones have norm sqrt(12).
    np.testing.assert_allclose(
      params['proxies'], 1 - 1 / np.sqrt(12), rtol=1e-6
    )

  def test_weight_decay_is_decoupled(self):
    config = _config(**{
      'backbone.weight_decay': 0.5, 'backbone.learning_rate': 0.1,
    })
    gradients = {
      'backbone': {'kernel': jnp.zeros((2, 2))},
      'head': {'kernel': jnp.zeros((2,))},
      'proxies': jnp.zeros((3, 2)),
    }
    params = _step(config, gradients)
    np.testing.assert_allclose(params['backbone']['kernel'], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(params['proxies'], 1)

  def test_unknown_names_list_the_choices(self):
    with self.assertRaisesRegex(ValueError, 'adam, rmsprop, sgd'):
      optimizer_lib.make_optimizer(_config(name='adagrad'))
    with self.assertRaisesRegex(ValueError, 'constant, cosine, exponential'):
      optimizer_lib.make_optimizer(_config(**{'head.schedule': 'linear'}))

  def test_only_a_cosine_depends_on_the_number_of_steps(self):
    depends = optimizer_lib.depends_on_num_steps
    self.assertFalse(depends(_config()))
    self.assertFalse(depends(_config(**{'head.schedule': 'exponential'})))
    self.assertTrue(depends(_config(**{'proxies.schedule': 'cosine'})))


if __name__ == '__main__':
  absltest.main()
