"""Losses that compare each embedding with learned proxies.

All functions take `embeddings: float [batch, dim]`, `proxies: float
[num_proxies, dim]` and `labels: int [batch]`, and compute in float32 whatever
the input dtype. Losses that are means over examples return the unreduced
`float32 [batch]`; losses of the batch as a whole return a scalar, and say so.

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

  With d the squared Euclidean distance, p(y) the proxy of the example's class,
  and Z the other proxies (Algorithm 1 of https://arxiv.org/abs/1703.07464),

    loss(x, y) = -log(exp(-d(x, p(y)) / T) / sum_{p in Z} exp(-d(x, p) / T)).

  The sum excludes the positive, so the loss can be negative. With
  `positive_in_denominator` the sum runs over all proxies, the softmax form of
  ProxyNCA++ (https://arxiv.org/abs/2004.01113). The paper has no temperature;
  1/9 is that of ProxyNCA++. Code that multiplies both unit vectors by 3
  computes the same, since the distance is squared.

  Label smoothing is not in the paper. It distributes the given probability
  evenly over the other proxies, as common Proxy-NCA code does, unlike Optax's
  `smooth_labels`, which distributes it over all classes.

  >>> x = jnp.array([[1., 0.]])
  >>> p = jnp.array([[1., 0.], [0., 1.]])
  >>> print(proxy_nca_loss(x, p, jnp.array([0]), temperature=1.))
  [-2.]

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].
    labels: int [batch], in [0, num_proxies). A label out of range raises
      ValueError if it is concrete; under `jit` its loss is NaN.
    temperature: T, positive. Smaller values sharpen the softmax.
    positive_in_denominator: whether the sum includes the positive.
    normalize: whether to project embeddings and proxies to the unit sphere.
    label_smoothing: in [0, 1), the probability given to the other proxies.
    proxy_chunk: number of proxies to process at a time. It reduces memory from
      [batch, num_proxies] to [batch, proxy_chunk], at the cost of one more
      matmul; the loss is the same up to rounding. By default all at once.
    log_priors: float [num_proxies], added to -d(x, p) / T, such as
      `frequency.log_priors`: logit adjustment for long-tailed classes
      (https://arxiv.org/abs/2007.07314). By default none.
    where: bool [batch], examples to include; by default all. Masked examples
      have a loss and gradients of 0, whatever their values.

  Returns:
    float32 [batch], the loss of each example.

  Raises:
    ValueError: if a label, the temperature, label_smoothing or proxy_chunk is
      out of range, if label_smoothing is set without positive_in_denominator,
      or if there is no other proxy to compare with.
  """
  chex.assert_rank(proxies, 2)
  num_proxies = proxies.shape[0]
  embeddings, where = inputs.validate(
    embeddings, labels, num_classes=num_proxies, where=where
  )
  _check_temperature(temperature)
  if not 0 <= label_smoothing < 1:
    raise ValueError(f'label_smoothing ({label_smoothing}) must be in [0, 1).')
  if label_smoothing and not positive_in_denominator:
    raise ValueError(
      f'label_smoothing ({label_smoothing}) requires '
      'positive_in_denominator=True: without the positive in the sum there is '
      'no distribution to smooth.'
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
  smoothed = label_smoothing / max(num_proxies - 1, 1)

  def compare(proxies, priors, first):
    """Returns this chunk's part of log_sum and target, each [batch]."""
    # The logits are those of `negative_distances`. The positives are gathered,
    # since a masked sum over the logits would keep a copy of them and take
    # twice as long.
    proxies = jnp.asarray(proxies, jnp.float32)
    local = labels - first
    positives = proxies.at[local].get(mode='clip')
    if normalize:
      target = jnp.sum(scaled * distances.unit_norm(positives), axis=1)
      logits = distances.projections(scaled, proxies)
    else:
      target = jnp.sum(scaled * positives - positives**2 / temperature, axis=1)
      squares = jnp.sum(proxies**2, axis=1) / temperature
      logits = distances.products(scaled, proxies) - squares[None, :]
    if priors is not None:
      target += priors.at[local].get(mode='clip')
      logits += priors[None, :]
    size = proxies.shape[0]
    target = jnp.where((local >= 0) & (local < size), target, 0)
    if label_smoothing:
      total = jnp.sum(logits, axis=1)
      target = (1 - label_smoothing - smoothed) * target + smoothed * total
    in_sum = (first + jnp.arange(size) < num_proxies)[None, :]
    if not positive_in_denominator:
      in_sum &= ~inputs.one_hot(local, size)
    return masked.log_sum_exp(logits, axis=1, where=in_sum), target

  if proxy_chunk is None:
    log_sum, target = compare(proxies, log_priors, 0)
  else:
    log_sums, targets = _map_chunks(compare, proxies, log_priors, proxy_chunk)
    log_sum = jax.nn.logsumexp(log_sums, axis=0)
    target = jnp.sum(targets, axis=0)
  return inputs.mask_loss(log_sum - target, labels, num_proxies, where)


def _map_chunks(fn, proxies: chex.Array, priors: chex.Array | None, size: int):
  """Stacks fn(proxies, priors, index of the first proxy) of all chunks.

  The last chunk is padded with 0. The backward pass recomputes each chunk, so
  that none is kept in memory.
  """

  def divide(rows):
    padding = ((0, -rows.shape[0] % size),) + ((0, 0),) * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(-1, size, *rows.shape[1:])

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
      f'At least two proxies are required, got {num_proxies}: the positive is '
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
  """Calculates the ProxyNCA++ loss of each example.

  The softmax cross-entropy over all proxies P
  (https://arxiv.org/abs/2004.01113):

    loss(x, y) = -log(exp(-d(x, p(y)) / T) / sum_{p in P} exp(-d(x, p) / T)).

  See `proxy_nca_loss` for the arguments. The other changes of ProxyNCA++ are
  outside the loss.
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

  A fixed assignment, such as that of `proxies.random_assignment`, gives each
  class one or several proxies, which classes can share. p(y) is the nearest
  proxy of the class, and Z are the proxies of other classes only:

    loss(x, y) = -log(exp(-d(x, p(y)) / T) / sum_{p in Z} exp(-d(x, p) / T)).

  The paper assigns at random, with at most one proxy per class (Sec. 4.1 of
  https://arxiv.org/abs/1703.07464).

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].
    labels: int [batch], in [0, num_classes); checked as in `proxy_nca_loss`.
    assignment: int [num_classes, k], the proxies of each class, in
      [0, num_proxies), k < num_proxies. Repetitions count once.
    temperature: T, positive.
    normalize: whether to project embeddings and proxies to the unit sphere.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.

  Raises:
    ValueError: if a label or the temperature is out of range, or k is not less
      than num_proxies.
  """
  chex.assert_rank([proxies, assignment], 2)
  _check_temperature(temperature)
  num_proxies, num_assigned = proxies.shape[0], assignment.shape[1]
  if num_assigned >= num_proxies:
    raise ValueError(
      f'The proxies per class ({num_assigned}) must be fewer than all proxies '
      f'({num_proxies}): the others are compared with.'
    )
  embeddings, where = inputs.validate(
    embeddings, labels, num_classes=assignment.shape[0], where=where
  )
  logits = negative_distances(embeddings, proxies, normalize=normalize)
  logits = logits / temperature
  assigned = jnp.asarray(assignment).at[labels].get(mode='clip')
  is_target = functools.reduce(
    jnp.logical_or,
    [inputs.one_hot(assigned[:, k], num_proxies) for k in range(num_assigned)],
  )
  # The nearest has the largest logit.
  positive = jnp.max(logits, axis=1, where=is_target, initial=-jnp.inf)
  loss = masked.log_sum_exp(logits, axis=1, where=~is_target) - positive
  return inputs.mask_loss(loss, labels, assignment.shape[0], where)


def dynamic_proxy_nca_loss(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  *,
  temperature: float = 1 / 9,
  normalize: bool = True,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates Proxy-NCA with each point assigned to its nearest proxy.

  Proxies have no class; labels only define the positives Y and the negatives Z
  of each anchor x in the batch. Each of these is replaced by its nearest proxy,
  p(z) = argmin_p d(z, p) (Sec. 4.1 of https://arxiv.org/abs/1703.07464):

    loss(x) = mean_{y in Y} -log(exp(-d(x, p(y)) / T)
                                 / sum_{z in Z} exp(-d(x, p(z)) / T)).

  Points that share a proxy are counted separately, as in the paper's bound. The
  assignment is not differentiable; gradients flow to the assigned proxies.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].
    labels: int [batch], of any values.
    temperature: T, positive.
    normalize: whether to project embeddings and proxies to the unit sphere.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example; 0 for an anchor without a
    positive or without a negative.

  Raises:
    ValueError: if the temperature is out of range.
  """
  chex.assert_rank(proxies, 2)
  _check_temperature(temperature)
  embeddings, where = inputs.validate(embeddings, labels, where=where)
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
  """Calculates the triplet loss with proxies of each example.

  The positive and the negative are replaced by their proxies (Sec. 3 of
  https://arxiv.org/abs/1703.07464). With d the squared Euclidean distance and Z
  the other proxies,

    loss(x, y) = mean_{p in Z} [d(x, p(y)) + margin - d(x, p)]_+.

  The paper gives no margin; 0.2 is FaceNet's, for the same distance.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim], at least two.
    labels: int [batch], in [0, num_proxies); checked as in `proxy_nca_loss`.
    margin: by which the positive should be nearer than the other proxies.
    normalize: whether to project embeddings and proxies to the unit sphere.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example.

  Raises:
    ValueError: if a label is out of range, or there is only one proxy.
  """
  chex.assert_rank(proxies, 2)
  num_proxies = proxies.shape[0]
  _check_others(num_proxies)
  embeddings, where = inputs.validate(
    embeddings, labels, num_classes=num_proxies, where=where
  )
  similarities = negative_distances(embeddings, proxies, normalize=normalize)
  is_positive = inputs.one_hot(labels, num_proxies)
  positive = jnp.sum(similarities, axis=1, where=is_positive, keepdims=True)
  hinges = jax.nn.relu(margin + similarities - positive)
  loss = masked.mean(hinges, axis=1, where=~is_positive)
  return inputs.mask_loss(loss, labels, num_proxies, where)


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

  With s the cosine, P all proxies, P+ those of classes in the batch, and X+ and
  X- the examples of the proxy's class and of all others (Sec. 3.2 of
  https://arxiv.org/abs/2003.13911),

    loss = 1/|P+| sum_{p in P+} log(1 + sum_{X+} exp(-alpha (s(x, p) - margin)))
         + 1/|P| sum_{p in P} log(1 + sum_{X-} exp(alpha (s(x, p) + margin))).

  Proxies are the anchors, so that the loss is not a mean over examples. An
  empty batch has a loss of 0.

  >>> x = jnp.array([[1., 0.]])
  >>> p = jnp.array([[1., 0.], [0., 1.]])
  >>> print(proxy_anchor_loss(x, p, jnp.array([0]), alpha=1., margin=0.))
  0.6598352

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim].
    labels: int [batch], in [0, num_classes). A label out of range raises
      ValueError if it is concrete; under `jit` the loss is NaN.
    alpha: the scale of the cosines, positive; the paper's is 32.
    margin: delta; the paper's is 0.1.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.

  Raises:
    ValueError: if a label is out of range.
  """
  chex.assert_rank(proxies, 2)
  num_classes = proxies.shape[0]
  embeddings, where = inputs.validate(
    embeddings, labels, num_classes=num_classes, where=where
  )
  cosines = distances.cosines(embeddings, proxies)
  is_positive = inputs.one_hot(labels, num_classes)
  loss = anchor_loss(cosines, is_positive, where, alpha=alpha, margin=margin)
  return inputs.mask_loss(loss, labels, num_classes, where)


def anchor_loss(
  cosines: chex.Array,
  is_positive: chex.Array,
  where: chex.Array,
  *,
  alpha: float,
  margin: float,
) -> jax.Array:
  """Returns the Proxy-Anchor loss, float32 [], from the cosines.

  Args:
    cosines: float32 [batch, num_classes].
    is_positive: bool [batch, num_classes], the classes of each example.
    where: bool [batch], examples to include.
    alpha: the scale of the cosines.
    margin: delta.
  """
  pulls = masked.log1p_sum_exp(
    -alpha * (cosines - margin), axis=0, where=is_positive & where[:, None]
  )
  pushes = masked.log1p_sum_exp(
    alpha * (cosines + margin), axis=0, where=~is_positive & where[:, None]
  )
  in_batch = jnp.any(is_positive & where[:, None], axis=0)
  return masked.mean(pulls, where=in_batch) + jnp.mean(pushes)


def negative_distances(
  embeddings: chex.Array, proxies: chex.Array, *, normalize: bool
) -> jax.Array:
  """Returns -||x - p||^2 + constant(x) of all pairs, float32 [batch, proxies].

  ||x - p||^2 = ||x||^2 - 2 x.p + ||p||^2, where ||x||^2 is the same for all
  proxies and cancels in the loss, as do both norms on the unit sphere. One
  matmul is faster than differences, and exact for x = p.
  """
  if normalize:
    return 2 * distances.cosines(embeddings, proxies)
  squares = jnp.sum(proxies.astype(jnp.float32) ** 2, axis=1)
  return 2 * distances.products(embeddings, proxies) - squares[None, :]
