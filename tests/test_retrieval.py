from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from absl.testing import absltest, parameterized
from sklearn import metrics as sklearn_metrics

from proxy_nca_jax import blocked, metrics, retrieval
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.retrieval import ranks as ranks_lib


def _scores(embeddings, labels, block_size=64, **kwargs):
  scores = {
    'recall@1': [],
    'recall@3': [],
    'map@r': [],
    'r_precision': [],
    'map': [],
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
  """Small integers: exact products, many ties, some duplicates."""
  rng = np.random.default_rng(seed)
  embeddings = rng.integers(-2, 3, (num_items, 3)).astype(np.float64)
  labels = rng.integers(-1, num_classes - 1, num_items) * 10
  return embeddings, labels


def _ranks(embeddings, labels, **kwargs):
  """{query: the ranks of its positives}."""
  return {
    int(query): row[row > 0].tolist()
    for queries, rows in retrieval.positive_ranks(embeddings, labels, **kwargs)
    for query, row in zip(queries, rows)
  }


def _over(num_devices):
  mesh = mesh_lib.make_mesh(jax.devices()[:num_devices])
  return {'mesh': mesh, 'axis_name': mesh_lib.AXIS}


def _with_copies(num_items=700, dim=37):
  """Copies in other classes: ties of products that are not exact."""
  rng = np.random.default_rng(0)
  embeddings = rng.normal(size=(num_items, dim)).astype(np.float32)
  embeddings[num_items // 2 :] = embeddings[: num_items // 2]
  return embeddings, rng.integers(0, num_items // 8, num_items)


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
    self.assertGreater(199, ranks_lib._MAX_COMPARED)
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
    embeddings, labels = _with_copies()
    expected = _ranks(embeddings, labels)
    for block_size in (16, 96, 128):
      actual = _ranks(embeddings, labels, block_size=block_size)
      self.assertEqual(actual, expected)

  @parameterized.product(num_devices=(1, 2, 3, 8), with_gallery=(False, True))
  def test_devices_change_no_rank(self, num_devices, with_gallery):
    embeddings, labels = _with_copies()
    kwargs = {}
    if with_gallery:
      kwargs = {'gallery': (embeddings[200:], labels[200:])}
      embeddings, labels = embeddings[:200], labels[:200]
    expected = _ranks(embeddings, labels, block_size=64, **kwargs)
    kwargs |= {'block_size': 64, **_over(num_devices)}
    self.assertEqual(_ranks(embeddings, labels, **kwargs), expected)

  @parameterized.product(
    num_devices=(0, 2), with_gallery=(False, True), with_cameras=(False, True)
  )
  def test_nearest_only_returns_the_first_rank(
    self, num_devices, with_gallery, with_cameras
  ):
    embeddings, labels = _with_ties(0, num_items=200, num_classes=40)
    cameras = np.random.default_rng(0).integers(0, 2, 200)
    kwargs = {'block_size': 64, **(_over(num_devices) if num_devices else {})}
    if with_gallery:
      kwargs['gallery'] = (embeddings[90:], labels[90:])
      embeddings, labels = embeddings[:90], labels[:90]
    if with_cameras:
      items = cameras[90:] if with_gallery else cameras
      kwargs['cameras'] = (cameras[: len(labels)], items)
    expected = {
      query: ranks[:1]
      for query, ranks in _ranks(embeddings, labels, **kwargs).items()
    }
    actual = _ranks(embeddings, labels, nearest_only=True, **kwargs)
    self.assertEqual(actual, expected)

  @parameterized.parameters(0, 2)
  def test_groups_of_few_thresholds_change_no_rank(self, num_devices):
    embeddings, labels = _with_copies()
    expected = _ranks(embeddings, labels, block_size=64)
    kwargs = {'block_size': 64, **(_over(num_devices) if num_devices else {})}
    with mock.patch.object(ranks_lib, '_MAX_THRESHOLDS', 3000):
      self.assertEqual(_ranks(embeddings, labels, **kwargs), expected)

  @parameterized.parameters(
    ([5, 6, 7, 40, 1, 1], [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]),
    ([1, 1], [range(0, 2)]),
  )
  def test_blocks_are_grouped_by_their_thresholds(self, sizes, expected):
    layout = blocked.Layout(None, None, 64, 256)
    with mock.patch.object(ranks_lib, '_MAX_THRESHOLDS', 12 * 64):
      self.assertEqual(ranks_lib._group_blocks(sizes, layout), expected)

  @parameterized.parameters(3, 64, 512)
  def test_products_are_rounded_identically_wherever_rows_lie(self, dim):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, dim)).astype(np.float32)
    products = set()
    for num_rows, num_columns in ((64, 1024), (64, 64), (192, 448)):
      rows, columns = np.tile(a, (num_rows, 1)), np.tile(b, (num_columns, 1))
      for pair in ((rows, columns), (columns, rows)):
        products |= set(np.ravel(blocked.similarities(*pair)).tolist())
    self.assertLen(products, 1)
    # Products with few queries agree with each other.
    few = blocked.similarities(np.tile(a, (16, 1)), np.tile(b, (1024, 1)))
    self.assertLen(np.unique(few), 1)

  @parameterized.product(num_devices=(0, 3), with_gallery=(False, True))
  def test_calls_of_few_blocks_change_no_rank_and_report_their_fraction(
    self, num_devices, with_gallery
  ):
    embeddings, labels = _with_copies()
    kwargs = {'block_size': 64, **(_over(num_devices) if num_devices else {})}
    if with_gallery:
      kwargs['gallery'] = (embeddings[200:], labels[200:])
      embeddings, labels = embeddings[:200], labels[:200]
    expected = _ranks(embeddings, labels, **kwargs)
    fractions = []
    with mock.patch.object(ranks_lib, '_MIN_BLOCKS', 1):
      actual = _ranks(embeddings, labels, progress=fractions.append, **kwargs)
    self.assertEqual(actual, expected)
    self.assertGreater(len(fractions), 1)
    self.assertAlmostEqual(sum(fractions), 1)

  @parameterized.parameters(True, False)
  def test_every_block_is_in_one_call(self, is_symmetric):
    for number in (1, 8, 9, 1000):
      calls = list(ranks_lib._divide_into_calls(number, is_symmetric))
      self.assertLessEqual(len(calls), 64)
      self.assertEqual(
        [block for blocks, _ in calls for block in range(*blocks)],
        [*range(number)],
      )
      self.assertAlmostEqual(sum(fraction for _, fraction in calls), 1)

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

  def test_a_duplicate_counts_by_its_label_only(self):
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


class NeighborDistancesTest(absltest.TestCase):
  def test_small_distances_are_not_rounded_away(self):
    items = np.float32([[1, 0], [1, 1e-5], [0, 1]])
    actual = retrieval.neighbor_distances(
      items[:2], items, np.array([[1, 2], [1, 0]])
    )
    np.testing.assert_allclose(actual, [[1e-5, 2**0.5], [0, 1e-5]], rtol=1e-4)


class NearestTest(parameterized.TestCase):
  @parameterized.product(
    num_devices=(0, 3), sizes=((1, 64), (5, 100), (699, 64), (300, 5000))
  )
  def test_equals_a_full_sort(self, num_devices, sizes):
    k, block_size = sizes
    kwargs = {'block_size': block_size}
    kwargs |= _over(num_devices) if num_devices else {}
    rng = np.random.default_rng(0)
    gallery = rng.integers(-2, 3, (700, 3)).astype(np.float32)
    for queries, is_self in ((gallery[:301] * 2, False), (gallery, True)):
      expected = queries @ gallery.T
      if is_self:
        np.fill_diagonal(expected, -np.inf)
      order = np.argsort(-expected, axis=1, kind='stable')[:, :k]
      similarities, indices = retrieval.nearest(
        queries, k, gallery=None if is_self else gallery, **kwargs
      )
      np.testing.assert_array_equal(indices, order)
      np.testing.assert_array_equal(
        similarities, np.take_along_axis(expected, order, axis=1)
      )

  @parameterized.parameters(0, 1, 17, 300)
  def test_any_number_of_queries_is_answered(self, num_queries):
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(num_queries, 4)).astype(np.float32)
    gallery = rng.normal(size=(150, 4)).astype(np.float32)
    similarities, indices = retrieval.nearest(queries, 3, gallery=gallery)
    expected = queries @ gallery.T
    np.testing.assert_array_equal(indices, np.argsort(-expected, axis=1)[:, :3])
    np.testing.assert_allclose(
      similarities, -np.sort(-expected, axis=1)[:, :3], rtol=1e-5
    )

  def test_k_can_be_the_number_of_items(self):
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(3, 4)), rng.normal(size=(70, 4))
    _, indices = retrieval.nearest(queries, 70, gallery=gallery)
    np.testing.assert_array_equal(
      indices, np.argsort(-queries @ gallery.T, axis=1)
    )

  def test_approximate_neighbors_reach_the_recall(self):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 8))
    _, exact = retrieval.nearest(rows, 10)
    _, found = retrieval.nearest(rows, 10, recall_target=0.8)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(exact, found)])
    self.assertGreaterEqual(recall, 0.8)

  @parameterized.parameters((0, True), (9, True), (10, False))
  def test_k_out_of_range_is_an_error(self, k, is_self):
    rows = np.eye(9)
    with self.assertRaisesRegex(ValueError, rf'k \({k}\) must be in'):
      retrieval.nearest(rows, k, gallery=None if is_self else rows)


