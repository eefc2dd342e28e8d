import jax
import jax.numpy as jnp
import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import losses


class ClassWeightsTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.5, 1.0)
  def test_the_mean_over_examples_is_one(self, power):
    counts = np.array([1, 10, 100])
    weights = losses.class_weights(counts, power=power)
    self.assertAlmostEqual(np.sum(weights * counts) / 111, 1, places=6)
    np.testing.assert_allclose(weights[0] / weights[2], 100**power, rtol=1e-6)

  def test_by_hand(self):
    # Each class has half of the total weight of four examples.
    np.testing.assert_allclose(
      losses.class_weights(np.array([3, 1])), [2 / 3, 2], rtol=1e-6
    )


class LogPriorsTest(parameterized.TestCase):
  def test_by_hand(self):
    np.testing.assert_allclose(
      np.exp(losses.log_priors(np.array([1, 3]))), [0.25, 0.75], rtol=1e-6
    )
    np.testing.assert_allclose(
      losses.log_priors(np.array([1, 3]), power=0.0), [0, 0]
    )

  @parameterized.parameters(
    *[
      (in_sum, normalize, chunk)
      for in_sum in (False, True)
      for normalize in (False, True)
      for chunk in (None, 3)
    ]
  )
  def test_the_adjusted_loss_equals_its_definition(
    self, in_sum, normalize, chunk
  ):
    rng = np.random.default_rng(0)
    x, p = rng.normal(size=(4, 5)), rng.normal(size=(7, 5))
    labels = np.array([0, 6, 3, 3])
    priors = rng.normal(size=7)
    actual = losses.proxy_nca_loss(
      jnp.array(x),
      jnp.array(p),
      labels,
      temperature=0.5,
      positive_in_denominator=in_sum,
      normalize=normalize,
      proxy_chunk=chunk,
      log_priors=priors,
    )
    if normalize:
      x /= np.linalg.norm(x, axis=1, keepdims=True)
      p /= np.linalg.norm(p, axis=1, keepdims=True)
    for row, label, value in zip(x, labels, actual):
      odds = np.exp(-np.sum((row - p) ** 2, axis=1) / 0.5 + priors)
      total = odds.sum() - (0 if in_sum else odds[label])
      np.testing.assert_allclose(value, -np.log(odds[label] / total), rtol=1e-4)

  def test_equal_priors_change_neither_loss_nor_gradient(self):
    rng = np.random.default_rng(0)
    x, p = rng.normal(size=(4, 5)), rng.normal(size=(7, 5))
    labels = np.array([0, 6, 3, 3])

    def total(x, p, priors):
      return losses.proxy_nca_loss(x, p, labels, log_priors=priors).sum()

    inputs = jnp.array(x), jnp.array(p)
    for fn in (total, jax.grad(total, (0, 1))):
      for a, b in zip(
        jax.tree.leaves(fn(*inputs, losses.log_priors(np.full(7, 9)))),
        jax.tree.leaves(fn(*inputs, None)),
      ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      total(*inputs, None),
      oracles.proxy_nca_loss(x, p, labels).sum(),
      rtol=1e-5,
    )

  def test_log_priors_need_one_value_per_proxy(self):
    x, p = jnp.ones((2, 3)), jnp.ones((4, 3))
    with self.assertRaises(AssertionError):
      losses.proxy_nca_loss(x, p, jnp.array([0, 1]), log_priors=jnp.zeros(3))


if __name__ == '__main__':
  absltest.main()
