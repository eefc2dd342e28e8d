"""Classification losses: softmax over the cosines to each class's proxy.

All functions take `embeddings: float [batch, dim]`, `labels: int [batch]` in
[0, num_classes), and `proxies: float [num_classes, dim]`, or `[num_classes,
num_centers, dim]` for several centers per class. They normalize embeddings and
proxies, compute in float32 whatever the input dtype, and return the unreduced
`float32 [batch]`, 0 for masked examples. A label out of range raises ValueError
if it is concrete; under `jit` its loss is NaN.

References:
  Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning,
    BMVC 2019, https://arxiv.org/abs/1811.12649
  Wang et al., CosFace, CVPR 2018, https://arxiv.org/abs/1801.09414
  Deng et al., ArcFace, CVPR 2019, https://arxiv.org/abs/1801.07698
  Deng et al., Sub-center ArcFace, ECCV 2020,
    https://www.ecva.net/papers/eccv_2020/papers_ECCV/papers/123560715.pdf
  Kim et al., AdaFace, CVPR 2022, https://arxiv.org/abs/2204.00964
  Qian et al., SoftTriple Loss, ICCV 2019, https://arxiv.org/abs/1909.05235
"""

import chex
import jax
import jax.numpy as jnp

from proxy_nca_jax import distances
from proxy_nca_jax.losses import inputs, masked


def normalized_softmax_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  temperature: float = 0.05,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the normalized softmax loss of each example.

    loss(x, y) = -log(exp(cos(x, p_y) / T) / sum_c exp(cos(x, p_c) / T))

  (https://arxiv.org/abs/1811.12649, whose T is 0.05). It equals
  `proxy_nca_pp_loss` with twice the temperature.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim].
    labels: int [batch], in [0, num_classes).
    temperature: T, positive.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.
  """
  embeddings, where = _prepare(embeddings, proxies, labels, 2, where)
  logits = distances.cosines(embeddings, proxies) / temperature
  return _cross_entropy(logits, labels, where)


def cosface_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  scale: float = 64.0,
  margin: float = 0.35,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the CosFace loss of each example.

  Softmax cross-entropy of s cos(x, p_c), with the margin subtracted from the
  target's cosine (Eq. 4 of https://arxiv.org/abs/1801.09414; the defaults are
  the paper's).

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim].
    labels: int [batch], in [0, num_classes).
    scale: s, positive.
    margin: m, subtracted from the cosine.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.
  """
  embeddings, where = _prepare(embeddings, proxies, labels, 2, where)
  cosines = distances.cosines(embeddings, proxies)
  is_target = inputs.one_hot(labels, proxies.shape[0])
  return _cross_entropy(scale * (cosines - margin * is_target), labels, where)


def arcface_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  scale: float = 64.0,
  margin: float = 0.5,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the ArcFace loss of each example.

  Softmax cross-entropy of s cos(theta_c), where theta_c is the angle to a
  proxy, with the margin added to the target's angle (Eq. 3 of
  https://arxiv.org/abs/1801.07698; the defaults are the paper's).

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim].
    labels: int [batch], in [0, num_classes).
    scale: s, positive.
    margin: m, added to the angle, in [0, pi] radians.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.
  """
  embeddings, where = _prepare(embeddings, proxies, labels, 2, where)
  cosines = distances.cosines(embeddings, proxies)
  targets = jnp.asarray(proxies, jnp.float32).at[labels].get(mode='clip')
  logits = scale * _add_angular_margin(
    cosines, labels, embeddings, targets, margin
  )
  return _cross_entropy(logits, labels, where)


def subcenter_arcface_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  scale: float = 64.0,
  margin: float = 0.5,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the sub-center ArcFace loss of each example.

  ArcFace with the angle to the nearest of K centers of each class (Sec. 3.2 of
  Deng et al., ECCV 2020, where K is 3).

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, num_centers, dim].
    labels: int [batch], in [0, num_classes).
    scale: s, positive.
    margin: m, added to the angle, in [0, pi] radians.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.
  """
  embeddings, where = _prepare(embeddings, proxies, labels, 3, where)
  cosines = _center_cosines(embeddings, proxies)
  is_target = inputs.one_hot(labels, proxies.shape[0])
  nearest = jnp.sum(jnp.argmax(cosines, axis=2), axis=1, where=is_target)
  targets = (
    jnp.asarray(proxies, jnp.float32).at[labels, nearest].get(mode='clip')
  )
  logits = scale * _add_angular_margin(
    jnp.max(cosines, axis=2), labels, embeddings, targets, margin
  )
  return _cross_entropy(logits, labels, where)