class PairsAboveTest(parameterized.TestCase):
  @parameterized.parameters(8, 20, 2048)
  def test_equals_all_products(self, block_size):
    rng = np.random.default_rng(0)
    points = rng.integers(-2, 3, (20, 3)).astype(np.float32)
    products = np.triu(points @ points.T >= 4, 1)
    num_points, pairs = zip(
      *retrieval.pairs_above(points, 4, block_size=block_size)
    )
    # The points of a block are done at its last comparison.
    self.assertEqual(
      num_points,
      {8: (0, 0, 8, 0, 8, 4), 20: (20,), 2048: (20,)}[block_size],
    )
    self.assertLessEqual(max(map(len, pairs)), block_size**2)
    pairs = np.concatenate(pairs)
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    np.testing.assert_array_equal(pairs, np.argwhere(products))


class VerificationTest(parameterized.TestCase):
  def _case(self, seed):
    """Returns points of exact products, and of all pairs the products."""
    rng = np.random.default_rng(seed)
    num_items, num_classes = rng.integers(20, 200), rng.integers(2, 20)
    labels = rng.integers(0, num_classes, num_items)
    points = rng.normal(size=(num_classes, 3))[labels]
    points = points + rng.normal(size=points.shape)
    # Odd seeds have many ties.
    points = np.round(points * (1 if seed % 2 else 50)).astype(np.float32)
    i, j = np.triu_indices(num_items, 1)
    return points, labels, (points @ points.T)[i, j], labels[i] == labels[j]

  @parameterized.parameters(range(8))
  def test_rates_are_those_of_the_sorted_pairs(self, seed):
    points, labels, products, is_genuine = self._case(seed)
    result = retrieval.verification(
      points, labels, fmr=(0.3, 0.1, 0.01, 1e-9), block_size=64
    )
    genuine, impostor = products[is_genuine], products[~is_genuine]
    self.assertEqual(result.num_genuine, len(genuine))
    self.assertEqual(result.num_impostor, len(impostor))
    fpr, tpr, _ = sklearn_metrics.roc_curve(
      is_genuine, products, drop_intermediate=False
    )
    self.assertEqual([*result.fnmr], [0.3, 0.1, 0.01])
    for rate, fnmr in result.fnmr.items():
      self.assertAlmostEqual(fnmr, 1 - tpr[fpr <= rate].max(), 12)
      threshold = np.float32(result.thresholds[rate])
      self.assertAlmostEqual(fnmr, np.mean(genuine < threshold), 12)
      self.assertLessEqual(np.mean(impostor >= threshold), rate)
      lower = np.nextafter(threshold, np.float32(-np.inf))
      self.assertGreater(np.mean(impostor >= lower), rate)
    nearest = np.argsort(np.abs(1 - tpr - fpr))[0]
    self.assertAlmostEqual(
      result.eer, (1 - tpr[nearest] + fpr[nearest]) / 2, 12
    )
    threshold = result.eer_threshold
    self.assertAlmostEqual(
      result.eer,
      (np.mean(genuine < threshold) + np.mean(impostor >= threshold)) / 2,
      12,
    )
    for threshold, fmr, fnmr in result.curve:
      self.assertAlmostEqual(fmr, np.mean(impostor >= threshold), 12)
      self.assertAlmostEqual(fnmr, np.mean(genuine < threshold), 12)
    np.testing.assert_array_equal(result.curve[[0, -1], 1:], [[1, 0], [0, 1]])

  def test_zeros_of_either_sign_are_equal(self):
    points = np.array([[0], [0], [-1], [1]], np.float32)
    result = retrieval.verification(points, np.array([0, 1, 0, 1]), fmr=(0.5,))
    # Genuine: -0, 0. Impostor: 0, 0, -0, -1.
    self.assertEqual(result.fnmr, {0.5: 1.0})
    self.assertEqual(result.curve[:, 1].tolist(), [1, 0.75, 0])

  @parameterized.parameters(([0, 0, 0], '3 and 0'), ([0, 1, 2], '0 and 3'))
  def test_pairs_of_both_kinds_are_needed(self, labels, counts):
    with self.assertRaisesRegex(ValueError, f'there are {counts}: add items'):
      retrieval.verification(np.eye(3), np.array(labels))


if __name__ == '__main__':
  absltest.main()
