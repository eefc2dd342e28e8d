import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax import clustering, metrics


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

  def test_centroids_are_means_when_nothing_changes_any_more(self):
    points = jax.random.normal(jax.random.key(0), (200, 2))
    assignments, centroids, *_ = clustering.kmeans(
      points, num_clusters=6, key=jax.random.key(1), max_iterations=500
    )
    for cluster in range(6):
      members = np.asarray(points)[np.asarray(assignments) == cluster]
      np.testing.assert_allclose(
        centroids[cluster], members.mean(axis=0), rtol=1e-4, atol=1e-5
      )

  def test_separated_blobs_are_found_from_one_point_each(self):
    # With refilled clusters a bad start can stay bad; one start in ten is good.
    points, labels = _blobs()
    scores = [
      metrics.normalized_mutual_information(
        labels,
        np.asarray(
          clustering.kmeans(
            points, num_clusters=5, key=jax.random.key(seed)
          )[0]
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
    # Copies of one point win all of its equals: their clusters lose all.
    points = jnp.concatenate(
      [jnp.zeros((50, 2)), 10 + jax.random.normal(jax.random.key(0), (10, 2))]
    )
    for seed in range(5):
      assignments, *_ = clustering.kmeans(
        points, num_clusters=6, key=jax.random.key(seed), max_iterations=50
      )
      self.assertLen(np.unique(assignments), 6)

  def test_as_many_clusters_as_points_or_one(self):
    points = jax.random.normal(jax.random.key(0), (12, 3))
    key = jax.random.key(0)
    assignments, *_ = clustering.kmeans(points, num_clusters=12, key=key)
    self.assertLen(np.unique(assignments), 12)
    assignments, centroids, *_ = clustering.kmeans(points, num_clusters=1, key=key)
    np.testing.assert_array_equal(assignments, 0)
    np.testing.assert_allclose(
      centroids[0], jnp.mean(points, axis=0), atol=1e-6
    )

  @parameterized.parameters(0, 13)
  def test_an_impossible_number_of_clusters_is_an_error(self, num_clusters):
    with self.assertRaisesRegex(ValueError, 'num_clusters'):
      clustering.kmeans(
        jnp.zeros((12, 2)), num_clusters=num_clusters, key=jax.random.key(0)
      )


if __name__ == '__main__':
  absltest.main()
