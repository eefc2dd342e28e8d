import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from proxy_nca_jax import proxies


class ProxiesTest(absltest.TestCase):

  def test_proxies_begin_with_norms_near_the_asked_one(self):
    for dim in (16, 512):
      points = proxies.init_proxies(jax.random.key(0), 200, dim)
      norms = jnp.linalg.norm(points, axis=1)
      self.assertAlmostEqual(float(jnp.mean(norms)), 1, delta=0.05)
      # As normals divided by 8 have, in 64 and in 2048 dimensions.
      scaled = proxies.init_proxies(
        jax.random.key(0), 200, dim, norm=dim**0.5 / 8
      )
      self.assertAlmostEqual(float(jnp.std(scaled)), 1 / 8, delta=0.005)

  def test_nearest_proxy_is_the_nearest_on_the_sphere(self):
    rng = np.random.default_rng(0)
    x, p = rng.normal(size=(50, 3)), 9 * rng.normal(size=(7, 3))
    unit_x = x / np.linalg.norm(x, axis=1, keepdims=True)
    unit_p = p / np.linalg.norm(p, axis=1, keepdims=True)
    distances = np.sum((unit_x[:, None] - unit_p[None]) ** 2, axis=2)
    np.testing.assert_array_equal(
      proxies.nearest_proxies(jnp.asarray(x), jnp.asarray(p)),
      np.argmin(distances, axis=1),
    )

  def test_the_lowest_index_wins_a_tie(self):
    points = jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
    nearest = proxies.nearest_proxies(jnp.array([[1.0, 0.0]]), points)
    self.assertEqual(nearest, 1)


if __name__ == '__main__':
  absltest.main()
