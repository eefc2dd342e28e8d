import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax.configs import default


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


def _by_definition(
  name, x, gradients, *, rates, eps, momentum=0.8, rms_decay=0.7, decay=0.1
):
  """The rules as PyTorch's documentation prints them."""
  m, v = np.zeros_like(x), np.zeros_like(x)
  for t, (g, rate) in enumerate(zip(gradients, rates), start=1):
    if name == 'adamw':
      x = x - rate * decay * x
    else:
      g = g + decay * x
    if name in ('adam', 'adamw'):
      m = momentum * m + (1 - momentum) * g
      v = 0.999 * v + 0.001 * g**2
      root = np.sqrt(v / (1 - 0.999**t))
      x = x - rate * m / (1 - momentum**t) / (root + eps)
    elif name == 'rmsprop':
      v = rms_decay * v + (1 - rms_decay) * g**2
      m = momentum * m + g / (np.sqrt(v) + eps)
      x = x - rate * m
    else:
      m = momentum * m + g
      x = x - rate * m
  return x


class OptimizerTest(parameterized.TestCase):
  def test_each_group_has_its_own_learning_rate(self):
    config = _config(
      **{
        'name': 'sgd',
        'momentum': 0.0,
        'backbone.learning_rate': 0.1,
        'head.learning_rate': 0.0,
        'proxies.learning_rate': 10.0,
      }
    )
    params = _step(config, _params())
    np.testing.assert_allclose(params['backbone']['kernel'], 0.9, rtol=1e-6)
    np.testing.assert_array_equal(params['head']['kernel'], 1)
    np.testing.assert_allclose(params['proxies'], -9, rtol=1e-6)

  @parameterized.product(
    name=('adam', 'adamw', 'rmsprop', 'sgd'), eps=(1e-8, 1.0)
  )
  def test_rules_are_those_of_their_definitions(self, name, eps):
    config = _config(
      **{
        'name': name,
        'eps': eps,
        'momentum': 0.8,
        'rms_decay': 0.7,
        'head.weight_decay': 0.1,
        'head.schedule': 'exponential',
        'head.decay_every': 2,
        'head.learning_rate': 0.05,
      }
    )
    optimizer = optimizer_lib.make_optimizer(config)
    params = _params() | {'head': {'kernel': jnp.ones((2, 3))}}
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 2, 3))
    for gradient in gradients:
      given = params | {'head': {'kernel': jnp.asarray(gradient, jnp.float32)}}
      updates, state = optimizer.update(given, state, params)
      params = optax.apply_updates(params, updates)
    expected = _by_definition(
      name,
      np.ones((2, 3)),
      gradients,
      eps=eps,
      rates=0.05 * 0.94 ** np.array([0, 0, 1, 1, 2, 2]),
    )
    np.testing.assert_allclose(params['head']['kernel'], expected, rtol=2e-5)

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
      rate(
        25,
        learning_rate=1.0,
        schedule='exponential',
        decay_every=10,
        decay_rate=0.5,
      ),
      0.25,
      places=6,
    )
    for step, expected in ((9, 1), (10, 0.5), (29, 0.5), (30, 0.25)):
      fields = dict(learning_rate=1.0, schedule='step', decay_rate=0.5)
      self.assertAlmostEqual(rate(step, decay_at=(10, 30), **fields), expected)
      # Counted from the end of the warm-up.
      later = rate(step + 5, decay_at=(10, 30), warmup_steps=5, **fields)
      self.assertAlmostEqual(later, expected)
    # Half of the steps that are neither frozen nor warm-up.
    fields = dict(schedule='cosine', freeze_steps=20, warmup_steps=10)
    self.assertAlmostEqual(rate(45, learning_rate=2.0, **fields), 1, places=6)

  def test_clipping_is_by_the_norm_of_all_groups(self):
    config = _config(
      **{
        'name': 'sgd',
        'momentum': 0.0,
        'clip_norm': 1.0,
        'backbone.learning_rate': 1.0,
        'head.learning_rate': 1.0,
        'proxies.learning_rate': 1.0,
      }
    )
    params = _step(config, _params())
    # Twelve ones have norm sqrt(12).
    np.testing.assert_allclose(
      params['proxies'], 1 - 1 / np.sqrt(12), rtol=1e-6
    )

  def test_values_are_clipped_in_the_groups_that_ask_for_it(self):
    config = _config(
      **{
        'name': 'sgd',
        'momentum': 0.5,
        'backbone.learning_rate': 1.0,
        'backbone.clip_value': 2.0,
        'proxies.learning_rate': 1.0,
      }
    )
    gradients = _params() | {
      'backbone': {'kernel': jnp.array([[3.0, 2.0], [-5.0, 1.0]])},
      'proxies': jnp.full((3, 2), 7.0),
    }
    params = _step(config, gradients, num_steps=2)
    # The second step is one and a half times the first: what is clipped comes
    # before the momentum.
    np.testing.assert_allclose(
      (1 - params['backbone']['kernel']) / 2.5, [[2, 2], [-2, 1]]
    )
    np.testing.assert_allclose((1 - params['proxies']) / 2.5, 7)

  @parameterized.parameters(
    (False, {'backbone': 0.95, 'head': 1, 'proxies': 1}),
    (True, {'backbone': 0.95, 'head': 0.9, 'proxies': 1}),
  )
  def test_weight_decay_spares_proxies_and_vectors(self, vectors, expected):
    config = _config(
      **{
        'name': 'adamw',
        'decay_vectors': vectors,
        'backbone.weight_decay': 0.5,
        'backbone.learning_rate': 0.1,
        'head.weight_decay': 1.0,
        'head.learning_rate': 0.1,
      }
    )
    params = _step(config, jax.tree.map(jnp.zeros_like, _params()))
    for group, value in expected.items():
      for leaf in jax.tree.leaves(params[group]):
        np.testing.assert_allclose(leaf, value, rtol=1e-6)

  def test_a_frozen_group_starts_later_as_if_it_started_then(self):
    fields = {
      'backbone.learning_rate': 0.1,
      'backbone.warmup_steps': 2,
      'backbone.schedule': 'exponential',
      'backbone.decay_every': 1,
      'backbone.weight_decay': 0.5,
    }
    rng = np.random.default_rng(0)
    gradients = [
      jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), _params())
      for _ in range(8)
    ]

    def train(gradients, **more):
      optimizer = optimizer_lib.make_optimizer(_config(**fields, **more))
      update = jax.jit(optimizer.update)
      params = _params()
      state, history = optimizer.init(params), []
      for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
      return history

    frozen = train(gradients, **{'backbone.freeze_steps': 3})
    later, straight = train(gradients[3:]), train(gradients)
    for step, params in enumerate(frozen):
      kernel = params['backbone']['kernel']
      if step < 3:
        np.testing.assert_array_equal(kernel, 1)
      else:
        expected = later[step - 3]['backbone']['kernel']
        np.testing.assert_allclose(kernel, expected, rtol=1e-6)
      # The other groups train all the while.
      np.testing.assert_allclose(
        params['proxies'], straight[step]['proxies'], rtol=1e-6
      )

  def test_the_learning_rate_of_a_frozen_group_is_zero(self):
    config = _config(**{'head.freeze_steps': 2, 'head.learning_rate': 0.5})
    learning_rates = optimizer_lib.make_learning_rates(config)
    rates = [float(learning_rates(jnp.int32(i))['head']) for i in range(4)]
    self.assertEqual(rates, [0, 0, 0.5, 0.5])

  def test_a_score_at_the_threshold_is_no_improvement(self):
    scores = [0.5, 0.5 * (1 + 1e-4)]
    scale = optimizer_lib.plateau_scale(scores, patience=0, factor=0.5)
    self.assertEqual(scale, 0.5)

  def test_only_a_cosine_depends_on_the_number_of_steps(self):
    depends = optimizer_lib.depends_on_num_steps
    self.assertFalse(depends(_config()))
    self.assertFalse(depends(_config(**{'head.schedule': 'exponential'})))
    self.assertTrue(depends(_config(**{'proxies.schedule': 'cosine'})))


class PlateauTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 1),
    ([0.1, 0.2, 0.3], 1),
    # Two may pass, the third is one too many, and counting begins again.
    ([0.3, 0.1, 0.2], 1),
    ([0.3, 0.1, 0.2, 0.3], 0.5),
    ([0.3, 0.1, 0.2, 0.3, 0.1, 0.1], 0.5),
    ([0.3, 0.1, 0.2, 0.3, 0.1, 0.1, 0.1], 0.25),
    # A better score begins the count again.
    ([0.3, 0.1, 0.1, 0.4, 0.1, 0.1], 1),
    # Better by less than a ten-thousandth of the best is not better.
    ([0.5, 0.50004, 0.50004, 0.50004], 0.5),
    ([0.5, 0.50006, 0.50006, 0.50006], 1),
  )
  def test_rates_fall_when_scores_stall(self, scores, expected):
    scale = optimizer_lib.plateau_scale(scores, patience=2, factor=0.5)
    self.assertEqual(scale, expected)

  def test_no_patience_takes_the_first_worse_score(self):
    scale = optimizer_lib.plateau_scale([0.3, 0.2], patience=0, factor=0.1)
    self.assertEqual(scale, 0.1)


if __name__ == '__main__':
  absltest.main()
