import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import proxy_nca_loss
from proxy_nca_jax.losses import (
  dynamic_proxy_nca_loss,
  fractional_proxy_nca_loss,
  proxy_anchor_loss,
  proxy_nca_pp_loss,
  proxy_triplet_loss,
)

_FORMS = (
  {},
  {'positive_in_denominator': True},
  {'normalize': False, 'temperature': 2.0},
  {'normalize': False, 'positive_in_denominator': True, 'temperature': 3.0},
  {'positive_in_denominator': True, 'label_smoothing': 0.1},
  {'positive_in_denominator': True, 'temperature': 1.0},
)


def _inputs(seed=0, batch=7, num_proxies=5, dim=4):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(batch, dim)).astype(np.float32),
    rng.normal(size=(num_proxies, dim)).astype(np.float32),
    rng.integers(0, num_proxies, batch).astype(np.int32),
  )


# A program for each set of keyword arguments, instead of one per operation.
def _keywords(*names):
  return functools.partial(jax.jit, static_argnames=names)


_nca = _keywords(
  'temperature', 'positive_in_denominator', 'normalize', 'label_smoothing'
)(proxy_nca_loss)


@functools.cache
def _compiled(**kwargs):
  """Returns the sum, its gradients, and the losses without differentiation."""

  def total(x, p, labels, where):
    return proxy_nca_loss(x, p, labels, where=where, **kwargs).sum()

  @jax.jit
  def compute(x, p, labels, where=None):
    return (
      *jax.value_and_grad(total, (0, 1))(x, p, labels, where),
      proxy_nca_loss(x, p, labels, where=where, **kwargs),
    )

  return compute


