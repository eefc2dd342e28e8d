import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from proxy_nca_jax import losses


class CenterTest(absltest.TestCase):
  def test_center_loss_by_hand(self):
    x = jnp.array([[1.0, 2.0], [0.0, 0.0]])
    centers = jnp.array([[1.0, 0.0], [3.0, 4.0]])
    loss = losses.center_loss(x, jnp.array([0, 1]), centers=centers)
    np.testing.assert_allclose(loss, [2, 12.5], rtol=1e-6)

  def test_center_softmax_by_hand(self):
    x, labels = jnp.array([[1.0, 2.0]]), jnp.array([1])
    proxies = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    centers = jnp.array([[9.0, 9.0], [1.0, 0.0]])
    loss = losses.center_softmax_loss(
      x, proxies, labels, centers=centers, weight=0.25
    )
    np.testing.assert_allclose(loss, [np.log1p(np.e) + 0.25 * 2], rtol=1e-6)

  def test_magnet_by_hand(self):
    # Squared distances of 1 and 1 to the nearest centers of the class: s2 = 2.
    x = jnp.array([[0.0], [6.0]])
    centers = jnp.array([[[1.0], [-3.0]], [[7.0], [9.0]]])
    loss = losses.magnet_loss(x, jnp.array([0, 1]), centers=centers, alpha=20.0)
    first = 1 / 4 + 20 + np.log(np.exp(-49 / 4) + np.exp(-81 / 4))
    second = 1 / 4 + 20 + np.log(np.exp(-25 / 4) + np.exp(-81 / 4))
    np.testing.assert_allclose(loss, [first, second], rtol=1e-5)
    loss = losses.magnet_loss(x, jnp.array([0, 1]), centers=centers, alpha=1.0)
    np.testing.assert_array_equal(loss, 0)

  def test_magnet_does_not_depend_on_the_unit_of_length(self):
    rng = np.random.default_rng(0)
    x, centers = rng.normal(size=(6, 3)), rng.normal(size=(4, 2, 3))
    labels = np.array([0, 1, 2, 3, 0, 1])
    np.testing.assert_allclose(
      losses.magnet_loss(100 * x, labels, centers=100 * centers),
      losses.magnet_loss(x, labels, centers=centers),
      rtol=1e-4,
    )

  def test_centers_move_toward_their_examples_by_hand(self):
    centers = jnp.array([[0.0, 0.0], [4.0, 0.0], [1.0, 1.0]])
    x = jnp.array([[3.0, 0.0], [0.0, 6.0], [4.0, 2.0], [9.0, 9.0]])
    where = jnp.array([True, True, True, False])
    moved = losses.update_centers(
      centers, x, jnp.array([0, 0, 1, 2]), rate=0.5, where=where
    )
    # Half of (3, 6) / (1 + 2), and half of (0, 2) / (1 + 1).
    np.testing.assert_allclose(moved, [[0.5, 1], [4, 0.5], [1, 1]], rtol=1e-6)

  def test_numpy_arrays_are_accepted_and_not_changed(self):
    centers = np.array([[0.0, 0.0], [4.0, 0.0]])
    x, labels = np.array([[3.0, 0.0], [0.0, 6.0]]), np.array([0, 7])
    where = np.array([True, False])
    for array in (centers, x, labels, where):
      array.setflags(write=False)
    moved = losses.update_centers(centers, x, labels, where=where)
    self.assertEqual(moved.dtype, jnp.float32)
    # Half of 3 / (1 + 1).
    np.testing.assert_allclose(moved, [[0.75, 0], [4, 0]], rtol=1e-6)

  def test_the_nearest_center_of_the_class_moves(self):
    centers = jnp.array([[[0.0], [10.0]], [[7.0], [8.0]]])
    moved = losses.update_centers(
      centers, jnp.array([[7.0], [2.0]]), jnp.array([0, 0]), rate=1.0
    )
    np.testing.assert_allclose(moved, [[[1], [8.5]], [[7], [8]]], rtol=1e-6)

  def test_a_traced_label_out_of_range_moves_no_center(self):
    centers = jnp.arange(6.0).reshape(3, 2)
    update = jax.jit(losses.update_centers)
    for label in (-1, 3):
      labels = jnp.array([label])
      with self.assertRaisesRegex(ValueError, r'\[0, 3\)'):
        losses.update_centers(centers, jnp.ones((1, 2)), labels)
      np.testing.assert_array_equal(
        update(centers, jnp.ones((1, 2)), labels), centers
      )


if __name__ == '__main__':
  absltest.main()
