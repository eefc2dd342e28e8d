"""Losses that compare each embedding with learned proxies.

All functions take `embeddings: float [batch, dim]`, `proxies: float
[num_proxies, dim]` and `labels: int [batch]`, which index the proxies, and
compute in float32 whatever comes in. A loss that is a mean over examples
returns them unreduced, `float32 [batch]`; a loss of the batch as a whole
returns a scalar, and says so.

References:
  Movshovitz-Attias et al., No Fuss Distance Metric Learning using Proxies,
    ICCV 2017, https://arxiv.org/abs/1703.07464
  Teh et al., ProxyNCA++, ECCV 2020, https://arxiv.org/abs/2004.01113
  Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020,
    https://arxiv.org/abs/2003.13911
"""

import chex
import jax
import jax.numpy as jnp

from proxy_nca_jax import distances
from proxy_nca_jax.losses import inputs, masked


def proxy_nca_loss(
    embeddings: chex.Array,
    proxies: chex.Array,
    labels: chex.Array,
    *,
    temperature: float = 1 / 9,
    positive_in_denominator: bool = False,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the Proxy-NCA loss of each example.

  With d the squared Euclidean distance, p(y) the proxy of the example's label
  and Z the other proxies (Algorithm 1 of https://arxiv.org/abs/1703.07464),

    loss(x, y) = -log(exp(-d(x, p(y)) / T) / sum_{p in Z} exp(-d(x, p) / T)).

  The sum leaves the positive out, so that the loss can be negative. With
  `positive_in_denominator` the sum runs over all proxies: the softmax form of
  ProxyNCA++ (https://arxiv.org/abs/2004.01113). The paper names no temperature;
  1/9 is ProxyNCA++'s. Code that scales both unit vectors by 3 means the same,
  since the distance is squared.

  Label smoothing is not the paper's. It moves the given mass from the positive
  to the other proxies in equal shares, as common Proxy-NCA code does; Optax's
  `smooth_labels` leaves a share with the positive.

  >>> x = jnp.array([[1., 0.]])
  >>> p = jnp.array([[1., 0.], [0., 1.]])
  >>> print(proxy_nca_loss(x, p, jnp.array([0]), temperature=1.))
  [-2.]

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].
    labels: int [batch], in [0, num_proxies). Values known outside of `jit` are
      checked; inside, a label out of range gives NaN for its example.
    temperature: T, positive. Small values sharpen the comparison.
    positive_in_denominator: whether the sum includes the positive.
    normalize: whether to project embeddings and proxies to the unit sphere.
    label_smoothing: in [0, 1), mass given to the other proxies.
    where: bool [batch], examples that count. The others have a loss and
      gradients of 0, whatever their values.

  Returns:
    float32 [batch], the loss of each example.

  Raises:
    ValueError: if a label is out of range, the temperature not positive,
      smoothing asked of the paper's form, or no other proxy there to compare
      with.
  """
  chex.assert_rank(proxies, 2)
  embeddings, where = inputs.prepare(embeddings, labels, proxies, where=where)
  num_proxies = proxies.shape[0]
  if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
    raise ValueError(f'temperature ({temperature}) must be positive.')
  if not 0 <= label_smoothing < 1:
    raise ValueError(
      f'label_smoothing ({label_smoothing}) must be in [0, 1).'
    )
  if label_smoothing and not positive_in_denominator:
    raise ValueError(
      f'label_smoothing ({label_smoothing}) needs positive_in_denominator=True:'
      ' without the positive in the sum there is no distribution to smooth.'
    )
  if num_proxies < 2 and (label_smoothing or not positive_in_denominator):
    raise ValueError(
      f'At least two proxies are needed, got {num_proxies}: the positive is '
      'compared with the others.'
    )

  logits = negative_distances(embeddings, proxies, normalize=normalize)
  logits = logits / temperature
  is_positive = inputs.is_class(labels, num_proxies)
  positive = jnp.sum(logits, axis=1, where=is_positive)
  in_sum = True if positive_in_denominator else ~is_positive
  loss = jax.nn.logsumexp(logits, axis=1, where=in_sum) - positive
  if label_smoothing:
    others = jnp.sum(logits, axis=1, where=~is_positive) / (num_proxies - 1)
    loss += label_smoothing * (positive - others)
  return inputs.finish(loss, labels, num_proxies, where)


def proxy_anchor_loss(
    embeddings: chex.Array,
    proxies: chex.Array,
    labels: chex.Array,
    *,
    alpha: float = 32.0,
    margin: float = 0.1,
    where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the Proxy-Anchor loss of a batch, a scalar.

  With s the cosine, P all proxies, P+ those of the classes in the batch, and
  X+ and X- the examples of a proxy's class and of the others (Sec. 3.2 of
  https://arxiv.org/abs/2003.13911),

    loss = 1/|P+| sum_{p in P+} log(1 + sum_{X+} exp(-alpha (s(x, p) - margin)))
         + 1/|P| sum_{p in P} log(1 + sum_{X-} exp(alpha (s(x, p) + margin))).

  A proxy is the anchor and gathers the batch, so that the loss is no mean over
  examples. A batch without examples has a loss of 0.

  >>> x = jnp.array([[1., 0.]])
  >>> p = jnp.array([[1., 0.], [0., 1.]])
  >>> print(proxy_anchor_loss(x, p, jnp.array([0]), alpha=1., margin=0.))
  0.6598352

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim].
    labels: int [batch], in [0, num_classes). Values known outside of `jit` are
      checked; inside, a label out of range makes the loss NaN.
    alpha: the scale of the cosines, positive; the paper's is 32.
    margin: delta; the paper's is 0.1.
    where: bool [batch], examples that count.

  Returns:
    float32 [], the loss of the batch.

  Raises:
    ValueError: if a label is out of range.
  """
  chex.assert_rank(proxies, 2)
  embeddings, where = inputs.prepare(embeddings, labels, proxies, where=where)
  num_classes = proxies.shape[0]
  cosines = distances.cosines(embeddings, proxies)
  is_positive = inputs.is_class(labels, num_classes)
  pulls = masked.log1p_sum_exp(
    -alpha * (cosines - margin), axis=0, where=is_positive & where[:, None]
  )
  pushes = masked.log1p_sum_exp(
    alpha * (cosines + margin), axis=0, where=~is_positive & where[:, None]
  )
  in_batch = jnp.any(is_positive & where[:, None], axis=0)
  loss = masked.mean(pulls, where=in_batch) + jnp.mean(pushes)
  return inputs.finish(loss, labels, num_classes, where)


def negative_distances(
    embeddings: chex.Array, proxies: chex.Array, *, normalize: bool
) -> jax.Array:
  """Returns -||x - p||^2 up to a constant a row, float32 [batch, num_proxies].

  ||x - p||^2 = ||x||^2 - 2 x.p + ||p||^2, and ||x||^2 is the same for every
  proxy: it cancels in the loss, and so do both norms on the unit sphere. One
  matmul of cosines is faster than differences, and exact where x = p.
  """
  if normalize:
    return 2 * distances.cosines(embeddings, proxies)
  squares = jnp.sum(proxies.astype(jnp.float32) ** 2, axis=1)
  return 2 * distances.products(embeddings, proxies) - squares[None, :]
