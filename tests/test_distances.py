import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.test_util import check_grads

from proxy_nca_jax import distances


def _rows(seed: int, num_rows: int, dim: int = 5) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.standard_normal((num_rows, dim)).astype(np.float32)


class ProjectionsTest(parameterized.TestCase):
  def test_projections_worked_out_by_hand(self):
    x = jnp.array([[3.0, 4.0], [0.0, 2.0]])
    y = jnp.array([[2.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(
      distances.projections(x, y), [[3, 5, 0], [0, 1.6, 0]], rtol=1e-6
    )

  @parameterized.parameters(1e-30, 1e-5, 1.0, 1e5, 1e30)
  def test_values_and_gradients_are_those_of_unit_rows(self, scale):
    x, y, weights = _rows(0, 4), _rows(1, 7), _rows(2, 4, dim=7)
    y *= np.float32(scale)
    y[3] = 0

    def value_and_grad(fn):
      return jax.value_and_grad(
        lambda x, y: jnp.sum(weights * jnp.sin(fn(x, y))), (0, 1)
      )(x, y)

    values, gradients = zip(
      value_and_grad(distances.projections),
      value_and_grad(
        lambda x, y: distances.products(x, distances.unit_norm(y))
      ),
    )
    np.testing.assert_allclose(*values, rtol=1e-5)
    for ours, expected in zip(*gradients):
      # The gradient of y is of the size of 1 / y, but for the zero row.
      np.testing.assert_allclose(
        np.delete(ours, 3, axis=0),
        np.delete(expected, 3, axis=0),
        rtol=1e-4,
        atol=1e-5 * np.abs(np.delete(expected, 3, axis=0)).max(),
      )
      np.testing.assert_allclose(ours[3], expected[3], rtol=1e-4, atol=1e-6)

  def test_both_modes_and_orders_of_differentiation(self):
    check_grads(
      distances.projections,
      (_rows(0, 4), 1 + _rows(1, 3)),
      order=2,
      atol=0.05,
      rtol=0.05,
      eps=1e-2,
    )


if __name__ == '__main__':
  absltest.main()