class ProxyNcaLossTest(parameterized.TestCase):
  def test_values_by_hand(self):
    # Distances to the three proxies: 0, 2 and 4.
    x = np.array([[1.0, 0.0]])
    proxies = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    for label, expected in (
      (0, 0 + np.log(np.exp(-2) + np.exp(-4))),
      (1, 2 + np.log(1 + np.exp(-4))),
      (2, 4 + np.log(1 + np.exp(-2))),
    ):
      actual = _nca(x, proxies, np.array([label]), temperature=1.0)
      np.testing.assert_allclose(actual, [expected], rtol=1e-6)

  def test_softmax_form_by_hand(self):
    x = np.array([[2.0, 0.0]])
    proxies = np.array([[3.0, 0.0], [0.0, 5.0]])
    actual = _nca(
      x, proxies, np.array([1]), temperature=1.0, positive_in_denominator=True
    )
    np.testing.assert_allclose(actual, [2 + np.log(1 + np.exp(-2))], rtol=1e-6)

  @parameterized.parameters(*_FORMS)
  def test_equals_the_oracle(self, **kwargs):
    for seed in range(3):
      inputs = _inputs(seed)
      np.testing.assert_allclose(
        _nca(*inputs, **kwargs),
        oracles.proxy_nca_loss(*inputs, **kwargs),
        rtol=2e-5,
        atol=2e-5,
      )

  @parameterized.parameters(*_FORMS)
  def test_gradients_equal_differences_of_the_oracle(self, **kwargs):
    x, p, labels = _inputs()
    _, actual, _ = _compiled(**kwargs)(x, p, labels)
    expected = (
      oracles.gradient(
        lambda x: oracles.proxy_nca_loss(x, p, labels, **kwargs).sum(), x
      ),
      oracles.gradient(
        lambda p: oracles.proxy_nca_loss(x, p, labels, **kwargs).sum(), p
      ),
    )
    for a, b in zip(actual, expected):
      np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
      self.assertGreater(np.abs(b).max(), 0.1)

  @parameterized.parameters(True, False)
  def test_descent_on_proxies_makes_the_right_one_the_nearest(self, softmax):
    # A wrong sign would learn mirrored proxies, which no retrieval metric
    # shows.
    x = np.eye(4)
    labels = np.arange(4)
    proxies = np.random.default_rng(0).normal(size=(4, 4))
    gradient = jax.jit(
      jax.grad(
        lambda p: proxy_nca_loss(
          x, p, labels, positive_in_denominator=softmax
        ).mean()
      )
    )
    for _ in range(200):
      proxies -= 0.1 * np.asarray(gradient(proxies))
    proxies /= np.linalg.norm(proxies, axis=1, keepdims=True)
    distances = np.sum((x[:, None] - proxies[None]) ** 2, axis=2)
    np.testing.assert_array_equal(np.argmin(distances, axis=1), labels)

  def test_softmax_form_is_the_softplus_of_the_papers(self):
    inputs = _inputs()
    paper = _nca(*inputs)
    softmax = _nca(*inputs, positive_in_denominator=True)
    np.testing.assert_allclose(
      softmax, np.logaddexp(paper, 0), rtol=1e-4, atol=1e-5
    )

  def test_papers_form_can_be_negative(self):
    loss = _nca(np.eye(2), np.eye(2), np.arange(2))
    np.testing.assert_allclose(loss, [-18, -18], rtol=1e-6)

  def test_two_scales_of_three_are_a_temperature_of_one_ninth(self):
    x, p, labels = _inputs()
    x3 = 3 * x / np.linalg.norm(x, axis=1, keepdims=True)
    p3 = 3 * p / np.linalg.norm(p, axis=1, keepdims=True)
    np.testing.assert_allclose(
      _nca(x3, p3, labels, normalize=False, temperature=1.0),
      _nca(x, p, labels),
      rtol=1e-4,
      atol=1e-4,
    )

  @parameterized.product(
    scale=(1e-30, 1e-10, 1.0, 1e10, 1e30),
    temperature=(1e-3, 1 / 9, 1e3),
    softmax=(True, False),
  )
  def test_finite_at_every_scale(self, scale, temperature, softmax):
    x, p, labels = _inputs()
    compute = _compiled(
      temperature=temperature, positive_in_denominator=softmax
    )
    loss, gradients, _ = compute(
      x * np.float32(scale), p * np.float32(scale), labels
    )
    _, _, expected = compute(x, p, labels)
    np.testing.assert_allclose(loss, np.sum(expected), rtol=1e-4)
    for gradient in gradients:
      self.assertTrue(np.all(np.isfinite(gradient)))

  @parameterized.product(
    rows=('zeros', 'equal', 'proxies'),
    softmax=(True, False),
    normalize=(True, False),
  )
  def test_degenerate_rows_are_finite(self, rows, softmax, normalize):
    _, p, labels = _inputs(batch=5)
    x = {'zeros': 0 * p, 'equal': 0 * p + 1, 'proxies': p}[rows]
    p = {'zeros': 0 * p, 'equal': 0 * p + 1, 'proxies': p}[rows]
    loss, gradients, _ = _compiled(
      positive_in_denominator=softmax, normalize=normalize
    )(x, p, labels)
    self.assertTrue(np.isfinite(loss))
    for gradient in gradients:
      self.assertTrue(np.all(np.isfinite(gradient)))

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_low_precision_inputs_are_computed_in_float32(self, dtype):
    x, p, labels = _inputs()
    x, p = jnp.asarray(x, dtype), jnp.asarray(p, dtype)
    actual = proxy_nca_loss(x, p, labels)
    self.assertEqual(actual.dtype, jnp.float32)
    expected = proxy_nca_loss(
      x.astype(jnp.float32), p.astype(jnp.float32), labels
    )
    np.testing.assert_array_equal(actual, expected)

  def test_jit_and_vmap_agree_with_the_plain_call(self):
    x, p, labels = _inputs()
    plain = proxy_nca_loss(x, p, labels)
    np.testing.assert_allclose(_nca(x, p, labels), plain, rtol=1e-5, atol=1e-6)
    stacked = jax.jit(jax.vmap(proxy_nca_loss, in_axes=(0, None, 0)))(
      np.stack([x, x[::-1]]), p, np.stack([labels, labels[::-1]])
    )
    np.testing.assert_allclose(stacked[0], plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stacked[1], plain[::-1], rtol=1e-5, atol=1e-6)

  def test_a_masked_row_is_ignored_whatever_its_values(self):
    x, p, labels = _inputs()
    where = np.arange(7) != 3
    bad, bad_labels = x.copy(), labels.copy()
    bad[3], bad_labels[3] = np.nan, -1

    _, (dx, dp), loss = _compiled()(bad, p, bad_labels, where)
    self.assertEqual(loss[3], 0)
    _, _, without = _compiled()(x, p, labels)
    np.testing.assert_array_equal(
      np.asarray(loss)[where], np.asarray(without)[where]
    )
    np.testing.assert_array_equal(dx[3], 0)
    _, (_, expected), _ = _compiled()(
      x[where], p, labels[where], np.ones(6, bool)
    )
    np.testing.assert_allclose(dp, expected, rtol=1e-4, atol=1e-5)

  @parameterized.parameters(-1, 5, 100)
  def test_a_label_out_of_range_is_an_error(self, label):
    x, p, labels = _inputs()
    labels[2] = label
    with self.assertRaisesRegex(ValueError, rf'{label}.*\[0, 5\)'):
      proxy_nca_loss(x, p, labels)

  @parameterized.parameters(-1, 5, 100)
  def test_a_traced_label_out_of_range_gives_nan_for_its_row(self, label):
    x, p, labels = _inputs()
    expected = np.array(proxy_nca_loss(x, p, labels))
    labels[2], expected[2] = label, np.nan
    np.testing.assert_allclose(
      _nca(x, p, labels), expected, rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters(
    ({'label_smoothing': 0.1}, 'positive_in_denominator'),
    ({'label_smoothing': 1.0, 'positive_in_denominator': True}, 'in .0, 1'),
    ({'label_smoothing': -0.1, 'positive_in_denominator': True}, 'in .0, 1'),
    ({'temperature': 0.0}, 'temperature'),
    ({'proxy_chunk': 0}, 'proxy_chunk'),
  )
  def test_wrong_arguments_are_errors(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      proxy_nca_loss(*_inputs(), **kwargs)

  def test_papers_form_needs_two_proxies(self):
    x, p, labels = _inputs(num_proxies=1)
    with self.assertRaisesRegex(ValueError, 'two proxies'):
      proxy_nca_loss(x, p, labels)
    loss = proxy_nca_loss(x, p, labels, positive_in_denominator=True)
    np.testing.assert_allclose(loss, 0, atol=1e-5)

  @parameterized.parameters(
    (1, {}), (2, {'normalize': False}), (4, _FORMS[4]), (5, {}), (9, _FORMS[4])
  )
  def test_chunks_change_nothing(self, chunk, kwargs):
    x, p, labels = _inputs()
    x[2] = np.nan
    where = np.arange(7) != 2
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      _compiled(proxy_chunk=chunk, **kwargs)(x, p, labels, where)[:2],
      _compiled(**kwargs)(x, p, labels, where)[:2],
    )

  def test_chunks_never_hold_all_similarities(self):
    shapes = (64, 8), (4096, 8)

    def total(x, p):
      labels = np.arange(64)
      return proxy_nca_loss(x, p, labels, proxy_chunk=128).sum()

    memory = (
      jax.jit(jax.grad(total, (0, 1)))
      .lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
      .compile()
      .memory_analysis()
    )
    # float32 [64, 4096] would take 2^20 bytes.
    self.assertLess(memory.temp_size_in_bytes, 2**19)

  def test_proxy_nca_pp_is_the_softmax_form(self):
    inputs = _inputs()
    np.testing.assert_array_equal(
      proxy_nca_pp_loss(*inputs, temperature=0.5),
      proxy_nca_loss(*inputs, temperature=0.5, positive_in_denominator=True),
    )


_fractional = _keywords('temperature')(fractional_proxy_nca_loss)


class FractionalProxyNcaLossTest(absltest.TestCase):
  def test_values_by_hand(self):
    # Squared distances 0, 2, 4 and 2 to the proxies. Class 0 has the second and
    # the third, and its nearest is the second; class 1 has the first.
    x = np.array([[1.0, 0.0], [1.0, 0.0]])
    proxies = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    loss = _fractional(
      x,
      proxies,
      np.array([0, 1]),
      assignment=np.array([[1, 2], [0, 0]]),
      temperature=1.0,
    )
    others = 1 + np.exp(-2), 2 * np.exp(-2) + np.exp(-4)
    np.testing.assert_allclose(
      loss, [2 + np.log(others[0]), np.log(others[1])], rtol=1e-6
    )

  def test_one_proxy_per_class_is_proxy_nca(self):
    inputs = _inputs()
    np.testing.assert_allclose(
      _fractional(*inputs, assignment=np.arange(5)[:, None]),
      _nca(*inputs),
      rtol=1e-5,
      atol=1e-6,
    )

  def test_a_class_with_all_proxies_is_an_error(self):
    x, p, labels = _inputs(num_proxies=1)
    with self.assertRaisesRegex(ValueError, 'must be fewer'):
      fractional_proxy_nca_loss(x, p, labels, assignment=jnp.zeros((1, 1), int))


_dynamic = _keywords('temperature')(dynamic_proxy_nca_loss)


class DynamicProxyNcaLossTest(absltest.TestCase):
  def test_value_by_hand(self):
    # The nearest proxies are the first, the first, the second and the second.
    x = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
    proxies = np.array([[2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    labels = np.array([7, 3, 3, 9])
    loss = _dynamic(x, proxies, labels, temperature=1.0)
    # The second point: 0.4 to the first proxy, which replaces its first
    # negative, and 0.8 to the second, which replaces its positive and its last
    # negative. The third point: 2 to its positive's proxy, 2 and 0 to its
    # negatives'.
    second = 0.8 + np.log(np.exp(-0.4) + np.exp(-0.8))
    third = 2 + np.log(np.exp(-2) + np.exp(0))
    np.testing.assert_allclose(loss, [0, second, third, 0], rtol=1e-6)

  def test_only_assigned_proxies_have_gradients(self):
    x, p, labels = _inputs()
    p[4] = -np.sum(x, axis=0)
    p[4] *= 0
    gradient = jax.jit(
      jax.grad(lambda p: dynamic_proxy_nca_loss(x, p, labels).sum())
    )(p)
    # A proxy at the origin has cosine 0: for each point, another is nearer.
    np.testing.assert_array_equal(gradient[4], 0)
    self.assertGreater(np.abs(gradient).max(), 0.1)


_triplet = _keywords('margin')(proxy_triplet_loss)


class ProxyTripletLossTest(absltest.TestCase):
  def test_value_by_hand(self):
    # Squared distances 2, 0, 4 and 0.8.
    x = np.array([[0.0, 1.0]])
    proxies = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.8, 0.6]])
    labels = np.array([0])
    loss = _triplet(x, proxies, labels, margin=0.5)
    np.testing.assert_allclose(loss, [(2.5 + 0 + 1.7) / 3], rtol=1e-6)

  def test_no_loss_beyond_the_margin(self):
    loss = _triplet(np.eye(3), np.eye(3), np.arange(3), margin=2.0)
    np.testing.assert_array_equal(loss, 0)

  def test_fewer_than_two_proxies_is_an_error(self):
    with self.assertRaisesRegex(ValueError, 'two proxies'):
      proxy_triplet_loss(*_inputs(num_proxies=1))


_anchor = _keywords('alpha', 'margin')(proxy_anchor_loss)


class ProxyAnchorLossTest(absltest.TestCase):
  def test_value_by_hand(self):
    # Cosines 1 and 0 to the proxies of the classes, 0 and -1 to the others.
    x = np.array([[1.0, 0.0], [-1.0, 0.0]])
    proxies = np.array([[2.0, 0.0], [0.0, 3.0], [0.0, -1.0]])
    loss = _anchor(x, proxies, np.array([0, 1]), alpha=2.0, margin=0.25)
    pulls = np.log1p(np.exp(-1.5)) + np.log1p(np.exp(0.5))
    pushes = (
      np.log1p(np.exp(-1.5)) + np.log1p(np.exp(0.5)) + np.log1p(2 * np.exp(0.5))
    )
    np.testing.assert_allclose(loss, pulls / 2 + pushes / 3, rtol=1e-6)

  def test_a_batch_without_examples_has_no_loss(self):
    loss = _anchor(*_inputs(), where=np.zeros(7, bool))
    self.assertEqual(loss, 0)


if __name__ == '__main__':
  absltest.main()
