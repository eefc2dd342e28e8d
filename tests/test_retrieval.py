import jax.numpy as jnp
import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import metrics, retrieval


def _scores(embeddings, labels, block_size=64, **kwargs):
  scores = {
    'recall@1': [], 'recall@3': [], 'map@r': [], 'r_precision': [], 'map': []
  }
  for _, ranks in retrieval.positive_ranks(
    jnp.asarray(embeddings, jnp.float32),
    labels,
    block_size=block_size,
    **kwargs,
  ):
    scores['map'].append(metrics.average_precision(ranks))
    scores['recall@1'].append(metrics.recall_at_k(ranks, 1))
    scores['recall@3'].append(metrics.recall_at_k(ranks, 3))
    scores['map@r'].append(metrics.map_at_r(ranks))
    scores['r_precision'].append(metrics.r_precision(ranks))
  return {
    name: float(np.nanmean(np.concatenate(values)))
    for name, values in scores.items()
  }


def _with_ties(seed, num_items=41, num_classes=6):
  """Small whole numbers: exact products, many ties, some duplicates."""
  rng = np.random.default_rng(seed)
  embeddings = rng.integers(-2, 3, (num_items, 3)).astype(np.float64)
  labels = rng.integers(-1, num_classes - 1, num_items) * 10
  return embeddings, labels


