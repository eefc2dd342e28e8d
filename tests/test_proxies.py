import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax import proxies


class ProxiesTest(parameterized.TestCase):

  def test_proxies_begin_with_norms_near_one(self):
    for dim in (16, 512):
      points = proxies.init_proxies(jax.random.key(0), 200, dim)
      norms = jnp.linalg.norm(points, axis=1)
      self.assertAlmostEqual(float(jnp.mean(norms)), 1, delta=0.05)

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

  @parameterized.parameters((10, 10), (10, 4), (10, 1), (4, 10), (4, 8), (1, 3))
  def test_classes_are_spread_evenly_over_proxies(
      self, num_classes, num_proxies
  ):
    rows = np.asarray(
      proxies.random_assignment(jax.random.key(0), num_classes, num_proxies)
    )
    most = -(-num_proxies // num_classes)
    self.assertEqual(rows.shape, (num_classes, most))
    owned = [set(row.tolist()) for row in rows]
    if num_proxies <= num_classes:
      loads = np.bincount(rows[:, 0], minlength=num_proxies)
      self.assertLessEqual(loads.max() - loads.min(), 1)
    else:
      # Every proxy is of one class, and no class has two more than another.
      self.assertEqual(sum(map(len, owned)), num_proxies)
      self.assertGreaterEqual(min(map(len, owned)), most - 1)
    self.assertEqual(set.union(*owned), set(range(num_proxies)))

  def test_the_key_decides_the_assignment(self):
    first, again, other = (
      np.asarray(proxies.random_assignment(jax.random.key(seed), 50, 20))
      for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    self.assertTrue(np.any(first != other))


if __name__ == '__main__':
  absltest.main()
