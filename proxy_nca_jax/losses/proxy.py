"""Losses that compare each embedding with learned proxies.

All functions take `embeddings: float [batch, dim]`, `proxies: float
[num_proxies, dim]` and `labels: int [batch]`, which index the proxies. They
compute in float32 whatever comes in and return the unreduced `float32 [batch]`.

References:
  Movshovitz-Attias et al., No Fuss Distance Metric Learning using Proxies,
    ICCV 2017, https://arxiv.org/abs/1703.07464
  Teh et al., ProxyNCA++, ECCV 2020, https://arxiv.org/abs/2004.01113
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np


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
  chex.assert_rank([embeddings, proxies, labels], [2, 2, 1])
  chex.assert_equal_shape_prefix([embeddings, labels], 1)
  chex.assert_equal_shape_suffix([embeddings, proxies], 1)
  chex.assert_type(labels, int)
  num_proxies = proxies.shape[0]
  if where is None:
    where = jnp.ones(labels.shape, bool)
  chex.assert_equal_shape([labels, where])
  check_labels(labels, num_proxies, where=where)
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

  # An example that does not count must not reach the arithmetic: the zero
  # cotangent of its loss times an infinite derivative would be NaN.
  embeddings = jnp.where(where[:, None], embeddings, 0)
  logits = negative_distances(embeddings, proxies, normalize=normalize)
  logits = logits / temperature
  is_positive = labels[:, None] == jnp.arange(num_proxies)[None, :]
  positive = jnp.sum(logits, axis=1, where=is_positive)
  in_sum = True if positive_in_denominator else ~is_positive
  loss = jax.nn.logsumexp(logits, axis=1, where=in_sum) - positive
  if label_smoothing:
    others = jnp.sum(logits, axis=1, where=~is_positive) / (num_proxies - 1)
    loss += label_smoothing * (positive - others)
  in_range = (labels >= 0) & (labels < num_proxies)
  return jnp.where(where, jnp.where(in_range, loss, jnp.nan), 0.0)


def negative_distances(
    embeddings: chex.Array, proxies: chex.Array, *, normalize: bool
) -> jax.Array:
  """Returns -||x - p||^2 up to a constant a row, float32 [batch, num_proxies].

  ||x - p||^2 = ||x||^2 - 2 x.p + ||p||^2, and ||x||^2 is the same for every
  proxy: it cancels in the loss, and so do both norms on the unit sphere. One
  matmul of cosines is faster than differences, and exact where x = p.
  """
  embeddings = embeddings.astype(jnp.float32)
  proxies = proxies.astype(jnp.float32)
  if normalize:
    embeddings, proxies = unit_norm(embeddings), unit_norm(proxies)
  products = jnp.dot(
    embeddings, proxies.T, precision=jax.lax.Precision.HIGHEST
  )
  if normalize:
    return 2 * products
  return 2 * products - jnp.sum(proxies**2, axis=1)[None, :]


def unit_norm(x: chex.Array) -> jax.Array:
  """Projects the rows of float32 [n, dim] to the unit sphere; 0 stays 0.

  Rows are first divided by their largest entry, a constant to the gradient
  (the result does not depend on it), so that the squares of very large or very
  small entries neither overflow nor vanish.
  """
  largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
  largest = jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))
  x = x / largest
  squares = jnp.sum(x**2, axis=1, keepdims=True)
  # The square root has no derivative at 0; a zero row gets the gradient of 1.
  return x * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


def check_labels(
    labels: chex.Array, num_proxies: int, *, where: chex.Array | None = None
) -> None:
  """Raises ValueError if a known label has no proxy; traced ones pass."""
  if isinstance(labels, jax.core.Tracer) or isinstance(where, jax.core.Tracer):
    return
  labels = np.asarray(labels)
  if where is not None:
    labels = labels[np.asarray(where)]
  wrong = labels[(labels < 0) | (labels >= num_proxies)]
  if wrong.size:
    raise ValueError(
      f'{wrong.size} of {labels.size} labels have no proxy, such as '
      f'{wrong[0]}: labels must be in [0, {num_proxies}), the number of '
      'proxies. Renumber the classes from 0.'
    )
