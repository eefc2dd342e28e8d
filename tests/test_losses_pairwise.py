import jax
import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import losses

# A program per loss and shape, instead of one per operation.
_contrastive, _n_pairs, _lifted_structure, _multi_similarity = map(
  jax.jit,
  (
    losses.contrastive_loss,
    losses.n_pairs_loss,
    losses.lifted_structure_loss,
    losses.multi_similarity_loss,
  ),
)
_triplet = jax.jit(losses.triplet_loss, static_argnames='mining')
_facility = jax.jit(
  losses.facility_location_loss, static_argnames='num_refinements'
)

# Points on a line: distances are differences.
_LINE = np.array([[0.0], [1.0], [3.0], [7.0]], np.float32)
_PAIR_AND_TWO = np.array([5, 5, 2, 9], np.int32)


class PairwiseTest(parameterized.TestCase):
  def test_contrastive_by_hand(self):
    loss = _contrastive(_LINE, _PAIR_AND_TWO, margin=4.0)
    # The pair at 1; negatives at 3, 7, 2, 6 and 4.
    np.testing.assert_allclose(loss, (1 + 1 + 4) / 2 / 6, rtol=1e-6)

  @parameterized.parameters(
    # Squared distances: 1 between the pair; 9 and 49 from its first example to
    # the negatives, 4 and 36 from its second. With a margin of 4 only one
    # triplet has a loss, of 1.
    ('batch_all', 4.0, 1.0),
    ('batch_hard', 4.0, (0 + 1) / 2),
    ('semi_hard', 4.0, (0 + 1) / 2),
    ('batch_all', 40.0, (32 + 37 + 5) / 3),
    ('batch_hard', 40.0, (32 + 37) / 2),
    ('semi_hard', 40.0, (32 + 37) / 2),
  )
  def test_triplet_by_hand(self, mining, margin, expected):
    # The loss has the unit of squared distances.
    for scale in (1, 0.1):
      loss = _triplet(
        scale * _LINE, _PAIR_AND_TWO, margin=scale**2 * margin, mining=mining
      )
      np.testing.assert_allclose(loss, scale**2 * expected, rtol=1e-4)

  def test_semi_hard_skips_negatives_nearer_than_the_positive(self):
    x = np.array([[0.0], [2.0], [1.0], [3.0]], np.float32)
    labels = np.array([0, 0, 1, 2])
    # Distances from 0: 2 to the positive, 1 and 3 to the negatives, of which
    # the farther is selected. From 2: both negatives are at 1, nearer than the
    # positive, so the farthest negative is selected.
    loss = _triplet(x, labels, margin=0.5)
    np.testing.assert_allclose(loss, (0 + (4 + 0.5 - 1)) / 2, rtol=1e-6)

  def test_semi_hard_skips_negatives_as_near_as_the_positive(self):
    x = np.array([[0.0], [1.0], [-1.0], [3.0]], np.float32)
    # From 0 the positive and a negative are at 1; the next negative is at 3.
    loss = _triplet(x, np.array([0, 0, 1, 2]), margin=0.5)
    np.testing.assert_array_equal(loss, 0)

  @parameterized.parameters(
    ('contrastive', 1.0, 5),
    # Far beyond the distances, so that every pair has a loss.
    ('lifted_structure', 20.0, 4),
  )
  def test_examples_that_coincide_lose_no_digits(self, name, margin, last):
    loss, oracle = (
      getattr(module, f'{name}_loss') for module in (losses, oracles)
    )
    # A positive and a negative pair coincide; the last one is very near.
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    x[1], x[5], x[7] = x[0], x[4], x[6] + np.float32(1e-3)
    labels, arguments = (
      np.array([0, 0, 1, 1, 2, 3, 4, last]),
      {'margin': margin},
    )
    value, gradient = jax.jit(jax.value_and_grad(loss))(x, labels, **arguments)
    np.testing.assert_allclose(value, oracle(x, labels, **arguments), rtol=1e-6)
    expected = oracles.gradient(
      lambda x: oracle(x, labels, **arguments), x, step=1e-6
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)

  def test_unknown_mining_lists_the_choices(self):
    with self.assertRaisesRegex(ValueError, 'batch_all, batch_hard, semi_hard'):
      losses.triplet_loss(_LINE, _PAIR_AND_TWO, mining='easy')

  def test_n_pairs_by_hand(self):
    x = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 3.0], [9.0, 9.0]])
    labels = np.array([4, 7, 4, 7, 1])
    loss = _n_pairs(x, labels)
    first, second = np.log1p(np.exp(1 - 2)), np.log1p(np.exp(0 - 3))
    np.testing.assert_allclose(loss, (first + second) / 2, rtol=1e-6)

  def test_n_pairs_uses_the_first_two_of_each_class(self):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 3)).astype(np.float32)
    labels = np.array([0, 1, 0, 1, 0, 2, 1])
    np.testing.assert_allclose(
      _n_pairs(x, labels), _n_pairs(x[:4], labels[:4]), rtol=1e-6
    )

  def test_lifted_structure_by_hand(self):
    loss = _lifted_structure(_LINE, _PAIR_AND_TWO)
    pushes = np.exp([1 - 3, 1 - 7, 1 - 2, 1 - 6])
    np.testing.assert_allclose(
      loss, (np.log(pushes.sum()) + 1) ** 2 / 2, rtol=1e-5
    )

  def test_multi_similarity_by_hand(self):
    # Cosines of the first example: 0.6 to its positive, 0.8 and -1 to its
    # negatives, of which only the first is selected.
    x = np.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]])
    loss = _multi_similarity(x, np.array([0, 0, 1, 2]), alpha=2.0, beta=4.0)
    expected = np.log1p(np.exp(-2 * 0.1)) / 2 + np.log1p(np.exp(4 * 0.3)) / 4
    np.testing.assert_allclose(loss[0], expected, rtol=1e-6)
    # No other example has a positive.
    np.testing.assert_array_equal(loss[2:], 0)

  def test_infinite_epsilon_selects_all_pairs_of_anchors_with_both(self):
    x = np.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]])
    loss = _multi_similarity(
      x, np.array([0, 0, 1, 2]), alpha=2.0, beta=4.0, epsilon=np.inf
    )
    pushes = np.exp([4 * 0.3, -4 * 1.5]).sum()
    expected = np.log1p(np.exp(-2 * 0.1)) / 2 + np.log1p(pushes) / 4
    np.testing.assert_allclose(loss[0], expected, rtol=1e-6)
    # The others have no positive. If all are of one class, none has a negative.
    np.testing.assert_array_equal(loss[2:], 0)
    loss = _multi_similarity(x, np.zeros(4, int), epsilon=np.inf)
    np.testing.assert_array_equal(loss, 0)

  def test_facility_location_by_hand(self):
    x = np.array([[0.0], [1.0], [10.0], [12.0]], np.float32)
    # The classes are the clusters: the best medoids are those of the classes,
    # with an NMI of 1, so that both terms cancel.
    loss = _facility(x, np.array([0, 0, 1, 1]), margin_multiplier=0.1)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    # Each class has one example of each cluster: the medoids of the clusters
    # cost 1 + 2, those of the classes 10 + 11, and the NMI is 0.
    loss = _facility(x, np.array([0, 1, 0, 1]), margin_multiplier=0.5)
    np.testing.assert_allclose(loss, 0.5 - 3 + 21, rtol=1e-6)

  def test_facility_location_refines_the_greedy_search(self):
    # The best single medoid is 5. As one of two it is not optimal: with 0 the
    # cost is 1 + 4 + 5, and with 0 and 9 it is 1 + 4 + 1.
    x = np.array([[0.0], [1.0], [5.0], [9.0], [10.0]], np.float32)
    labels = np.array([0, 1, 0, 1, 1])
    # The medoids of the classes cost 5 and 8 + 1.
    for rounds, cost in ((0, 10), (5, 6)):
      loss = _facility(x, labels, margin_multiplier=0, num_refinements=rounds)
      np.testing.assert_allclose(loss, 5 + 9 - cost, rtol=1e-6)

  @parameterized.parameters(
    'contrastive', 'facility_location', 'lifted_structure', 'n_pairs', 'triplet'
  )
  def test_the_order_of_a_batch_does_not_matter(self, name):
    rng = np.random.default_rng(1)
    # Two of each class: with more, N-pairs selects by order.
    x = rng.normal(size=(6, 3)).astype(np.float32)
    labels = np.array([0, 0, 1, 1, 2, 2])
    order = np.array([4, 2, 0, 5, 3, 1])
    loss = jax.jit(losses.LOSSES[name].fn)
    # N-pairs anchors the first of a pair, so the order within pairs matters.
    if name == 'n_pairs':
      order = np.array([4, 5, 0, 1, 2, 3])
    np.testing.assert_allclose(
      loss(x[order], labels[order]), loss(x, labels), rtol=1e-5
    )


if __name__ == '__main__':
  absltest.main()