class PositiveRanksTest(parameterized.TestCase):

  @parameterized.product(seed=(0, 1, 2), block_size=(7, 41, 64))
  def test_equals_the_oracle_with_ties_and_duplicates(self, seed, block_size):
    embeddings, labels = _with_ties(seed)
    expected = oracles.retrieval_scores(
      embeddings @ embeddings.T, labels, (1, 3)
    )
    actual = _scores(embeddings, labels, block_size)
    for name, value in expected.items():
      self.assertAlmostEqual(actual[name], value, 12, name)

  @parameterized.product(
    seed=(0, 1, 2), block_size=(7, 64), with_cameras=(False, True)
  )
  def test_a_gallery_equals_the_oracle(self, seed, block_size, with_cameras):
    embeddings, labels = _with_ties(seed, num_items=61)
    rng = np.random.default_rng(seed)
    is_query = rng.random(61) < 0.4
    cameras = rng.integers(1, 3, 61) if with_cameras else None
    expected = oracles.retrieval_scores(
      embeddings @ embeddings.T, labels, (1, 3), is_query, cameras
    )
    actual = _scores(
      embeddings[is_query],
      labels[is_query],
      block_size,
      gallery=(embeddings[~is_query], labels[~is_query]),
      cameras=(cameras[is_query], cameras[~is_query]) if with_cameras else None,
    )
    for name, value in expected.items():
      self.assertAlmostEqual(actual[name], value, 12, name)

  @parameterized.parameters(0, 1, 2)
  def test_cameras_without_a_gallery_equal_the_oracle(self, seed):
    embeddings, labels = _with_ties(seed)
    cameras = np.random.default_rng(seed).integers(1, 4, len(labels))
    expected = oracles.retrieval_scores(
      embeddings @ embeddings.T, labels, (1, 3), cameras=cameras
    )
    actual = _scores(embeddings, labels, 16, cameras=(cameras, cameras))
    for name, value in expected.items():
      self.assertAlmostEqual(actual[name], value, 12, name)

  @parameterized.parameters(64, 512)
  def test_classes_with_many_positives_equal_the_oracle(self, block_size):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3, 4], [200, 150, 3, 1, 40])
    self.assertGreater(199, retrieval._MAX_COMPARED)
    embeddings = rng.integers(-4, 5, (len(labels), 3)).astype(np.float64)
    similarities = embeddings @ embeddings.T
    expected = oracles.retrieval_scores(similarities, labels, (1, 3))
    actual = _scores(embeddings, labels, block_size)
    for name, value in expected.items():
      self.assertAlmostEqual(actual[name], value, 12, name)
    is_query = rng.random(len(labels)) < 0.2
    cameras = rng.integers(1, 3, len(labels))
    expected = oracles.retrieval_scores(
      similarities, labels, (1, 3), is_query, cameras
    )
    actual = _scores(
      embeddings[is_query],
      labels[is_query],
      block_size,
      gallery=(embeddings[~is_query], labels[~is_query]),
      cameras=(cameras[is_query], cameras[~is_query]),
    )
    for name, value in expected.items():
      self.assertAlmostEqual(actual[name], value, 12, name)

  def test_results_do_not_depend_on_the_block_by_a_bit(self):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(700, 37)).astype(np.float32)
    # Copies of other classes: ties of products that are not exact.
    embeddings[350:] = embeddings[:350]
    labels = rng.integers(0, 90, 700)
    expected = None
    for block_size in (16, 96, 128, 1024):
      ranks = {
        int(query): row[row > 0].tolist()
        for queries, rows in retrieval.positive_ranks(
          embeddings, labels, block_size=block_size
        )
        for query, row in zip(queries, rows)
      }
      expected = expected or ranks
      self.assertEqual(ranks, expected)

  def test_re_identification_by_hand(self):
    # The query is person 1 by camera 1. Nearest first: the same person and
    # camera (ignored), a distractor, the person by camera 2, another, camera 3.
    gallery = np.array([[5.0], [4.0], [3.0], [2.0], [1.0]])
    ((_, ranks),) = retrieval.positive_ranks(
      np.array([[1.0]]),
      np.array([1]),
      gallery=(gallery, np.array([1, 0, 1, 2, 1])),
      cameras=(np.array([1]), np.array([1, 2, 2, 1, 3])),
    )
    np.testing.assert_array_equal(ranks, [[2, 4, 0]])
    self.assertEqual(metrics.average_precision(ranks)[0], (1 / 2 + 2 / 4) / 2)

  def test_ranks_by_hand(self):
    embeddings = np.array([[3.0], [2.0], [2.0], [1.0], [0.5]])
    labels = np.array([0, 0, 1, 0, 2])
    queries, ranks = next(retrieval.positive_ranks(embeddings, labels))
    ranks = dict(zip(queries.tolist(), ranks.tolist()))
    # Query 0 sees 2 (positive) and 2 (negative) tie: the negative goes first.
    self.assertEqual(ranks[0], [2, 3])
    self.assertEqual(ranks[1], [1, 3])
    self.assertEqual(ranks[3], [1, 3])
    self.assertEqual(ranks[2], [0, 0])
    self.assertEqual(ranks[4], [0, 0])

  def test_a_copy_counts_by_its_label_alone(self):
    embeddings = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    self.assertEqual(_scores(embeddings, np.array([0, 0, 1, 1]))['recall@1'], 1)
    self.assertEqual(_scores(embeddings, np.array([0, 1, 1, 0]))['recall@1'], 0)

  def test_the_order_of_rows_does_not_matter(self):
    embeddings, labels = _with_ties(5)
    order = np.random.default_rng(0).permutation(len(labels))
    expected = _scores(embeddings, labels)
    actual = _scores(embeddings[order], labels[order])
    for name, value in expected.items():
      self.assertAlmostEqual(actual[name], value, 12, name)

  def test_every_item_is_a_query_once(self):
    embeddings, labels = _with_ties(1)
    blocks = retrieval.positive_ranks(embeddings, labels, block_size=6)
    queries = np.concatenate([queries for queries, _ in blocks])
    np.testing.assert_array_equal(np.sort(queries), np.arange(len(labels)))

  @parameterized.parameters(1, 5)
  def test_one_class_is_perfect(self, num_items):
    embeddings = np.arange(num_items, dtype=np.float32)[:, None]
    _, ranks = next(
      retrieval.positive_ranks(embeddings, np.zeros(num_items, int))
    )
    expected = np.tile(np.arange(1, num_items), (num_items, 1))
    if num_items == 1:
      expected = [[0]]
    np.testing.assert_array_equal(ranks, expected)

  def test_classes_of_very_different_sizes(self):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], [50, 2, 1, 7])
    embeddings = rng.integers(-9, 10, (60, 4)).astype(np.float64)
    expected = oracles.retrieval_scores(
      embeddings @ embeddings.T, labels, (1, 3)
    )
    actual = _scores(embeddings, labels, 16)
    for name, value in expected.items():
      self.assertAlmostEqual(actual[name], value, 12, name)


if __name__ == '__main__':
  absltest.main()
