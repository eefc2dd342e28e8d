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

import functools

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
  proxy_chunk: int | None = None,
  log_priors: chex.Array | None = None,
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
    proxy_chunk: proxies to compare with at a time. Memory is then that of
      [batch, proxy_chunk], not of [batch, num_proxies], for one more product;
      the loss is the same up to rounding. By default all at once.
    log_priors: float [num_proxies], added to -d(x, p) / T of each proxy, such
      as `frequency.log_priors`: logit adjustment for classes of different
      sizes (https://arxiv.org/abs/2007.07314). By default nothing.
    where: bool [batch], examples that count. The others have a loss and
      gradients of 0, whatever their values.

  Returns:
    float32 [batch], the loss of each example.

  Raises:
    ValueError: if a label is out of range, the temperature or the chunk not
      positive, smoothing asked of the paper's form, or no other proxy there to
      compare with.
  """
  chex.assert_rank(proxies, 2)
  num_proxies = proxies.shape[0]
  embeddings, where = inputs.prepare(
    embeddings, labels, num_classes=num_proxies, where=where
  )
  _check_temperature(temperature)
  if not 0 <= label_smoothing < 1:
    raise ValueError(f'label_smoothing ({label_smoothing}) must be in [0, 1).')
  if label_smoothing and not positive_in_denominator:
    raise ValueError(
      f'label_smoothing ({label_smoothing}) needs positive_in_denominator=True:'
      ' without the positive in the sum there is no distribution to smooth.'
    )
  if label_smoothing or not positive_in_denominator:
    _check_others(num_proxies)
  if proxy_chunk is not None and proxy_chunk < 1:
    raise ValueError(f'proxy_chunk ({proxy_chunk}) must be at least 1.')
  if log_priors is not None:
    chex.assert_shape(log_priors, (num_proxies,))
    log_priors = jnp.asarray(log_priors, jnp.float32)

  if normalize:
    embeddings = distances.unit_norm(embeddings)
  scaled = 2 / temperature * embeddings
  share = label_smoothing / max(num_proxies - 1, 1)

  def compare(proxies, priors, first):
    """The part of these proxies in each example's two terms."""
    # As in `negative_distances`. The own proxies are gathered: another sum
    # over the similarities would keep a copy of them, and twice the time.
    proxies = jnp.asarray(proxies, jnp.float32)
    local = labels - first
    positives = proxies.at[local].get(mode='clip')
    if normalize:
      own = jnp.sum(scaled * distances.unit_norm(positives), axis=1)
      logits = distances.projections(scaled, proxies)
    else:
      own = jnp.sum(scaled * positives - positives**2 / temperature, axis=1)
      squares = jnp.sum(proxies**2, axis=1) / temperature
      logits = distances.products(scaled, proxies) - squares[None, :]
    if priors is not None:
      own += priors.at[local].get(mode='clip')
      logits += priors[None, :]
    size = proxies.shape[0]
    target = jnp.where((local >= 0) & (local < size), own, 0)
    if label_smoothing:
      everything = jnp.sum(logits, axis=1)
      target = (1 - label_smoothing - share) * target + share * everything
    in_sum = (first + jnp.arange(size) < num_proxies)[None, :]
    if not positive_in_denominator:
      in_sum &= ~inputs.is_class(local, size)
    return masked.log_sum_exp(logits, axis=1, where=in_sum), target

  if proxy_chunk is None:
    log_sum, target = compare(proxies, log_priors, 0)
  else:
    log_sums, targets = _map_chunks(compare, proxies, log_priors, proxy_chunk)
    log_sum = jax.nn.logsumexp(log_sums, axis=0)
    target = jnp.sum(targets, axis=0)
  return inputs.finish(log_sum - target, labels, num_proxies, where)


def _map_chunks(fn, proxies: chex.Array, priors: chex.Array | None, size: int):
  """Stacks fn(proxies, priors, index of the first), chunk by chunk.

  The last is filled with 0. Backwards a chunk is computed again: nothing of a
  chunk is kept.
  """

  def divide(rows):
    filling = ((0, -rows.shape[0] % size),) + ((0, 0),) * (rows.ndim - 1)
    return jnp.pad(rows, filling).reshape(-1, size, *rows.shape[1:])

  chunks = jax.tree.map(divide, (proxies, priors))
  firsts = size * jnp.arange(chunks[0].shape[0])
  return jax.lax.map(
    jax.checkpoint(lambda chunk: fn(*chunk)), (*chunks, firsts)
  )


def _check_temperature(temperature):
  if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
    raise ValueError(f'temperature ({temperature}) must be positive.')


def _check_others(num_proxies):
  if num_proxies < 2:
    raise ValueError(
      f'At least two proxies are needed, got {num_proxies}: the positive is '
      'compared with the others.'
    )


def proxy_nca_pp_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  temperature: float = 1 / 9,
  proxy_chunk: int | None = None,
  log_priors: chex.Array | None = None,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the loss of ProxyNCA++ of each example.

  The probability of the own proxy among all (https://arxiv.org/abs/2004.01113):

    loss(x, y) = -log(exp(-d(x, p(y)) / T) / sum_{p in P} exp(-d(x, p) / T)).

  `proxy_nca_loss` says the rest; what else ProxyNCA++ is lies outside the loss.
  """
  return proxy_nca_loss(
    embeddings,
    proxies,
    labels,
    temperature=temperature,
    positive_in_denominator=True,
    proxy_chunk=proxy_chunk,
    log_priors=log_priors,
    where=where,
  )


def fractional_proxy_nca_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  assignment: chex.Array,
  temperature: float = 1 / 9,
  normalize: bool = True,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates Proxy-NCA with fewer or more proxies than classes.

  Classes are assigned to proxies beforehand, as `proxies.random_assignment`
  does: few proxies are shared by classes, of many a class has several. p(y) is
  the nearest of the class's own proxies and Z all that are not its own,

    loss(x, y) = -log(exp(-d(x, p(y)) / T) / sum_{p in Z} exp(-d(x, p) / T)).

  The paper assigns at random, with at most one proxy a class (Sec. 4.1 of
  https://arxiv.org/abs/1703.07464).

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].
    labels: int [batch], in [0, num_classes); checked as in `proxy_nca_loss`.
    assignment: int [num_classes, k], the proxies of each class, in
      [0, num_proxies), k < num_proxies. Repeated ones count once.
    temperature: T, positive.
    normalize: whether to project embeddings and proxies to the unit sphere.
    where: bool [batch], examples that count.

  Returns:
    float32 [batch], the loss of each example.

  Raises:
    ValueError: if a label is out of range, the temperature not positive, or a
      class may own all proxies.
  """
  chex.assert_rank([proxies, assignment], 2)
  _check_temperature(temperature)
  num_proxies, num_own = proxies.shape[0], assignment.shape[1]
  if num_own >= num_proxies:
    raise ValueError(
      f'A class with {num_own} of {num_proxies} proxies leaves no other to '
      'compare with.'
    )
  embeddings, where = inputs.prepare(
    embeddings, labels, num_classes=assignment.shape[0], where=where
  )
  logits = negative_distances(embeddings, proxies, normalize=normalize)
  logits = logits / temperature
  own = jnp.asarray(assignment).at[labels].get(mode='clip')
  is_own = functools.reduce(
    jnp.logical_or,
    [inputs.is_class(own[:, k], num_proxies) for k in range(num_own)],
  )
  # The nearest has the largest logit.
  positive = jnp.max(logits, axis=1, where=is_own, initial=-jnp.inf)
  loss = masked.log_sum_exp(logits, axis=1, where=~is_own) - positive
  return inputs.finish(loss, labels, assignment.shape[0], where)


def dynamic_proxy_nca_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  temperature: float = 1 / 9,
  normalize: bool = True,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates Proxy-NCA where every point belongs to its nearest proxy.

  No class owns a proxy: labels only say which points of the batch are alike.
  Of each anchor x, Y are the points like it and Z those unlike it, each of
  which its nearest proxy replaces, p(z) = argmin_p d(z, p) (Sec. 4.1 of
  https://arxiv.org/abs/1703.07464):

    loss(x) = mean_{y in Y} -log(exp(-d(x, p(y)) / T)
                                 / sum_{z in Z} exp(-d(x, p(z)) / T)).

  Points that share a proxy count one by one, as in the bound of the paper. The
  assignment is no function to differentiate; gradients reach the proxies that
  it chose.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].
    labels: int [batch], of any values.
    temperature: T, positive.
    normalize: whether to project embeddings and proxies to the unit sphere.
    where: bool [batch], examples that count.

  Returns:
    float32 [batch], the loss of each example; 0 for one without a point like it
    or without one unlike it.

  Raises:
    ValueError: if the temperature is not positive.
  """
  chex.assert_rank(proxies, 2)
  _check_temperature(temperature)
  embeddings, where = inputs.prepare(embeddings, labels, where=where)
  logits = negative_distances(embeddings, proxies, normalize=normalize)
  nearest = jnp.argmax(logits, axis=1)
  logits = logits[:, nearest] / temperature
  is_positive, is_negative = inputs.pairs(labels, where)
  log_sum = masked.log_sum_exp(logits, axis=1, where=is_negative)
  loss = log_sum - masked.mean(logits, axis=1, where=is_positive)
  has_both = jnp.any(is_positive, axis=1) & jnp.any(is_negative, axis=1)
  return jnp.where(has_both, loss, 0.0)


def proxy_triplet_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  margin: float = 0.2,
  normalize: bool = True,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the margin loss of each example with proxies.

  The triplet loss with the proxies of its positive and negative (Sec. 3 of
  https://arxiv.org/abs/1703.07464), d the squared Euclidean distance, in the
  mean over the other proxies Z:

    loss(x, y) = mean_{p in Z} [d(x, p(y)) + margin - d(x, p)]_+.

  The paper names no margin; 0.2 is FaceNet's, for the same distance.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim], at least two.
    labels: int [batch], in [0, num_proxies); checked as in `proxy_nca_loss`.
    margin: by which the own proxy should be nearer than others.
    normalize: whether to project embeddings and proxies to the unit sphere.
    where: bool [batch], examples that count.

  Returns:
    float32 [batch], the loss of each example.

  Raises:
    ValueError: if a label is out of range or there is no other proxy.
  """
  chex.assert_rank(proxies, 2)
  num_proxies = proxies.shape[0]
  _check_others(num_proxies)
  embeddings, where = inputs.prepare(
    embeddings, labels, num_classes=num_proxies, where=where
  )
  nearness = negative_distances(embeddings, proxies, normalize=normalize)
  is_positive = inputs.is_class(labels, num_proxies)
  positive = jnp.sum(nearness, axis=1, where=is_positive, keepdims=True)
  hinges = jax.nn.relu(margin + nearness - positive)
  loss = masked.mean(hinges, axis=1, where=~is_positive)
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
  num_classes = proxies.shape[0]
  embeddings, where = inputs.prepare(
    embeddings, labels, num_classes=num_classes, where=where
  )
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
