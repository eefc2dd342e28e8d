import jax
import jax.numpy as jnp
import numpy as np
import oracles
from absl.testing import absltest, parameterized

from proxy_nca_jax import losses


def _inputs(batch=6, num_classes=4, num_centers=None, dim=3):
  rng = np.random.default_rng(0)
  shape = (num_classes, dim)
  if num_centers:
    shape = (num_classes, num_centers, dim)
  return (
    rng.normal(size=(batch, dim)).astype(np.float32),
    rng.normal(size=shape).astype(np.float32),
    rng.integers(0, num_classes, batch).astype(np.int32),
  )


def _at(degrees):
  """The unit vector at an angle, as a row."""
  radians = np.radians(degrees)
  return np.array([np.cos(radians), np.sin(radians)])


class ClassificationTest(parameterized.TestCase):
  def test_normalized_softmax_by_hand(self):
    x, proxies = jnp.array([[3.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 1.0]])
    loss = losses.normalized_softmax_loss(
      x, proxies, jnp.array([1]), temperature=0.5
    )
    np.testing.assert_allclose(loss, [np.log(np.exp(2) + 1)], rtol=1e-6)

  def test_cosface_by_hand(self):
    x, proxies = jnp.array([[3.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 1.0]])
    loss = losses.cosface_loss(
      x, proxies, jnp.array([0]), scale=2.0, margin=0.25
    )
    np.testing.assert_allclose(loss, [np.log(1 + np.exp(-1.5))], rtol=1e-6)

  @parameterized.parameters(
    # The target's angle, and its cosine with a margin of 60 degrees.
    (0, 0.5),
    (30, 0.0),
    (-60, -0.5),
    # Just before the jump at 120 degrees, where rounding would decide.
    (119.9, -1.0),
    # Beyond 120 degrees, cos(theta + margin) would increase again.
    (180, -1 - np.pi / 3 * np.sin(np.pi / 3)),
  )
  def test_arcface_by_hand(self, degrees, target):
    x = jnp.asarray(_at(20)[None])
    proxies = jnp.asarray(np.stack([_at(20 + degrees), _at(110)]))
    loss = losses.arcface_loss(
      x, proxies, jnp.array([0]), scale=2.0, margin=np.pi / 3
    )
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-2 * target))], atol=2e-3)

  @parameterized.parameters(0, 1e-6, 1e-4, 1e-2)
  def test_embeddings_near_their_proxy_lose_no_digits(self, offset):
    rng = np.random.default_rng(0)
    proxies = rng.normal(size=(16, 2, 64)).astype(np.float32)
    x = (3 * proxies[:, 1] + offset * rng.normal(size=(16, 64))).astype('f4')
    # Each proxy belongs to a second class, with which the target competes.
    proxies = np.concatenate([proxies, proxies])
    labels = np.arange(16)
    units, rows = oracles.unit(proxies), oracles.unit(x)
    # From differences: the arccosine of a cosine near 1 loses half the digits.
    angles = 2 * np.arcsin(np.linalg.norm(rows - units[:16, 1], axis=1) / 2)
    cosines = np.einsum('bd,ckd->bck', rows, units)
    for loss, points, logits in (
      (losses.arcface_loss, proxies[:, 1], 64 * cosines[:, :, 1]),
      (losses.subcenter_arcface_loss, proxies, 64 * cosines.max(axis=2)),
    ):
      logits[labels, labels] = 64 * np.cos(angles + 0.5)
      others = np.where(np.eye(16, 32), -np.inf, logits)
      log_sum = np.log(np.exp(others).sum(axis=1))
      expected = np.logaddexp(0, log_sum - logits[labels, labels])
      self.assertGreater(expected.min(), 7)
      actual = loss(x, points, labels, scale=64.0, margin=0.5)
      np.testing.assert_allclose(actual, expected, atol=1e-4)

  def test_arcface_increases_with_the_angle(self):
    angles = np.arange(0, 181, 3.0)
    x = jnp.asarray(np.stack([_at(angle) for angle in angles]))
    # The other proxies are at right angles to all.
    x = jnp.pad(x, ((0, 0), (0, 1)))
    proxies = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    labels = jnp.zeros(len(angles), int)
    loss = jax.jit(losses.arcface_loss)(x, proxies, labels, scale=1.0)
    self.assertGreater(np.diff(loss).min(), 0)

  def test_subcenter_arcface_takes_the_nearest_center(self):
    x, proxies, labels = _inputs(num_centers=3)
    units = proxies / np.linalg.norm(proxies, axis=2, keepdims=True)
    nearest = np.stack(
      [[max(row, key=lambda w, v=v: v @ w) for row in units] for v in x]
    )
    arcface = jax.jit(lambda *row: losses.arcface_loss(*row, scale=4.0))
    expected = [
      arcface(v[None], p, label[None])[0]
      for v, p, label in zip(x, nearest, labels)
    ]
    np.testing.assert_allclose(
      losses.subcenter_arcface_loss(x, proxies, labels, scale=4.0),
      expected,
      rtol=1e-5,
      atol=1e-6,
    )

  def test_soft_triple_by_hand(self):
    # Cosines 1 and 0 to the centers of the class, 0 and 0 to the others.
    x = jnp.array([[1.0, 0.0]])
    proxies = jnp.array([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, -1.0]]])
    loss = losses.soft_triple_loss(
      x, proxies, jnp.array([0]), scale=3.0, margin=0.1, gamma=1.0, tau=0.5
    )
    similarity = np.e / (np.e + 1)
    # Pairs at distances sqrt(2) and 2; C K (K - 1) = 4.
    spread = (np.sqrt(2) + 2) / 4
    expected = np.log1p(np.exp(-3 * (similarity - 0.1))) + 0.5 * spread
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)

  def test_centers_that_nearly_coincide_lose_no_digits(self):
    near = np.array([[3.0, 4.0, 1.0], [3.0, 4.0, 1.0 + 1e-3]], np.float32)
    proxies = np.stack([near, near[[0, 0]]])
    with_spread, without = (
      losses.soft_triple_loss(
        np.ones((1, 3), np.float32), proxies, np.array([0]), tau=tau, scale=1.0
      )
      for tau in (1e4, 0)
    )
    unit = oracles.unit(near.astype(np.float64))
    spread = np.linalg.norm(unit[0] - unit[1]) / (2 * 2 * (2 - 1))
    np.testing.assert_allclose(with_spread - without, [1e4 * spread], rtol=1e-3)

  def test_without_margins_all_are_the_normalized_softmax(self):
    x, proxies, labels = _inputs()
    centers = proxies[:, None]
    expected = losses.normalized_softmax_loss(
      x, proxies, labels, temperature=0.25
    )
    for actual in (
      losses.proxy_nca_pp_loss(x, proxies, labels, temperature=0.5),
      losses.cosface_loss(x, proxies, labels, scale=4.0, margin=0.0),
      losses.arcface_loss(x, proxies, labels, scale=4.0, margin=0.0),
      losses.subcenter_arcface_loss(x, centers, labels, scale=4.0, margin=0.0),
      losses.soft_triple_loss(x, centers, labels, scale=4.0, margin=0.0),
    ):
      np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

  def test_coinciding_centers_have_a_finite_gradient(self):
    x, proxies, labels = _inputs(num_centers=3)
    proxies[1] = proxies[1][:1]
    gradient = jax.jit(
      jax.grad(lambda p: losses.soft_triple_loss(x, p, labels).sum())
    )(proxies)
    self.assertTrue(np.all(np.isfinite(gradient)))


if __name__ == '__main__':
  absltest.main()
