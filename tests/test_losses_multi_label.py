import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import losses

_NCA = losses.multi_label_proxy_nca_loss
_ANCHOR = losses.multi_label_proxy_anchor_loss
_FORMS = (
  ('paper', _NCA, losses.proxy_nca_loss),
  (
    'softmax',
    functools.partial(_NCA, positive_in_denominator=True),
    losses.proxy_nca_pp_loss,
  ),
  ('anchor', _ANCHOR, losses.proxy_anchor_loss),
)


def _inputs(batch=6, num_classes=5, dim=3):
  rng = np.random.default_rng(0)
  targets = rng.random((batch, num_classes)) < 0.4
  targets[:, 0] |= ~targets.any(axis=1)
  targets[:, 1] &= ~targets.all(axis=1)
  return (
    rng.normal(size=(batch, dim)).astype(np.float32),
    rng.normal(size=(num_classes, dim)).astype(np.float32),
    targets,
  )


class MultiLabelTest(parameterized.TestCase):
  @parameterized.named_parameters(*_FORMS)
  def test_one_class_each_gives_the_loss_of_labels(self, loss, single):
    x, proxies, _ = _inputs()
    labels = np.array([0, 1, 2, 3, 4, 2])
    where = np.arange(6) != 1
    np.testing.assert_allclose(
      jax.jit(loss)(x, proxies, np.eye(5, dtype=int)[labels], where=where),
      jax.jit(single)(x, proxies, labels, where=where),
      rtol=1e-5,
      atol=1e-6,
    )

  @parameterized.parameters(False, True)
  def test_proxy_nca_is_the_mean_over_the_classes(self, softmax):
    x, proxies, targets = _inputs()

    def expected(x, proxies):
      losses = []
      for v, row in zip(oracles.unit(x), targets):
        scores = [-9 * np.sum((v - p) ** 2) for p in oracles.unit(proxies)]
        others = sum(np.exp(s) for s, t in zip(scores, row) if not t)
        terms = [
          np.log((others + softmax * np.exp(s)) / np.exp(s))
          for s, t in zip(scores, row)
          if t
        ]
        losses.append(np.mean(terms))
      return np.array(losses)

    self._check(
      functools.partial(_NCA, positive_in_denominator=softmax), expected
    )

  def test_proxy_anchor_sums_over_the_examples_of_each_class(self):
    _, _, targets = _inputs()

    def expected(x, proxies):
      cosines = oracles.unit(x) @ oracles.unit(proxies).T
      pulls, pushes = [], []
      for column, row in zip(cosines.T, targets.T):
        pulls.append(np.log1p(np.sum(np.exp(-2 * (column[row] - 0.3)))))
        pushes.append(np.log1p(np.sum(np.exp(2 * (column[~row] + 0.3)))))
      return sum(pulls) / np.sum(targets.any(axis=0)) + np.mean(pushes)

    self._check(functools.partial(_ANCHOR, alpha=2.0, margin=0.3), expected)

  def _check(self, loss, expected):
    """Compares values and gradients."""
    x, proxies, targets = _inputs()

    def total(*points):
      value = loss(*points, targets)
      return jnp.sum(value), value

    gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    gradients, value = gradient(x, proxies)
    np.testing.assert_allclose(
      value, expected(x, proxies), rtol=1e-4, atol=1e-4
    )
    for actual, total, point in zip(
      gradients,
      (
        lambda x: np.sum(expected(x, proxies)),
        lambda proxies: np.sum(expected(x, proxies)),
      ),
      (x, proxies),
    ):
      np.testing.assert_allclose(
        actual, oracles.gradient(total, point), rtol=2e-3, atol=2e-3
      )

  @parameterized.named_parameters(*_FORMS)
  def test_degenerate_targets_are_finite(self, loss, single):
    del single
    x, proxies, targets = _inputs()
    targets[0], targets[1] = False, True
    x[2] = np.nan
    where = np.arange(6) != 2
    value, gradient = jax.jit(
      jax.value_and_grad(
        lambda x: jnp.sum(loss(x, proxies, targets, where=where))
      )
    )(x)
    self.assertTrue(np.isfinite(value))
    self.assertTrue(np.all(np.isfinite(gradient)))
    np.testing.assert_array_equal(gradient[2], 0)

  def test_examples_of_no_class_or_of_all_have_no_loss(self):
    x, proxies, targets = _inputs()
    targets[0], targets[1] = False, True
    loss = jax.jit(_NCA)(x, proxies, targets)
    np.testing.assert_array_equal(np.asarray(loss) == 0, np.arange(6) < 2)

  def test_targets_other_than_zero_and_one_are_an_error(self):
    x, proxies, targets = _inputs()
    with self.assertRaisesRegex(
      ValueError, 'targets must be bool, or integers'
    ):
      _NCA(x, proxies, targets * 0.5)


if __name__ == '__main__':
  absltest.main()
