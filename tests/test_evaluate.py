import numpy as np
import oracles
from absl.testing import absltest

from proxy_nca_jax import evaluate


def _evaluate(embeddings, labels, **kwargs):
  return evaluate.evaluate(
    np.asarray(embeddings, np.float32),
    np.asarray(labels),
    recall_at=(1, 4),
    kmeans_iterations=5,
    seed=0,
    **kwargs,
  )


class EvaluateTest(absltest.TestCase):

  def test_equals_the_oracle_on_the_same_similarities(self):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(60, 5)).astype(np.float32)
    labels = rng.integers(0, 9, 60)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = oracles.retrieval_scores(unit @ unit.T, labels, (1, 4))
    actual = _evaluate(embeddings, labels)
    for name in ('recall@1', 'recall@4', 'map@r', 'r_precision'):
      self.assertAlmostEqual(actual[name], expected[name], 12, name)
    self.assertBetween(actual['nmi'], 0, 1)

  def test_queries_search_a_gallery_and_cameras_are_left_out(self):
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(80, 5)).astype(np.float32)
    labels, cameras = rng.integers(0, 9, 80), rng.integers(1, 4, 80)
    is_query = rng.random(80) < 0.3
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = oracles.retrieval_scores(unit @ unit.T, labels, (1, 4), is_query)
    actual = _evaluate(embeddings, labels, is_query=is_query)
    for name in ('recall@1', 'recall@4', 'map@r', 'r_precision'):
      self.assertAlmostEqual(actual[name], expected[name], 12, name)
    self.assertEqual(actual['num_queries'], is_query.sum())
    expected = oracles.retrieval_scores(
      unit @ unit.T, labels, (1, 4), is_query, cameras
    )
    actual = _evaluate(embeddings, labels, is_query=is_query, cameras=cameras)
    self.assertAlmostEqual(actual['cmc@1'], expected['recall@1'], 12)
    self.assertAlmostEqual(actual['cmc@4'], expected['recall@4'], 12)
    self.assertAlmostEqual(actual['map'], expected['map'], 12)
    self.assertNotIn('nmi', actual)

  def test_a_query_without_match_in_the_gallery_is_in_no_mean(self):
    embeddings = [[1, 0], [0, 1], [1, 0.1], [0.1, 1], [1, 1]]
    scores = _evaluate(
      embeddings,
      [0, 7, 0, 1, 1],
      is_query=np.array([True, True, False, False, False]),
    )
    self.assertEqual(scores['num_queries'], 1)
    self.assertEqual(scores['queries_without_match'], 1)
    self.assertEqual(scores['recall@1'], 1.0)

  def test_the_length_of_an_embedding_does_not_matter(self):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(40, 5))
    lengths = 2.0 ** rng.integers(-60, 60, (40, 1))
    labels = rng.integers(0, 5, 40)
    self.assertEqual(
      _evaluate(embeddings, labels), _evaluate(embeddings * lengths, labels)
    )

  def test_the_order_of_rows_changes_no_rank_metric_by_a_bit(self):
    rng = np.random.default_rng(0)
    embeddings = np.eye(4)[rng.integers(0, 4, 50)]
    labels = rng.integers(0, 9, 50)
    order = rng.permutation(50)
    expected = _evaluate(embeddings, labels)
    actual = _evaluate(embeddings[order], labels[order])
    for name in ('recall@1', 'recall@4', 'map@r', 'r_precision'):
      self.assertEqual(actual[name], expected[name])

  def test_items_alone_in_their_class_are_counted_and_in_no_mean(self):
    # The lone item is nearest to the first: it stays in the gallery.
    embeddings = [[1, 0], [0.9, 0.5], [1, 0.1], [0, 1], [0.1, 1]]
    scores = _evaluate(embeddings, [0, 0, 7, 1, 1])
    self.assertEqual(scores['queries_without_match'], 1)
    self.assertEqual(scores['num_queries'], 4)
    self.assertEqual(scores['recall@1'], 2 / 4)
    self.assertEqual(scores['num_classes'], 3)

  def test_no_match_at_all_is_an_error(self):
    with self.assertRaisesRegex(ValueError, 'None of the 3 queries'):
      _evaluate(np.eye(3), [0, 1, 2])

  def test_no_query_at_all_is_an_error(self):
    with self.assertRaisesRegex(ValueError, 'no query'):
      _evaluate(np.eye(3), [0, 0, 1], is_query=np.zeros(3, bool))

  def test_embeddings_must_be_finite(self):
    with self.assertRaisesRegex(ValueError, 'not finite'):
      _evaluate([[np.nan, 1], [1, 1]], [0, 0])

  def test_masked_rows_are_dropped_and_ids_give_the_order(self):
    batches = [
      {
        'x': np.array([[2.0], [0.0]]),
        'id': np.array([2, 0]),
        'mask': np.array([True, True]),
      },
      {
        'x': np.array([[1.0], [9.0]]),
        'id': np.array([1, 3]),
        'mask': np.array([True, False]),
      },
    ]
    embeddings = evaluate.embed(lambda batch: batch['x'], batches)
    np.testing.assert_array_equal(embeddings, [[0], [1], [2]])

  def test_the_table_is_in_percent(self):
    table = evaluate.format_table(
      {
        'trained': {'recall@1': 0.5, 'count': 3},
        'raw_pixels': {'recall@1': 1.0},
      }
    )
    self.assertEqual(
      table.splitlines(),
      ['            recall@1', 'trained        50.00', 'raw pixels    100.00'],
    )


if __name__ == '__main__':
  absltest.main()
