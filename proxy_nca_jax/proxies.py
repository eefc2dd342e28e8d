"""Proxies: initialization, assignment, and how well they approximate points."""

import heapq

import chex
import jax
import jax.numpy as jnp
import numpy as np

from proxy_nca_jax import distances, masks


def init_proxies(
  key: chex.PRNGKey, num_proxies: int, dim: int, *, norm: float = 1.0
) -> jax.Array:
  """Draws proxies from N(0, norm^2 / dim), with norms of about `norm`.

  The paper gives no scale. The loss projects proxies to the unit sphere, so
  their gradient is inversely proportional to their norm: with norms near 1, the
  same learning rate of the proxies fits every dimension.

  Args:
    key: of `jax.random.key`.
    num_proxies: rows of the result.
    dim: columns of the result.
    norm: the root mean square norm of a proxy.

  Returns:
    float32 [num_proxies, dim].
  """
  return jax.random.normal(key, (num_proxies, dim)) * norm / jnp.sqrt(dim)


def initial_norm(init: str, num_classes: int, dim: int) -> float:
  """Returns the norm of proxies that are initialized as a layer's weights.

  PyTorch initializes a layer of shape [num_classes, dim] with variance
  2 / num_classes (`kaiming_normal_` with fan_out) or 2 / (num_classes + dim)
  (`xavier_normal_`).

  Args:
    init: 'kaiming' or 'xavier'.
    num_classes: rows of the layer.
    dim: columns of the layer.
  """
  fans = {'kaiming': num_classes, 'xavier': num_classes + dim}
  return (2 * dim / fans[init]) ** 0.5


def random_assignment(
  key: chex.PRNGKey, num_classes: int, num_proxies: int
) -> jax.Array:
  """Assigns proxies to classes at random, as evenly as possible.

  With fewer proxies than classes, several classes share a proxy (the paper's
  fractional assignment); with more, a class has several proxies.

  Args:
    key: of `jax.random.key`.
    num_classes: at least 1.
    num_proxies: at least 1.

  Returns:
    int32 [num_classes, k], the proxies of each class, in [0, num_proxies); k is
    the largest number per class. Rows with fewer proxies repeat one of them.
  """
  k = -(-num_proxies // num_classes)
  indices = jnp.arange(k * num_classes)
  # Indices past the last proxy repeat the same class's previous proxy.
  is_past = (indices >= num_proxies) & (k > 1)
  indices = jnp.where(is_past, indices - num_classes, indices) % num_proxies
  indices = indices.reshape(k, num_classes).T
  return jax.random.permutation(key, indices).astype(jnp.int32)


def assignment_by_size(class_sizes: np.ndarray, num_proxies: int) -> np.ndarray:
  """Assigns one proxy to each class, and more to classes with more examples.

  The remaining proxies are assigned one by one, each to the class with the most
  examples per proxy so far (Adams's method of apportionment); ties go to the
  lower label.

  Args:
    class_sizes: int [num_classes], number of examples of each class.
    num_proxies: at least num_classes.

  Returns:
    int32 [num_classes, k], the proxies of each class, ascending, in
    [0, num_proxies); k is the largest number per class. Rows with fewer proxies
    repeat their first.

  Raises:
    ValueError: if there are fewer proxies than classes.
  """
  num_classes = len(class_sizes)
  if num_proxies < num_classes:
    raise ValueError(
      f'num_proxies ({num_proxies}) must be at least the number of classes '
      f'({num_classes}): use more proxies, or assign them at random.'
    )
  queue = [(-float(size), label) for label, size in enumerate(class_sizes)]
  heapq.heapify(queue)
  counts = np.ones(num_classes, int)
  for _ in range(num_proxies - num_classes):
    _, label = queue[0]
    counts[label] += 1
    examples_per_proxy = class_sizes[label] / counts[label]
    heapq.heapreplace(queue, (-float(examples_per_proxy), label))
  firsts = np.cumsum(counts) - counts
  offsets = np.arange(counts.max())[None, :]
  offsets = np.where(offsets < counts[:, None], offsets, 0)
  return (firsts[:, None] + offsets).astype(np.int32)


def nearest_proxies(embeddings: chex.Array, proxies: chex.Array) -> jax.Array:
  """Assigns each embedding to its nearest proxy, both on the unit sphere.

  p(x) = argmin_p d(x, p), Eq. 5 of https://arxiv.org/abs/1703.07464.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].

  Returns:
    int32 [batch], in [0, num_proxies). Ties go to the lower index.
  """
  chex.assert_rank([embeddings, proxies], 2)
  # An embedding's norm does not change the order of its proxies.
  cosines = distances.products(embeddings, distances.unit_norm(proxies))
  return jnp.argmax(cosines, axis=1).astype(jnp.int32)


def proxy_approximation_error(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array | None = None,
  *,
  where: chex.Array | None = None,
) -> jax.Array:
  """Returns the largest squared distance of an embedding to its proxy.

  eps = max_x d(x, p(x)), Eq. 6 of https://arxiv.org/abs/1703.07464, where d is
  the squared Euclidean distance on the unit sphere.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].
    labels: int [batch], each embedding's proxy; by default the nearest.
    where: bool [batch], embeddings to include; by default all.

  Returns:
    float32 [], in [0, 4]; 0 if no embedding is included.
  """
  if labels is None:
    labels = nearest_proxies(embeddings, proxies)
  targets = distances.unit_norm(jnp.asarray(proxies)[labels])
  squares = jnp.sum((distances.unit_norm(embeddings) - targets) ** 2, axis=1)
  where = True if where is None else masks.as_mask(where)
  return jnp.max(squares, where=where, initial=0)


def ranking_bound(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  error: chex.Array,
  *,
  where: chex.Array | None = None,
) -> jax.Array:
  """Bounds the fraction of misordered triplets, using only their proxies.

    P[d(x, y) >= d(x, z)] <= P[d(x, p(y)) - d(x, p(z)) >= -4 sqrt(eps)]

  (Sec. 3 of https://arxiv.org/abs/1703.07464), where x is an embedding of the
  batch, y another point of its class, z a point of any other class, each class
  with the same weight, d the squared Euclidean distance of unit vectors, and
  every y and z is within eps of its proxy.

  The slack: d(x, y) = 2 - 2 x.y, so replacing y by p(y), at a distance of at
  most sqrt(eps), changes d(x, y) by at most 2 sqrt(eps). The same holds for z,
  and the two changes can add up to 4 sqrt(eps). Some triplets attain it, so no
  smaller constant holds for squared distances. (The propositions of the paper
  have 2 sqrt(eps), which is right for d = -x.y, and 2 sqrt(2 eps), as far as
  they are quoted.) By the same argument the NCA loss of points is at most the
  Proxy-NCA loss + 4 sqrt(eps) / T.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim], at least two.
    labels: int [batch], in [0, num_classes).
    error: float32 [], eps, of `proxy_approximation_error` over all points.
    where: bool [batch], embeddings to include as x; by default all.

  Returns:
    float32 [], in [0, 1]; 0 if no embedding is included.
  """
  cosines = distances.cosines(embeddings, proxies)
  is_target = labels[:, None] == jnp.arange(proxies.shape[0])[None, :]
  targets = jnp.sum(cosines, axis=1, where=is_target, keepdims=True)
  is_wrong = 2 * (cosines - targets) >= -4 * jnp.sqrt(error)
  is_pair = ~is_target
  if where is not None:
    is_pair &= masks.as_mask(where)[:, None]
  num_pairs = jnp.maximum(jnp.sum(is_pair), 1)
  return jnp.sum(is_wrong & is_pair) / num_pairs
