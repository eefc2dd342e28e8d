from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import blocked, clustering, metrics
from proxy_nca_jax import mesh as mesh_lib


def _blobs(num_blobs=5, size=30):
  rng = np.random.default_rng(0)
  centers = 100 * np.eye(num_blobs)
  labels = np.repeat(np.arange(num_blobs), size)
  points = centers[labels] + rng.normal(size=(len(labels), num_blobs))
  return jnp.asarray(points, jnp.float32), labels


class KMeansTest(parameterized.TestCase):
  def test_assigns_each_point_to_its_nearest_centroid(self):
    points = jax.random.normal(jax.random.key(0), (200, 3))
    assignments, centroids, *_ = clustering.kmeans(
      points, num_clusters=9, key=jax.random.key(1)
    )
    distances = np.sum(
      (np.asarray(points)[:, None] - np.asarray(centroids)[None]) ** 2, axis=2
    )
    np.testing.assert_array_equal(assignments, np.argmin(distances, axis=1))

  def test_centroids_are_means_after_convergence(self):
    points = jax.random.normal(jax.random.key(0), (200, 2))
    assignments, centroids, *_ = clustering.kmeans(
      points, num_clusters=6, key=jax.random.key(1), max_iterations=500
    )
    for cluster in range(6):
      members = np.asarray(points)[np.asarray(assignments) == cluster]
      np.testing.assert_allclose(
        centroids[cluster], members.mean(axis=0), rtol=1e-4, atol=1e-5
      )

  def test_separated_blobs_are_found_from_random_points(self):
    # Lloyd's algorithm can end in a local optimum; one of ten runs does not.
    points, labels = _blobs()
    scores = [
      metrics.normalized_mutual_information(
        labels,
        np.asarray(
          clustering.kmeans(points, num_clusters=5, key=jax.random.key(seed))[0]
        ),
      )
      for seed in range(10)
    ]
    self.assertAlmostEqual(max(scores), 1)

  def test_the_seed_decides(self):
    points = jax.random.normal(jax.random.key(0), (300, 4))
    first, second, other = (
      clustering.kmeans(points, num_clusters=20, key=jax.random.key(seed))[0]
      for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, second)
    self.assertTrue(np.any(first != other))

  @parameterized.parameters(7, 64, 1000)
  def test_blocks_do_not_change_the_assignments(self, block_size):
    points, _ = _blobs()
    key = jax.random.key(0)
    expected, *_ = clustering.kmeans(points, num_clusters=8, key=key)
    actual, *_ = clustering.kmeans(
      points, num_clusters=8, key=key, block_size=block_size
    )
    np.testing.assert_array_equal(actual, expected)

  def test_no_cluster_stays_empty(self):
    # Of equal centroids the first gets all points; the others become empty.
    points = jnp.concatenate(
      [jnp.zeros((50, 2)), 10 + jax.random.normal(jax.random.key(0), (10, 2))]
    )
    for seed in range(5):
      assignments, *_ = clustering.kmeans(
        points, num_clusters=6, key=jax.random.key(seed), max_iterations=50
      )
      self.assertLen(np.unique(assignments), 6)

  def test_one_cluster_and_one_cluster_per_point(self):
    points = jax.random.normal(jax.random.key(0), (12, 3))
    key = jax.random.key(0)
    assignments, *_ = clustering.kmeans(points, num_clusters=12, key=key)
    self.assertLen(np.unique(assignments), 12)
    assignments, centroids, *_ = clustering.kmeans(
      points, num_clusters=1, key=key
    )
    np.testing.assert_array_equal(assignments, 0)
    np.testing.assert_allclose(
      centroids[0], jnp.mean(points, axis=0), atol=1e-6
    )

  @parameterized.parameters(1, 2, 3, 7)
  def test_skipping_unmoved_centroids_equals_all_distances(
    self, num_iterations
  ):
    points = np.random.default_rng(0).normal(size=(600, 3))
    points = points.astype(np.float32)
    actual = clustering.kmeans(
      points,
      num_clusters=80,
      init=points[:80],
      max_iterations=num_iterations,
      block_size=64,
    )
    expected = oracles.lloyd(points, points[:80], num_iterations)
    np.testing.assert_array_equal(actual.assignments, expected)
    self.assertEqual(actual.num_iterations, num_iterations)
    distances = points - np.asarray(actual.centroids)[expected]
    np.testing.assert_allclose(actual.inertia, np.sum(distances**2), rtol=1e-5)

  @parameterized.parameters('random', 'k-means++')
  def test_devices_change_nothing_and_the_best_run_is_returned(self, init):
    points = np.random.default_rng(0).normal(size=(500, 37))
    kwargs = {'num_clusters': 70, 'init': init, 'max_iterations': 5}
    key = jax.random.key(1)
    expected = clustering.kmeans(points, key=key, n_init=3, **kwargs)
    for num_devices in (2, 8):
      actual = clustering.kmeans(
        points,
        key=key,
        n_init=3,
        mesh=mesh_lib.make_mesh(jax.devices()[:num_devices]),
        axis_name=mesh_lib.AXIS,
        **kwargs,
      )
      for a, b in zip(actual, expected):
        np.testing.assert_array_equal(a, b)
    # The best of three runs from their initial centroids.
    choose = clustering._CHOOSE[init]
    layout = blocked.Layout(None, None, 512, 500)
    padded = jnp.pad(jnp.asarray(points, jnp.float32), ((0, 12), (0, 0)))
    inertias = [
      clustering.kmeans(
        points, **kwargs | {'init': padded[choose(padded, k, 70, layout)]}
      ).inertia
      for k in jax.random.split(key, 3)
    ]
    self.assertEqual(expected.inertia, min(inertias))

  def test_the_order_of_points_does_not_change_a_mean_by_a_bit(self):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(999, 5)) * 10.0 ** rng.integers(-3, 4, (999, 1))
    points = points.astype(np.float32)
    order = rng.permutation(999)
    first, second = (
      clustering.kmeans(rows, num_clusters=9, init=points[:9])
      for rows in (points, points[order])
    )
    np.testing.assert_array_equal(first.centroids, second.centroids)
    np.testing.assert_array_equal(
      np.asarray(first.assignments)[order], second.assignments
    )

  def test_k_means_plus_plus_draws_by_squared_distance(self):
    # 5 centroids need a round of several draws, and so rejections.
    points = np.array([[0.0], [1.0], [1.5], [4.0], [8.0], [8.1]])
    layout = blocked.Layout(None, None, 64, 6)
    padded = jnp.pad(jnp.asarray(points, jnp.float32), ((0, 58), (0, 0)))
    num_draws = 5_000
    draws = jax.jit(
      jax.vmap(lambda key: clustering._choose_plus_plus(padded, key, 5, layout))
    )(jax.random.split(jax.random.key(0), num_draws))
    numbers = [6**i for i in range(5)]
    found = np.bincount(np.asarray(draws) @ numbers, minlength=6**5) / num_draws
    expected = np.zeros(6**5)
    for chosen, chance in oracles.plus_plus(points, 5).items():
      expected[np.dot(chosen, numbers)] = chance
    self.assertTrue(np.all(found[expected == 0] == 0))
    bound = 5 * np.sqrt(expected / num_draws) + 3 / num_draws
    self.assertTrue(np.all(np.abs(found - expected) <= bound))

  def test_full_rounds_draw_distinct_points(self):
    points = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    layout = blocked.Layout(None, None, 64, 60)
    with mock.patch.object(clustering, '_ROUND', 4):
      indices = clustering._choose_plus_plus(
        jnp.asarray(points), jax.random.key(0), 50, layout
      )
    self.assertLen(np.unique(indices), 50)
    self.assertBetween(np.min(indices), 0, 59)
    self.assertBetween(np.max(indices), 0, 59)

  def test_k_means_plus_plus_finds_separated_blobs(self):
    points, labels = _blobs()
    for seed in range(3):
      clusters = clustering.kmeans(
        points, num_clusters=5, key=jax.random.key(seed), init='k-means++'
      )
      score = metrics.normalized_mutual_information(
        labels, clusters.assignments
      )
      self.assertAlmostEqual(score, 1)

  def test_more_clusters_than_distinct_points(self):
    clusters = clustering.kmeans(
      jnp.ones((40, 3)),
      num_clusters=7,
      key=jax.random.key(0),
      init='k-means++',
      max_iterations=3,
    )
    self.assertEqual(clusters.inertia, 0)
    np.testing.assert_array_equal(clusters.centroids, 1)

  def test_a_tolerance_ends_a_run_earlier(self):
    points = jax.random.normal(jax.random.key(0), (500, 3))
    numbers = [
      clustering.kmeans(
        points,
        num_clusters=20,
        key=jax.random.key(1),
        max_iterations=500,
        tolerance=tolerance,
      ).num_iterations
      for tolerance in (0, 1e-2, 1)
    ]
    self.assertGreater(numbers[0], numbers[1])
    self.assertGreater(numbers[1], numbers[2])
    self.assertEqual(numbers[2], 1)

  def test_progress_reports_every_update(self):
    points = np.random.default_rng(0).normal(size=(200, 3))
    reported = []
    clusters = clustering.kmeans(
      points, num_clusters=9, key=jax.random.key(0), progress=reported.append
    )
    self.assertEqual(reported, [1] * int(clusters.num_iterations))
    self.assertNotEmpty(reported)

  def test_without_iterations_points_are_only_assigned(self):
    points = np.array([[0.0], [1.0], [5.0], [6.0]])
    clusters = clustering.kmeans(
      points, num_clusters=2, init=points[[0, 2]], max_iterations=0
    )
    np.testing.assert_array_equal(clusters.assignments, [0, 0, 1, 1])
    np.testing.assert_array_equal(clusters.centroids, [[0], [5]])
    self.assertEqual(clusters.inertia, 2)
    self.assertEqual(clusters.num_iterations, 0)

  @parameterized.parameters({'n_init': 0}, {'max_iterations': -1})
  def test_counts_out_of_range_are_errors(self, **kwargs):
    ((name, value),) = kwargs.items()
    with self.assertRaisesRegex(ValueError, rf'{name} \({value}\) must'):
      clustering.kmeans(
        jnp.zeros((12, 2)), num_clusters=2, key=jax.random.key(0), **kwargs
      )

  def test_an_unknown_init_lists_the_choices(self):
    with self.assertRaisesRegex(ValueError, "'randon'.*'random' or 'k-means"):
      clustering.kmeans(
        jnp.zeros((12, 2)),
        num_clusters=2,
        key=jax.random.key(0),
        init='randon',
      )

  @parameterized.parameters(0, 13)
  def test_num_clusters_out_of_range_is_an_error(self, num_clusters):
    with self.assertRaisesRegex(ValueError, 'num_clusters'):
      clustering.kmeans(
        jnp.zeros((12, 2)), num_clusters=num_clusters, key=jax.random.key(0)
      )


if __name__ == '__main__':
  absltest.main()
