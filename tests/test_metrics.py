import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import metrics


class RetrievalMetricsTest(absltest.TestCase):

  def test_scores_by_hand(self):
    # Three positives at ranks 1, 3 and 7: R = 3.
    ranks = np.array([[1, 3, 7], [2, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(
      metrics.recall_at_k(ranks, 1), [1, 0, np.nan]
    )
    np.testing.assert_array_equal(
      metrics.recall_at_k(ranks, 2), [1, 1, np.nan]
    )
    np.testing.assert_allclose(metrics.r_precision(ranks), [2 / 3, 0, np.nan])
    np.testing.assert_allclose(
      metrics.map_at_r(ranks), [(1 / 1 + 2 / 3) / 3, 0, np.nan]
    )
    np.testing.assert_allclose(
      metrics.average_precision(ranks),
      [(1 / 1 + 2 / 3 + 3 / 7) / 3, 1 / 2, np.nan],
    )

  def test_perfect_ranking_scores_one(self):
    ranks = np.array([[1, 2, 3, 4]])
    for score in (
      metrics.map_at_r(ranks),
      metrics.r_precision(ranks),
      metrics.average_precision(ranks),
    ):
      self.assertEqual(score, 1)

  def test_map_at_r_leaves_out_queries_without_positives(self):
    ranks = np.array([[1], [0]])
    self.assertEqual(np.nanmean(metrics.map_at_r(ranks)), 1)


# Manning et al., Introduction to Information Retrieval, figure 16.4.
_BOOK = ('xxxxxoxoooodxxddd', '00000011111122222')


class MutualInformationTest(parameterized.TestCase):

  @parameterized.parameters(
    ([0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1], 1),
    ([0, 0, 1, 1], [0, 0, 0, 0], 0),
    ([0, 0, 1, 1], [0, 1, 2, 3], 0.666666666666667),
    ([0, 0, 1, 1], [0, 1, 0, 1], 0),
    ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], 0.515803742979389),
    (
      [0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 1, 2, 2, 2, 1],
      0.442701283346050,
    ),
    ([0, 0, 0], [0, 0, 0], 1),
    ([ord(c) for c in _BOOK[0]], [ord(c) for c in _BOOK[1]], 0.364561771857),
  )
  def test_equals_scikit_learn_1_9_1(self, labels, clusters, expected):
    self.assertAlmostEqual(
      metrics.normalized_mutual_information(labels, clusters), expected, 12
    )

  def test_equals_the_definition_on_random_partitions(self):
    rng = np.random.default_rng(0)
    for _ in range(20):
      n = rng.integers(1, 60)
      labels = rng.integers(-3, 5, n)
      clusters = rng.integers(0, rng.integers(1, 10), n)
      actual = metrics.normalized_mutual_information(labels, clusters)
      expected = oracles.normalized_mutual_information(labels, clusters)
      self.assertAlmostEqual(actual, expected, 12)

  def test_a_score_is_never_outside_of_its_range(self):
    for num_classes in range(1, 50):
      labels = np.arange(1000) % num_classes
      score = metrics.normalized_mutual_information(labels, labels + 5)
      self.assertAlmostEqual(score, 1, 12)
      self.assertLessEqual(score, 1)

  def test_vectors_of_different_lengths_are_an_error(self):
    with self.assertRaisesRegex(ValueError, 'one length'):
      metrics.normalized_mutual_information([0, 1], [0])
    with self.assertRaisesRegex(ValueError, 'one length'):
      metrics.normalized_mutual_information([], [])


if __name__ == '__main__':
  absltest.main()
