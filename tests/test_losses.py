"""What holds for every loss, each against its oracle."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import losses

_BATCH, _CLASSES, _DIM = 8, 5, 4

# The losses, with arguments that reach every branch and keep them curved.
_CASES = (
  ('proxy_anchor', {}),
  ('proxy_anchor', {'alpha': 2.0, 'margin': 0.3}),
  ('proxy_nca', {'temperature': 1.0}),
)


def _points(name, rng):
  """The arrays of a loss that have gradients: embeddings, maybe proxies."""
  shapes = [(_BATCH, _DIM), (_CLASSES, _DIM)]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _labels(rng):
  """Two examples of one class, three of another, and three alone."""
  return rng.permutation([0, 0, 1, 1, 1, 2, 3, 4]).astype(np.int32)


def _inputs(name, seed=0):
  rng = np.random.default_rng(seed)
  return _points(name, rng), _labels(rng)


def _value_and_gradients(name, points, labels, **kwargs):
  def total(points):
    return jnp.sum(losses.LOSSES[name](*points, labels, **kwargs))

  return jax.value_and_grad(total)([jnp.asarray(x) for x in points])


class LossesTest(parameterized.TestCase):

  def test_every_loss_is_tested(self):
    self.assertEqual({name for name, _ in _CASES}, set(losses.LOSSES))

  @parameterized.parameters(*_CASES)
  def test_equals_the_oracle(self, name, kwargs):
    oracle = getattr(oracles, losses.LOSSES[name].__name__)
    for seed in range(3):
      points, labels = _inputs(name, seed)
      actual = losses.LOSSES[name](*points, labels, **kwargs)
      self.assertEqual(actual.dtype, jnp.float32)
      np.testing.assert_allclose(
        actual, oracle(*points, labels, **kwargs), rtol=2e-5, atol=2e-5
      )

  @parameterized.parameters(*_CASES)
  def test_gradients_equal_differences_of_the_oracle(self, name, kwargs):
    oracle = getattr(oracles, losses.LOSSES[name].__name__)
    points, labels = _inputs(name)
    _, gradients = _value_and_gradients(name, points, labels, **kwargs)
    for place, actual in enumerate(gradients):

      def total(x, place=place):
        moved = [*points[:place], x, *points[place + 1 :]]
        return np.sum(oracle(*moved, labels, **kwargs))

      expected = oracles.gradient(total, points[place])
      np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3)
      self.assertGreater(np.abs(expected).max(), 0.01)

  @parameterized.parameters(*losses.LOSSES)
  def test_jit_agrees_with_the_plain_call(self, name):
    points, labels = _inputs(name)
    loss = losses.LOSSES[name]
    np.testing.assert_allclose(
      jax.jit(loss)(*points, labels), loss(*points, labels),
      rtol=1e-5, atol=1e-5,
    )

  @parameterized.parameters(*_CASES)
  def test_rows_that_do_not_count_might_not_be_there(self, name, kwargs):
    points, labels = _inputs(name)
    where = np.arange(_BATCH) != 3
    kept = [points[0][where], *points[1:]]
    expected, expected_gradients = _value_and_gradients(
      name, kept, labels[where], **kwargs
    )
    points[0][3], labels[3] = np.nan, -1
    actual, gradients = _value_and_gradients(
      name, points, labels, where=where, **kwargs
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradients[0][3], 0)
    gradients[0] = gradients[0][where]
    for a, b in zip(gradients, expected_gradients):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

  @parameterized.product(
    name=tuple(losses.LOSSES),
    batch=('one class', 'all classes', 'alike', 'zeros', 'one', 'none'),
  )
  def test_degenerate_batches_are_finite(self, name, batch):
    points, labels = _inputs(name)
    where = np.ones(_BATCH, bool)
    if batch == 'one class':
      labels[:] = 1
    elif batch == 'all classes':
      labels = np.arange(_CLASSES)
      points[0] = points[0][:_CLASSES]
      where = where[:_CLASSES]
    elif batch == 'alike':
      points = [0 * x + 1 for x in points]
    elif batch == 'zeros':
      points = [0 * x for x in points]
    elif batch == 'one':
      where = np.arange(_BATCH) == 2
    else:
      where[:] = False
    value, gradients = _value_and_gradients(name, points, labels, where=where)
    self.assertTrue(np.isfinite(value))
    for gradient in gradients:
      self.assertTrue(np.all(np.isfinite(gradient)))

  @parameterized.parameters(*losses.LOSSES)
  def test_half_precision_is_computed_in_float32(self, name):
    points, labels = _inputs(name)
    points = [jnp.asarray(x, jnp.bfloat16) for x in points]
    actual = losses.LOSSES[name](*points, labels)
    self.assertEqual(actual.dtype, jnp.float32)
    points = [x.astype(jnp.float32) for x in points]
    np.testing.assert_array_equal(actual, losses.LOSSES[name](*points, labels))

  @parameterized.parameters(*losses.LOSSES)
  def test_a_label_without_a_proxy_is_an_error_or_traced_nan(self, name):
    points, labels = _inputs(name)
    labels[2] = _CLASSES
    loss = losses.LOSSES[name]
    with self.assertRaisesRegex(ValueError, r'5.*\[0, 5\)'):
      loss(*points, labels)
    is_nan = np.isnan(jax.jit(loss)(*points, labels))
    np.testing.assert_array_equal(
      is_nan, np.arange(_BATCH) == 2 if is_nan.ndim else True
    )

  @parameterized.parameters(*losses.LOSSES)
  def test_arguments_after_the_arrays_are_named(self, name):
    parameters = inspect.signature(losses.LOSSES[name]).parameters
    positional = [
      p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY
    ]
    self.assertIn(
      positional,
      (['embeddings', 'proxies', 'labels'], ['embeddings', 'labels']),
    )
    self.assertIn('where', parameters)


if __name__ == '__main__':
  absltest.main()
