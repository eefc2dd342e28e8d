"""Losses with proxies for examples of several classes.

Both functions take `embeddings: float [batch, dim]`, `proxies: float
[num_classes, dim]` and, in place of labels, `targets: bool [batch,
num_classes]`, or integers 0 and 1: the classes of each example. With one class
for each example they are the losses of `losses.proxy`.
"""

import chex
import jax
import jax.numpy as jnp

from proxy_nca_jax import distances, masks
from proxy_nca_jax.losses import inputs, masked, proxy


def multi_label_proxy_nca_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  targets: chex.Array,
  *,
  temperature: float = 1 / 9,
  positive_in_denominator: bool = False,
  normalize: bool = True,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the Proxy-NCA loss of each example of several classes.

  With d the squared Euclidean distance, P the proxies of the example's classes,
  and Z all others, the mean of Proxy-NCA over the classes (Algorithm 1 of
  https://arxiv.org/abs/1703.07464):

    loss(x) = 1/|P| sum_{p in P}
      -log(exp(-d(x, p) / T) / sum_{z in Z} exp(-d(x, z) / T)).

  With `positive_in_denominator` the sum also has p. The other classes of the
  example are in neither: they do not compete with each other.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim].
    targets: bool [batch, num_classes], or integers 0 and 1.
    temperature: T, positive.
    positive_in_denominator: whether the sum includes the positive.
    normalize: whether to project embeddings and proxies to the unit sphere.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example; 0 for one of no class, or of all.

  Raises:
    ValueError: if the targets are neither bool nor 0 and 1.
  """
  embeddings, targets, where = _prepare(embeddings, proxies, targets, where)
  logits = proxy.negative_distances(embeddings, proxies, normalize=normalize)
  logits = logits / temperature
  others = masked.log_sum_exp(logits, axis=1, where=~targets)
  losses = others[:, None] - logits
  if positive_in_denominator:
    losses = jax.nn.softplus(losses)
  is_compared = where & jnp.any(targets, axis=1) & ~jnp.all(targets, axis=1)
  loss = masked.mean(losses, axis=1, where=targets & is_compared[:, None])
  return jnp.where(is_compared, loss, 0.0)


def multi_label_proxy_anchor_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  targets: chex.Array,
  *,
  alpha: float = 32.0,
  margin: float = 0.1,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the Proxy-Anchor loss of a batch of several classes, a scalar.

  The formula is that of `proxy_anchor_loss`, in which each proxy is an anchor
  of its own: its positives are the examples that have its class, among others.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim].
    targets: bool [batch, num_classes], or integers 0 and 1.
    alpha: the scale of the cosines, positive; the paper's is 32.
    margin: delta; the paper's is 0.1.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.

  Raises:
    ValueError: if the targets are neither bool nor 0 and 1.
  """
  embeddings, targets, where = _prepare(embeddings, proxies, targets, where)
  cosines = distances.cosines(embeddings, proxies)
  return proxy.anchor_loss(cosines, targets, where, alpha=alpha, margin=margin)


def _prepare(embeddings, proxies, targets, where):
  """Returns the embeddings in float32, the targets and the mask as bool."""
  chex.assert_rank([embeddings, proxies], 2)
  targets = jnp.asarray(masks.as_mask(targets, name='targets'))
  chex.assert_shape(targets, (embeddings.shape[0], proxies.shape[0]))
  labels = jnp.zeros(embeddings.shape[0], jnp.int32)
  embeddings, where = inputs.validate(embeddings, labels, where=where)
  return embeddings, targets, where
