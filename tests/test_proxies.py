import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax import proxies, proxy_nca_loss


class ProxiesTest(parameterized.TestCase):
  def test_initial_norms_are_about_the_given_one(self):
    for dim in (16, 512):
      points = proxies.init_proxies(jax.random.key(0), 200, dim)
      norms = jnp.linalg.norm(points, axis=1)
      self.assertAlmostEqual(float(jnp.mean(norms)), 1, delta=0.05)
      # A norm of sqrt(dim) / 8 means a standard deviation of 1 / 8.
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

  def test_ties_go_to_the_lower_index(self):
    points = jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
    nearest = proxies.nearest_proxies(jnp.array([[1.0, 0.0]]), points)
    self.assertEqual(nearest, 1)

  @parameterized.parameters((10, 10), (10, 4), (10, 1), (4, 10), (4, 8), (1, 3))
  def test_proxies_are_assigned_evenly(self, num_classes, num_proxies):
    rows = np.asarray(
      proxies.random_assignment(jax.random.key(0), num_classes, num_proxies)
    )
    k = -(-num_proxies // num_classes)
    self.assertEqual(rows.shape, (num_classes, k))
    assigned = [set(row.tolist()) for row in rows]
    if num_proxies <= num_classes:
      loads = np.bincount(rows[:, 0], minlength=num_proxies)
      self.assertLessEqual(loads.max() - loads.min(), 1)
    else:
      # No proxy is shared, and the numbers per class differ by at most 1.
      self.assertEqual(sum(map(len, assigned)), num_proxies)
      self.assertGreaterEqual(min(map(len, assigned)), k - 1)
    self.assertEqual(set.union(*assigned), set(range(num_proxies)))

  def test_the_key_decides_the_assignment(self):
    first, again, other = (
      np.asarray(proxies.random_assignment(jax.random.key(seed), 50, 20))
      for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    self.assertTrue(np.any(first != other))


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _squared(x, y):
  return np.sum((x - y) ** 2, axis=-1)


class BySizeTest(parameterized.TestCase):
  def test_by_hand(self):
    # 9 for one proxy, then 4.5, then 3: the third of class 1 comes before the
    # second of class 2, which has 2.
    np.testing.assert_array_equal(
      proxies.assignment_by_size(np.array([1, 9, 2]), 5),
      [[0, 0, 0], [1, 2, 3], [4, 4, 4]],
    )

  @parameterized.parameters(40, 57, 200)
  def test_moving_a_proxy_never_lowers_the_examples_per_proxy(
    self, num_proxies
  ):
    sizes = np.random.default_rng(0).integers(1, 100, 40)
    assignment = proxies.assignment_by_size(sizes, num_proxies)
    counts = np.array([len(set(row)) for row in assignment.tolist()])
    self.assertEqual(counts.sum(), num_proxies)
    np.testing.assert_array_equal(np.unique(assignment), np.arange(num_proxies))
    # Without its last proxy, a class would have the most examples per proxy.
    several = counts > 1
    if several.any():
      self.assertGreaterEqual(
        np.min(sizes[several] / (counts[several] - 1)), np.max(sizes / counts)
      )

  def test_fewer_proxies_than_classes_is_an_error(self):
    with self.assertRaisesRegex(
      ValueError, r'num_proxies \(3\) must be at least .* \(4\)'
    ):
      proxies.assignment_by_size(np.ones(4, int), 3)


class BoundsTest(parameterized.TestCase):
  def test_error_by_hand(self):
    x = np.array([[2.0, 0.0], [0.0, 3.0], [0.6, 0.8]])
    p = np.array([[5.0, 0.0], [0.0, 1.0]])
    for kwargs, expected in (
      ({}, 0.4),
      ({'labels': np.array([0, 1, 0])}, 0.8),
      ({'labels': np.array([1, 1, 0]), 'where': np.arange(3) > 0}, 0.8),
      ({'labels': np.array([1, 1, 0])}, 2),
      ({'where': np.zeros(3, bool)}, 0),
    ):
      error = proxies.proxy_approximation_error(x, p, **kwargs)
      np.testing.assert_allclose(error, expected, rtol=1e-6)

  @parameterized.product(spread=(0.0, 0.1, 0.5, 2.0), temperature=(1 / 9, 1.0))
  def test_losses_of_points_do_not_exceed_the_bounds(self, spread, temperature):
    rng = np.random.default_rng(0)
    p = _unit(rng.normal(size=(6, 3)))
    # Four points of each class around its proxy.
    points = p[:, None] + spread * rng.normal(size=(6, 4, 3)) / np.sqrt(3)
    points = _unit(points)
    rows, labels = points.reshape(24, 3), np.repeat(np.arange(6), 4)
    error = proxies.proxy_approximation_error(rows, p, labels)
    losses = proxy_nca_loss(rows, p, labels, temperature=temperature)
    bounds = np.asarray(losses + 4 * jnp.sqrt(error) / temperature)
    wrong = []
    for index, (x, label) in enumerate(zip(rows, labels)):
      others = np.delete(points, label, axis=0)
      for y in points[label]:
        for column in range(4):
          far = -_squared(x, others[:, column]) / temperature
          nca = _squared(x, y) / temperature + np.log(np.exp(far).sum())
          self.assertLessEqual(nca, bounds[index] + 1e-4)
        wrong.append(np.mean(_squared(x, y) >= _squared(x, others)))
    bound = proxies.ranking_bound(rows, p, labels, error)
    self.assertLessEqual(np.mean(wrong), bound + 1e-6)
    if spread < 0.2:
      self.assertLess(bound, 1)

  def test_the_slack_is_attained(self):
    # x at 0 degrees; y and z at right angles, their proxies off by 2 delta.
    delta = np.radians(10)

    def at(angle):
      return np.array([np.cos(angle), np.sin(angle)])

    x, y, z = at(0), at(np.pi / 2 + delta), at(-np.pi / 2 + delta)
    p = np.stack([at(np.pi / 2 - delta), at(-np.pi / 2 - delta)])
    labels = np.array([0, 1])
    error = proxies.proxy_approximation_error(np.stack([y, z]), p, labels)
    difference = _squared(x, y) - _squared(x, z)
    of_proxies = _squared(x, p[0]) - _squared(x, p[1])
    np.testing.assert_allclose(
      difference, of_proxies + 4 * np.sqrt(error), rtol=1e-5
    )
    # The proxies are in the right order, the points in the wrong one.
    self.assertLess(of_proxies, 0)
    self.assertGreater(difference, 0)
    self.assertEqual(proxies.ranking_bound(x[None], p, labels[:1], error), 1)
    self.assertEqual(proxies.ranking_bound(x[None], p, labels[:1], 0), 0)

  def test_masked_rows_are_ignored(self):
    x, p = np.eye(2), np.eye(2)
    labels = np.array([0, 0])
    for where in ([True, False], [False, False]):
      bound = proxies.ranking_bound(x, p, labels, 0.0, where=np.array(where))
      self.assertEqual(bound, 0)
    self.assertEqual(proxies.ranking_bound(x, p, labels, 0.0), 0.5)


if __name__ == '__main__':
  absltest.main()