def adaface_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  scale: float = 64.0,
  margin: float = 0.4,
  concentration: float = 0.333,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the AdaFace loss of each example.

  The norm of an embedding stands for the quality of its image, which decides
  whether hard examples (high quality) or easy ones (low quality) count more.
  With mu and sigma the mean and the standard deviation of the norms, and theta
  the angle to the target's proxy (Sec. 3.3 of
  https://arxiv.org/abs/2204.00964), the target's logit is

    s (cos(theta - m z) - (m z + m)), z = clip(h (||x|| - mu) / sigma, -1, 1)

  with theta - m z clipped to [0, pi], and the others are s cos(theta_c). z is a
  constant to the gradient.

  The norms are those of the batch; the paper averages mu and sigma over recent
  batches. As in the authors' code, norms are clipped to [0.001, 100], and sigma
  is increased by 0.001. If all norms are equal, as those of a network that
  normalizes, the loss is that of CosFace: do not normalize embeddings.

  Args:
    embeddings: float [batch, dim], not normalized.
    proxies: float [num_classes, dim].
    labels: int [batch], in [0, num_classes).
    scale: s, positive.
    margin: m, in [0, pi / 2].
    concentration: h, positive.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.
  """
  embeddings, where = _prepare(embeddings, proxies, labels, 2, where)
  quality = concentration * _standardized_norms(embeddings, where)
  shift = margin * jnp.clip(quality, -1, 1)
  cosines = distances.cosines(embeddings, proxies)
  targets = jnp.asarray(proxies, jnp.float32).at[labels].get(mode='clip')
  cosine, sine = _angle(embeddings, targets)
  rotated = cosine * jnp.cos(shift) + sine * jnp.sin(shift)
  # Angles below 0 and above pi.
  rotated = jnp.where((shift > 0) & (cosine > jnp.cos(shift)), 1, rotated)
  rotated = jnp.where((shift < 0) & (cosine < -jnp.cos(shift)), -1, rotated)
  is_target = inputs.one_hot(labels, proxies.shape[0])
  with_margin = (rotated - shift - margin)[:, None]
  logits = scale * jnp.where(is_target, with_margin, cosines)
  return _cross_entropy(logits, labels, where)


def _standardized_norms(embeddings, where):
  """Returns (norm - mean) / standard deviation, float32 [batch], a constant."""
  embeddings = jax.lax.stop_gradient(embeddings)
  norms = jnp.clip(jnp.linalg.norm(embeddings, axis=1), 1e-3, 100)
  shifts = norms - masked.mean(norms, where=where)
  count = jnp.maximum(jnp.sum(where) - 1, 1)
  deviation = jnp.sqrt(jnp.sum(shifts**2, where=where) / count)
  return shifts / (deviation + 1e-3)


def soft_triple_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  scale: float = 20.0,
  margin: float = 0.01,
  gamma: float = 0.1,
  tau: float = 0.2,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the SoftTriple loss of each example.

  With w_c1 to w_cK the unit centers of class c, and s(x, c) the mean of the
  cosines x.w_ck weighted by softmax_k(x.w_ck / gamma) (Sec. 3.2 and 3.3 of
  https://arxiv.org/abs/1909.05235),

    loss(x, y) = -log(exp(scale (s(x, y) - margin)) /
      (exp(scale (s(x, y) - margin)) + sum_{c != y} exp(scale s(x, c)))) + tau R

    R = 1/(C K (K-1)) sum_c sum_{i < j} ||w_ci - w_cj||.

  R pulls the centers of a class together. It is added to the loss of every
  example, so that the mean over examples is the paper's objective. The gradient
  of the distance of two centers that coincide is 0.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, num_centers, dim].
    labels: int [batch], in [0, num_classes).
    scale: lambda, positive; the paper's is 20.
    margin: delta; the paper's is 0.01.
    gamma: temperature of the softmax over centers, positive; the paper's is
      0.1.
    tau: the weight of R; the paper's is 0.2.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.
  """
  embeddings, where = _prepare(embeddings, proxies, labels, 3, where)
  cosines = _center_cosines(embeddings, proxies)
  weights = jax.nn.softmax(cosines / gamma, axis=2)
  similarities = jnp.sum(weights * cosines, axis=2)
  is_target = inputs.one_hot(labels, proxies.shape[0])
  spread = tau * _center_spread(proxies)
  logits = scale * (similarities - margin * is_target)
  return _cross_entropy(logits, labels, where, plus=spread)


