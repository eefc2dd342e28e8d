import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import metrics


class RetrievalMetricsTest(absltest.TestCase):
  def test_scores_by_hand(self):
    # Three positives at ranks 1, 3 and 7: R = 3.
    ranks = np.array([[1, 3, 7], [2, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(metrics.recall_at_k(ranks, 1), [1, 0, np.nan])
    np.testing.assert_array_equal(metrics.recall_at_k(ranks, 2), [1, 1, np.nan])
    np.testing.assert_allclose(metrics.r_precision(ranks), [2 / 3, 0, np.nan])
    np.testing.assert_allclose(
      metrics.map_at_r(ranks), [(1 / 1 + 2 / 3) / 3, 0, np.nan]
    )
    np.testing.assert_array_equal(
      metrics.reciprocal_rank(ranks), [1, 1 / 2, np.nan]
    )
    np.testing.assert_allclose(
      metrics.average_precision(ranks),
      [(1 / 1 + 2 / 3 + 3 / 7) / 3, 1 / 2, np.nan],
    )

  def test_scores_of_the_k_nearest_by_hand(self):
    ranks = np.array([[1, 3, 7], [2, 0, 0], [0, 0, 0]])
    for k, precision, map_at_k in (
      (1, (1, 0), (1, 0)),
      (2, (1 / 2, 1 / 2), (1 / 2, 1 / 2)),
      (3, (2 / 3, 1 / 3), ((1 + 2 / 3) / 3, 1 / 2)),
      (8, (3 / 8, 1 / 8), ((1 + 2 / 3 + 3 / 7) / 3, 1 / 2)),
    ):
      np.testing.assert_allclose(
        metrics.precision_at_k(ranks, k), [*precision, np.nan]
      )
      np.testing.assert_allclose(
        metrics.map_at_k(ranks, k), [*map_at_k, np.nan]
      )

  def test_perfect_ranking_scores_one(self):
    ranks = np.array([[1, 2, 3, 4]])
    for score in (
      metrics.precision_at_k(ranks, 4),
      metrics.map_at_k(ranks, 2),
      metrics.map_at_k(ranks, 9),
      metrics.map_at_r(ranks),
      metrics.r_precision(ranks),
      metrics.average_precision(ranks),
    ):
      self.assertEqual(score, 1)

  def test_map_at_r_is_nan_without_positives(self):
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
      [0, 0, 0, 0, 1, 1, 1, 2, 2, 2],
      [0, 0, 1, 0, 1, 1, 2, 2, 2, 1],
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

  def test_scores_never_exceed_one(self):
    for num_classes in range(1, 50):
      labels = np.arange(1000) % num_classes
      score = metrics.normalized_mutual_information(labels, labels + 5)
      self.assertAlmostEqual(score, 1, 12)
      self.assertLessEqual(score, 1)

  # Each average gives another score here; values of scikit-learn 1.9.1.
  @parameterized.parameters(
    ([0, 0, 1, 1], [0, 1, 2, 3], 'geometric', 0.707106781186547),
    ([0, 0, 1, 1], [0, 1, 2, 3], 'max', 0.5),
    ([0, 0, 1, 1], [0, 1, 2, 3], 'min', 1),
    ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], 'geometric', 0.529540578057562),
    ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], 'max', 0.420619835714305),
    ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], 'min', 0.666666666666667),
    ([0, 0, 1, 1], [0, 0, 0, 0], 'min', 0),
    (_BOOK[0], _BOOK[1], 'geometric', 0.364624796195),
    (_BOOK[0], _BOOK[1], 'max', 0.357907537108),
    (_BOOK[0], _BOOK[1], 'min', 0.371468125746),
  )
  def test_averages(self, labels, clusters, average, expected):
    actual = metrics.normalized_mutual_information(
      list(labels), list(clusters), average=average
    )
    self.assertAlmostEqual(actual, expected, 11)

  def test_an_unknown_average_lists_the_choices(self):
    with self.assertRaisesRegex(ValueError, 'arithmetic, geometric, max, min'):
      metrics.normalized_mutual_information([0], [0], average='mean')

  def test_vectors_of_different_lengths_are_an_error(self):
    with self.assertRaisesRegex(ValueError, 'same length'):
      metrics.normalized_mutual_information([0, 1], [0])
    with self.assertRaisesRegex(ValueError, 'same length'):
      metrics.normalized_mutual_information([], [])


