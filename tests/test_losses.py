"""Properties of all losses, and comparisons with their oracles."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import losses

_BATCH, _CLASSES, _CENTERS, _DIM = 8, 5, 3, 4

_SHAPES = {
  losses.PER_CLASS: (_CLASSES, _DIM),
  losses.MULTI_CENTER: (_CLASSES, _CENTERS, _DIM),
  losses.UNASSIGNED: (_CLASSES + 2, _DIM),
}
# Some classes have two proxies, and the last proxy has no class.
_ASSIGNMENT = np.array([[0, 0], [1, 5], [2, 2], [3, 5], [4, 4]])

# Every loss with its defaults, and with other arguments.
_CASES = tuple((name, {}) for name in losses.LOSSES) + (
  ('adaface', {'scale': 4.0, 'margin': 1.5, 'concentration': 3.0}),
  ('arcface', {'scale': 4.0, 'margin': 2.0}),
  ('circle', {'scale': 2.0, 'margin': 0.1}),
  ('facility_location', {'margin_multiplier': 3.0, 'num_refinements': 0}),
  ('magnet', {'alpha': 3.0}),
  ('multi_similarity', {'beta': 3.0, 'base': -0.2, 'epsilon': 0.5}),
  ('n_pairs', {'regularization': 0.5}),
  ('proxy_anchor', {'alpha': 2.0, 'margin': 0.3}),
  ('smooth_ap', {'temperature': 0.5}),
  ('soft_margin_triplet', {'mining': 'batch_all'}),
  ('soft_margin_triplet', {'mining': 'semi_hard'}),
  ('soft_triple', {'scale': 3.0, 'margin': 0.5, 'tau': 2.0}),
  ('triplet', {'margin': 2.0, 'mining': 'batch_all'}),
  ('triplet', {'margin': 2.0, 'mining': 'batch_hard'}),
)
_LABELS_ARE_INDICES = tuple(
  name
  for name, loss in losses.LOSSES.items()
  if loss.has_class_proxies or loss.centers or loss.has_assignment
)


def _points(name, rng):
  """The arrays to differentiate by: embeddings, and proxies if any."""
  shapes = [(_BATCH, _DIM)]
  if form := losses.LOSSES[name].proxies:
    shapes.append(_SHAPES[form])
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _constants(name):
  loss, constants = losses.LOSSES[name], {}
  if loss.centers:
    rng = np.random.default_rng(9)
    constants['centers'] = rng.normal(size=_SHAPES[loss.centers])
  if loss.has_assignment:
    constants['assignment'] = _ASSIGNMENT
  return constants


def _loss(name, **kwargs):
  return functools.partial(losses.LOSSES[name].fn, **_constants(name), **kwargs)


def _oracle(name, **kwargs):
  oracle = getattr(oracles, losses.LOSSES[name].fn.__name__)
  return functools.partial(oracle, **_constants(name), **kwargs)


@functools.cache
def _compiled(name, **kwargs):
  """(points, labels, where) -> (loss, gradients of its sum), compiled once."""
  loss = _loss(name, **kwargs)

  def total(points, labels, where):
    value = loss(*points, labels, where=where)
    return jnp.sum(value), value

  gradient = jax.jit(jax.grad(total, has_aux=True))

  def value_and_gradients(points, labels, where=None):
    where = np.ones(_BATCH, bool) if where is None else where
    gradients, value = gradient(points, labels, where)
    return value, gradients

  return value_and_gradients


def _labels(rng):
  """Classes of two, three and three times one example."""
  return rng.permutation([0, 0, 1, 1, 1, 2, 3, 4]).astype(np.int32)


def _inputs(name, seed=0):
  rng = np.random.default_rng(seed)
  return _points(name, rng), _labels(rng)


class LossesTest(parameterized.TestCase):
  def test_the_table_has_every_loss(self):
    self.assertEqual(sorted(losses.LOSSES), list(losses.LOSSES))
    for name, loss in losses.LOSSES.items():
      self.assertEqual(loss.fn.__name__, f'{name}_loss')

  @parameterized.parameters(*_CASES)
  def test_equals_the_oracle(self, name, kwargs):
    for seed in range(3):
      points, labels = _inputs(name, seed)
      actual, _ = _compiled(name, **kwargs)(points, labels)
      np.testing.assert_allclose(
        actual, _oracle(name, **kwargs)(*points, labels), rtol=2e-5, atol=2e-5
      )

  @parameterized.parameters(*_CASES)
  def test_masked_rows_have_no_effect(self, name, kwargs):
    points, labels = _inputs(name)
    where = np.arange(_BATCH) != 3
    kept, kept_labels = [points[0][where], *points[1:]], labels[where]
    points[0][3] = np.nan
    expected, _ = _compiled(name, **kwargs)(points, labels, where)
    labels[3] = -1
    actual, gradients = _compiled(name, **kwargs)(points, labels, where)
    np.testing.assert_array_equal(actual, expected)
    oracle = _oracle(name, **kwargs)
    expected = oracle(*kept, kept_labels)
    if actual.ndim:
      self.assertEqual(actual[3], 0)
      actual = actual[where]
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)

    np.testing.assert_array_equal(gradients[0][3], 0)
    gradients[0] = gradients[0][where]
    if 'at' in inspect.signature(oracle).parameters:
      # Constants of the gradient are computed from the unchanged point.
      oracle = functools.partial(oracle, at=kept[0])
    for index, gradient in enumerate(gradients):

      def total(x, index=index):
        changed = [*kept[:index], x, *kept[index + 1 :]]
        return np.sum(oracle(*changed, kept_labels))

      expected = oracles.gradient(total, kept[index])
      np.testing.assert_allclose(gradient, expected, rtol=2e-3, atol=2e-3)
      self.assertGreater(np.abs(expected).max(), 0.01)

  @parameterized.parameters(*losses.LOSSES)
  def test_masks_of_zeros_and_ones_count_as_bool(self, name):
    points, labels = _inputs(name)
    where = np.arange(_BATCH) % 3 != 0

    def trace(where):
      # Tracing computes nothing, so it is cheap, and shows every operation.
      jaxpr = jax.make_jaxpr(
        lambda points, labels: _loss(name)(*points, labels, where=where)
      )(points, labels)
      return str(jaxpr), [np.asarray(x).tolist() for x in jaxpr.consts]

    self.assertEqual(trace(where.astype(np.int32)), trace(where))
    self.assertEqual(trace(where.astype(int).tolist()), trace(where))
    for bad in (where.astype(np.float32), 2 * where.astype(np.int32)):
      with self.assertRaisesRegex(
        ValueError, 'where must be bool, or integers'
      ):
        trace(bad)

  @parameterized.product(
    name=tuple(losses.LOSSES),
    batch=('one class', 'all differ', 'equal', 'zeros', 'one', 'none'),
  )
  def test_degenerate_batches_are_finite(self, name, batch):
    points, labels = _inputs(name)
    where = np.ones(_BATCH, bool)
    if batch == 'one class':
      labels[:] = 1
    elif batch == 'all differ':
      labels, where = np.arange(_BATCH, dtype=np.int32), where & (labels < 0)
      where[:_CLASSES] = True
    elif batch == 'equal':
      points = [0 * x + 1 for x in points]
    elif batch == 'zeros':
      points = [0 * x for x in points]
    elif batch == 'one':
      where = np.arange(_BATCH) == 2
    else:
      where[:] = False
    loss, gradients = _compiled(name)(points, labels, where)
    self.assertTrue(np.all(np.isfinite(loss)))
    if batch == 'none':
      np.testing.assert_array_equal(loss, 0)
    for gradient in gradients:
      self.assertTrue(np.all(np.isfinite(gradient)))

  def test_half_precision_is_computed_in_float32(self):
    for name in losses.LOSSES:
      points, labels = _inputs(name)
      points = [jnp.asarray(x, jnp.bfloat16) for x in points]
      jaxpr = jax.make_jaxpr(_loss(name))(*points, labels)
      self.assertEqual([x.dtype for x in jaxpr.out_avals], [jnp.float32], name)
      users = {
        equation.primitive.name
        for equation in jaxpr.eqns
        if any(
          getattr(x, 'aval', x).dtype == jnp.bfloat16 for x in equation.invars
        )
      }
      # Nothing is computed from bfloat16 but its float32.
      self.assertIn('convert_element_type', users, name)
      self.assertLessEqual(users, {'convert_element_type', 'reshape'}, name)

  @parameterized.parameters(*_LABELS_ARE_INDICES)
  def test_a_label_out_of_range_is_an_error_or_nan_if_traced(self, name):
    points, labels = _inputs(name)
    labels[2] = _CLASSES
    with self.assertRaisesRegex(ValueError, r'5.*\[0, 5\)'):
      _loss(name)(*points, labels)
    loss, _ = _compiled(name)(points, labels)
    is_invalid = np.arange(_BATCH) == 2
    np.testing.assert_array_equal(
      np.isnan(loss), is_invalid if loss.ndim else True
    )

  @parameterized.parameters(*losses.LOSSES)
  def test_the_signature_agrees_with_the_table(self, name):
    loss = losses.LOSSES[name]
    parameters = inspect.signature(loss.fn).parameters
    arrays = ['embeddings', 'proxies', 'labels']
    if not loss.proxies:
      arrays.remove('proxies')
    self.assertEqual(
      arrays,
      [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY],
    )
    named = {p.name for p in parameters.values() if p.default is p.empty}
    constants = {'centers'} if loss.centers else set()
    constants |= {'assignment'} if loss.has_assignment else set()
    self.assertEqual(named - set(arrays), constants)
    self.assertIn('where', parameters)


if __name__ == '__main__':
  absltest.main()