def _prepare(embeddings, proxies, labels, rank, where):
  chex.assert_rank(proxies, rank)
  return inputs.validate(
    embeddings, labels, num_classes=proxies.shape[0], where=where
  )


def _cross_entropy(logits, labels, where, *, plus=0.0):
  num_classes = logits.shape[1]
  is_target = inputs.one_hot(labels, num_classes)
  targets = jnp.sum(logits, axis=1, where=is_target)
  loss = jax.nn.logsumexp(logits, axis=1) - targets + plus
  return inputs.mask_loss(loss, labels, num_classes, where)


def _add_angular_margin(cosines, labels, embeddings, targets, margin):
  """Replaces the target's cos(theta) by cos(theta + margin).

  For theta > pi - margin, where that would increase again, it is replaced by
  cos(theta) - margin sin(margin), as in the authors' code.

  Args:
    cosines: float32 [batch, num_classes].
    labels: int [batch].
    embeddings: float32 [batch, dim].
    targets: float [batch, dim], the proxy of each example.
    margin: in [0, pi] radians.

  Returns:
    float32 [batch, num_classes].
  """
  cosine, sine = _angle(embeddings, targets)
  with_margin = jnp.where(
    cosine >= -jnp.cos(margin),
    cosine * jnp.cos(margin) - sine * jnp.sin(margin),
    cosine - margin * jnp.sin(margin),
  )
  is_target = inputs.one_hot(labels, cosines.shape[1])
  return jnp.where(is_target, with_margin[:, None], cosines)


def _angle(x, y):
  """Returns the cosine and the sine of the angle between rows, exact near 0.

  sin^2 = (1 - cos) (1 + cos). Of nearby unit vectors 1 - cos is ||x - y||^2 / 2
  from their difference: the rounding of a cosine near 1 would change the sine
  by 3e-4. The sine of 0 has derivative 0.

  Args:
    x, y: float [batch, dim].

  Returns:
    Two arrays float32 [batch].
  """
  x, y = distances.unit_norm(x), distances.unit_norm(y)
  cosine = jnp.sum(x * y, axis=1)
  half = jnp.sum((x - y) ** 2, axis=1) / 2
  versine = jnp.where(cosine > 0.5, half, 1 - cosine)
  return cosine, distances.safe_sqrt(versine * (1 + cosine))


def _center_cosines(embeddings, proxies):
  """Returns the cosines, float32 [batch, num_classes, num_centers]."""
  num_classes, num_centers, dim = proxies.shape
  flat = distances.cosines(embeddings, proxies.reshape(-1, dim))
  return flat.reshape(-1, num_classes, num_centers)


def _center_spread(proxies):
  """Returns R of SoftTriple: half the mean distance of a class's centers."""
  num_centers = proxies.shape[1]
  if num_centers == 1:
    return 0.0
  centers = distances.unit_norm(proxies)
  total = 0.0
  for index in range(num_centers - 1):
    # sqrt(2 - 2 cos) from the differences: exact where centers coincide.
    shifts = centers[:, index + 1 :] - centers[:, index : index + 1]
    total += jnp.sum(distances.safe_sqrt(jnp.sum(shifts**2, axis=-1)))
  return total / (proxies.shape[0] * num_centers * (num_centers - 1))
