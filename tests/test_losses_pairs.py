import inspect

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax import losses


def _losses_that_take(argument):
  return tuple(
    name
    for name, loss in losses.LOSSES.items()
    if argument in inspect.signature(loss.fn).parameters
  )


_WITH_MEMORY = _losses_that_take('memory')
# Points on a line: distances are differences.
_LINE = np.array([[0.0], [1.0], [3.0], [7.0], [4.0]], np.float32)
_LABELS = np.array([0, 0, 1, 2, 0])


def _inputs(batch=6, size=9, dim=4, num_classes=3):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch + size, dim)).astype(np.float32)
  return x, rng.integers(0, num_classes, batch + size).astype(np.int32)


class MemoryTest(parameterized.TestCase):
  def test_the_newest_examples_come_first_and_the_oldest_go(self):
    memory = losses.init_memory(3, 1)
    self.assertFalse(np.any(memory['where']))
    for first, labels in ((1.0, [1, 2]), (3.0, [3, 4])):
      x = np.array([[first], [first + 1]], np.float32)
      memory = losses.update_memory(
        memory, x, np.array(labels), where=np.array([True, first == 1])
      )
    np.testing.assert_array_equal(memory['labels'], [3, 4, 1])
    np.testing.assert_array_equal(memory['where'], [True, False, True])
    np.testing.assert_array_equal(memory['embeddings'], [[3], [0], [1]])

  def test_a_batch_larger_than_the_memory_fills_it(self):
    memory = losses.update_memory(
      losses.init_memory(2, 1), _LINE, _LABELS.astype(np.int32)
    )
    np.testing.assert_array_equal(memory['embeddings'], _LINE[:2])

  @parameterized.parameters(*_WITH_MEMORY)
  def test_remembered_examples_are_compared_but_get_no_gradient(self, name):
    x, labels = _inputs()
    batch = 6
    memory = {
      'embeddings': x[batch:],
      'labels': labels[batch:],
      'where': np.arange(9) != 2,
    }
    # The same pairs within one large batch.
    is_anchor = np.arange(len(x)) < batch
    rows = np.broadcast_to(is_anchor[:, None], (len(x), len(x)))
    where = np.append(np.ones(batch, bool), memory['where'])
    loss = losses.LOSSES[name].fn

    def remembered(x):
      return jnp.sum(loss(x, labels[:batch], memory=memory))

    def at_once(x):
      constant = jax.lax.stop_gradient(x)
      x = jnp.where(is_anchor[:, None], x, constant)
      pairs = losses.Pairs(rows, rows)
      return jnp.sum(loss(x, labels, pairs=pairs, where=where))

    actual, gradient = jax.jit(jax.value_and_grad(remembered))(x[:batch])
    expected, gradients = jax.jit(jax.value_and_grad(at_once))(x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(
      gradient, gradients[:batch], rtol=1e-4, atol=1e-5
    )
    self.assertGreater(np.abs(gradient).max(), 1e-3)

  @parameterized.parameters('contrastive', 'sup_con')
  def test_an_empty_memory_changes_nothing(self, name):
    x, labels = _inputs()
    loss = jax.jit(losses.LOSSES[name].fn)
    np.testing.assert_allclose(
      loss(x, labels, memory=losses.init_memory(4, 4)),
      loss(x, labels),
      rtol=1e-5,
      atol=1e-6,
    )


class MinersTest(parameterized.TestCase):
  def test_batch_hard_by_hand(self):
    pairs = losses.batch_hard_pairs(_LINE, _LABELS)
    # From 0 and from 1 the farthest positive is at 4, from 4 it is at 0.
    expected = np.zeros((5, 5), bool)
    expected[[0, 1, 4], [4, 4, 0]] = True
    np.testing.assert_array_equal(pairs.is_positive, expected)
    # From these the nearest negative is at 3; from 3 and from 7 it is at 4.
    expected = np.zeros((5, 5), bool)
    expected[[0, 1, 4, 2, 3], [2, 2, 2, 4, 4]] = True
    np.testing.assert_array_equal(pairs.is_negative, expected)

  @parameterized.parameters((10.0, [0, 1]), (7.0, [1]))
  def test_semi_hard_by_hand(self, margin, anchors):
    pairs = losses.semi_hard_pairs(_LINE, _LABELS, margin=margin)
    # Squared distances from 0: positives 1 and 16, negatives 9 and 49: 9 is
    # within 10 of the positive before it, and not within 7. From 1: positives 1
    # and 9, negatives 4 and 36. From 4: positives 16 and 9, negatives 1 and 9.
    expected = np.zeros((5, 5), bool)
    expected[anchors, 2] = True
    np.testing.assert_array_equal(pairs.is_negative, expected)
    labels = _LABELS[:, None] == _LABELS[None, :]
    np.testing.assert_array_equal(
      pairs.is_positive, labels & ~np.eye(5, dtype=bool)
    )

  def test_multi_similarity_is_the_selection_of_its_loss(self):
    x, labels = _inputs()
    pairs = jax.jit(losses.multi_similarity_pairs)(x, labels, epsilon=0.05)
    loss = jax.jit(losses.multi_similarity_loss)
    np.testing.assert_allclose(
      loss(x, labels, epsilon=np.inf, pairs=pairs),
      loss(x, labels, epsilon=0.05),
      rtol=1e-6,
    )
    self.assertLess(np.sum(pairs.is_positive), np.sum(pairs.is_negative))

  def test_distance_weighted_draws_by_the_inverse_density_of_distances(self):
    # Distances from the anchor: its positive, then 0.2 (below the cutoff), 0.8,
    # 1.2 and 1.6 (too far).
    distances = np.array([0.3, 0.2, 0.8, 1.2, 1.6])
    angles = np.append(0, 2 * np.arcsin(distances / 2))
    x = np.zeros((6, 5), np.float32)
    x[:, 0], x[:, 1] = np.cos(angles), np.sin(angles)
    labels = np.array([0, 0, 1, 2, 3, 4])

    def draw(key):
      return losses.distance_weighted_pairs(key, x, labels)

    keys = jax.random.split(jax.random.key(0), 4000)
    pairs = jax.jit(jax.vmap(draw))(keys)
    drawn = np.asarray(pairs.is_negative[:, 0])
    np.testing.assert_array_equal(drawn.sum(axis=1), 1)
    clipped = np.maximum(distances[1:4], 0.5)
    weights = 1 / (clipped**3 * (1 - clipped**2 / 4))  # Five dimensions.
    np.testing.assert_allclose(
      drawn.mean(axis=0),
      [0, 0, *(weights / weights.sum()), 0],
      atol=0.025,
    )
    # An anchor without a positive draws no negative.
    self.assertFalse(np.any(pairs.is_negative[:, 2:]))

  @parameterized.parameters(*losses.MINERS, 'distance_weighted')
  def test_masked_examples_are_in_no_pair(self, name):
    x, labels = _inputs()
    where = np.arange(len(x)) % 4 != 1
    x[~where] = np.nan
    miner = getattr(losses, f'{name}_pairs')
    if 'key' in inspect.signature(miner).parameters:
      miner = lambda *rows, miner=miner, **named: miner(
        jax.random.key(0), *rows, **named
      )
    memory = {
      'embeddings': x[:3],
      'labels': labels[:3],
      'where': np.array([True, False, True]),
    }
    for pairs in jax.jit(miner)(x, labels, where=where, memory=memory):
      self.assertEqual(pairs.shape, (15, 18))
      self.assertTrue(np.any(pairs))
      self.assertFalse(np.any(pairs[~where]))
      self.assertFalse(
        np.any(pairs[:, np.append(~where, [False, True, False])])
      )

  @parameterized.parameters('smooth_ap', 'triplet')
  def test_pairs_that_are_not_selected_have_no_effect(self, name):
    x, labels = _inputs()
    # Only pairs among the first ten.
    mask = np.arange(len(x)) < 10
    pairs = losses.Pairs(*2 * [mask[:, None] & mask[None, :]])
    loss = jax.jit(losses.LOSSES[name].fn)
    actual = loss(x, labels, pairs=pairs)
    expected = loss(x, labels, where=mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    as_integers = losses.Pairs(*(rows.astype(int) for rows in pairs))
    np.testing.assert_array_equal(loss(x, labels, pairs=as_integers), actual)


if __name__ == '__main__':
  absltest.main()