class ClusteringMetricsTest(parameterized.TestCase):
  def test_the_worked_example_of_the_book(self):
    labels, clusters = map(list, _BOOK)
    for score, expected in (
      (metrics.purity, 12 / 17),
      (metrics.adjusted_mutual_information, 0.260181225389),
      (metrics.adjusted_rand_index, 0.242914979757),
      (metrics.pairwise_f1, 2 * 20 / (2 * 20 + 20 + 24)),
    ):
      self.assertAlmostEqual(score(labels, clusters), expected, 12)

  def test_expected_information_is_the_mean_over_all_orders(self):
    rng = np.random.default_rng(0)
    for _ in range(10):
      n = rng.integers(2, 7)
      labels, clusters = rng.integers(0, 3, (2, n))
      expected = oracles.expected_information(labels, clusters)
      mean = (oracles.entropy(labels) + oracles.entropy(clusters)) / 2
      actual = metrics.adjusted_mutual_information(labels, clusters)
      if abs(mean - expected) > 1e-9:
        information = oracles.information(labels, clusters)
        self.assertAlmostEqual(
          actual, (information - expected) / (mean - expected), 10
        )

  def test_pairs_equal_the_count_of_each_pair(self):
    rng = np.random.default_rng(0)
    for _ in range(20):
      n = rng.integers(2, 30)
      labels, clusters = rng.integers(0, rng.integers(1, 9), (2, n))
      both, in_labels, in_clusters, total = oracles.pair_counts(
        labels, clusters
      )
      chance = in_labels * in_clusters / total
      most = (in_labels + in_clusters) / 2
      if both != in_labels or both != in_clusters:
        self.assertAlmostEqual(
          metrics.adjusted_rand_index(labels, clusters),
          (both - chance) / (most - chance),
          12,
        )
        self.assertAlmostEqual(
          metrics.pairwise_f1(labels, clusters), both / most, 12
        )

  @parameterized.parameters(1, 2, 7, 300)
  def test_renamed_clusters_score_one(self, num_parts):
    labels = np.arange(300) % num_parts
    for score in (
      metrics.adjusted_mutual_information,
      metrics.adjusted_rand_index,
      metrics.pairwise_f1,
      metrics.purity,
    ):
      self.assertAlmostEqual(score(labels, -5 * labels), 1, 12)

  def test_adjusted_scores_of_random_partitions_are_about_zero(self):
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(0, 500, (2, 5000))
    for score in (
      metrics.adjusted_mutual_information,
      metrics.adjusted_rand_index,
    ):
      self.assertBetween(score(labels, clusters), -0.01, 0.01)
    self.assertGreater(
      metrics.normalized_mutual_information(labels, clusters), 0.5
    )

  @parameterized.parameters('arithmetic', 'geometric', 'max', 'min')
  def test_one_part_against_many_scores_zero(self, average):
    labels, clusters = np.zeros(9), np.arange(9) % 4
    for score in (
      metrics.adjusted_mutual_information,
      metrics.normalized_mutual_information,
    ):
      self.assertEqual(score(labels, clusters, average=average), 0)

  def test_pairs_are_counted_exactly_beyond_float64_precision(self):
    # 10^12 pairs squared: 24 digits.
    labels = np.arange(1_500_000) // 2
    clusters = np.roll(labels, 1)
    score = metrics.adjusted_rand_index(labels, clusters)
    self.assertBetween(score, -1e-5, 0)


if __name__ == '__main__':
  absltest.main()
