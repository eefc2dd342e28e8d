import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax import evaluate, masks, proxies

_MASK = np.array([True, False, True, True])


class MasksTest(parameterized.TestCase):
  @parameterized.parameters(
    np.array,
    jnp.array,
    list,
    lambda mask: mask.astype(np.int8),
    lambda mask: jnp.asarray(mask, jnp.uint32),
    lambda mask: mask.astype(int).tolist(),
  )
  def test_bool_and_zeros_and_ones_become_bool(self, convert):
    mask = masks.as_mask(convert(_MASK))
    self.assertEqual(mask.dtype, bool)
    np.testing.assert_array_equal(mask, _MASK)

  def test_traced_integers_become_bool(self):
    mask = jax.jit(masks.as_mask)(_MASK.astype(np.int32))
    np.testing.assert_array_equal(mask, _MASK, strict=True)

  @parameterized.parameters(
    ([0.0, 1.0], 'got float64'),
    (jnp.ones(2, jnp.bfloat16), 'got bfloat16'),
    ([0, 2], 'got int64 with other values'),
    (jnp.array([-1, 1]), 'got int32 with other values'),
    (['yes', 'no'], 'got <U3'),
    ([None, True], 'got object'),
  )
  def test_other_masks_are_refused(self, mask, expected):
    with self.assertRaisesRegex(
      ValueError, f'^keep must be bool, or integers 0 and 1; {expected}'
    ):
      masks.as_mask(mask, name='keep')

  def test_the_bounds_of_proxies_and_the_scores_take_the_same_masks(self):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3)).astype(np.float32)
    labels, mask = np.array([0, 1, 0, 1]), _MASK.astype(np.int32)
    functions = (
      lambda where: proxies.proxy_approximation_error(x, x[:2], where=where),
      lambda where: proxies.ranking_bound(x, x[:2], labels, 0.1, where=where),
      lambda where: evaluate.score(
        x, labels, is_query=where, kmeans_iterations=0
      )['mrr'],
    )
    for function in functions:
      np.testing.assert_array_equal(function(mask), function(_MASK))
      with self.assertRaisesRegex(ValueError, 'got float32'):
        function(mask.astype(np.float32))


if __name__ == '__main__':
  absltest.main()
