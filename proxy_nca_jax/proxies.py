"""Proxies: their initialisation, who belongs to whom, and how well."""

import heapq

import chex
import jax
import jax.numpy as jnp
import numpy as np

from proxy_nca_jax import distances


def init_proxies(
  key: chex.PRNGKey, num_proxies: int, dim: int, *, norm: float = 1.0
) -> jax.Array:
  """Draws float32 [num_proxies, dim] from N(0, norm^2/dim): norms of about so.

  The paper names no scale. The loss projects proxies to the unit sphere, where
  a gradient is inverse to the norm, so that the norm and the proxies' learning
  rate belong together: norms near 1 keep the rate independent of the dimension.
  """
  return jax.random.normal(key, (num_proxies, dim)) * norm / jnp.sqrt(dim)


def random_assignment(
  key: chex.PRNGKey, num_classes: int, num_proxies: int
) -> jax.Array:
  """Assigns classes to proxies at random, as evenly as their numbers allow.

  With fewer proxies than classes a proxy serves several classes (the paper's
  fractional assignment); with more, a class has several proxies.

  Args:
    key: of `jax.random.key`.
    num_classes: at least 1.
    num_proxies: at least 1.

  Returns:
    int32 [num_classes, k], the proxies of each class, in [0, num_proxies); k is
    the most that a class has. A row with fewer repeats one of its own.
  """
  most = -(-num_proxies // num_classes)
  order = jnp.arange(most * num_classes)
  # A place beyond the proxies repeats the one a row of places before.
  beyond = (order >= num_proxies) & (most > 1)
  order = jnp.where(beyond, order - num_classes, order) % num_proxies
  order = order.reshape(most, num_classes).T
  return jax.random.permutation(key, order).astype(jnp.int32)


def assignment_by_size(class_sizes: np.ndarray, num_proxies: int) -> np.ndarray:
  """Gives each class a proxy, and the rest to those with the most examples.

  One by one, the next proxy goes to the class with the most examples a proxy
  (the method of D'Hondt); the first of equals.

  Args:
    class_sizes: int [num_classes], the examples of each.
    num_proxies: at least num_classes.

  Returns:
    int32 [num_classes, k], the proxies of each class, ascending, in
    [0, num_proxies); k is the most that a class has. A row with fewer repeats
    its first.

  Raises:
    ValueError: if there are fewer proxies than classes.
  """
  num_classes = len(class_sizes)
  if num_proxies < num_classes:
    raise ValueError(
      f'{num_proxies} proxies are too few for one of each of {num_classes} '
      'classes: assign them at random, or ask for more.'
    )
  queue = [(-float(size), label) for label, size in enumerate(class_sizes)]
  heapq.heapify(queue)
  numbers = np.ones(num_classes, int)
  for _ in range(num_proxies - num_classes):
    _, label = queue[0]
    numbers[label] += 1
    share = class_sizes[label] / numbers[label]
    heapq.heapreplace(queue, (-float(share), label))
  firsts = np.cumsum(numbers) - numbers
  places = np.arange(numbers.max())[None, :]
  places = np.where(places < numbers[:, None], places, 0)
  return (firsts[:, None] + places).astype(np.int32)


def nearest_proxies(embeddings: chex.Array, proxies: chex.Array) -> jax.Array:
  """Assigns each embedding to its nearest proxy, both on the unit sphere.

  p(x) = argmin_p d(x, p), Eq. 5 of https://arxiv.org/abs/1703.07464.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].

  Returns:
    int32 [batch], in [0, num_proxies). The lowest index wins a tie.
  """
  chex.assert_rank([embeddings, proxies], 2)
  # The length of an embedding does not change the order of its proxies.
  cosines = distances.products(embeddings, distances.unit_norm(proxies))
  return jnp.argmax(cosines, axis=1).astype(jnp.int32)


def proxy_approximation_error(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array | None = None,
  *,
  where: chex.Array | None = None,
) -> jax.Array:
  """The largest distance of a point to its proxy, both on the unit sphere.

  eps = max_x d(x, p(x)), Eq. 6 of https://arxiv.org/abs/1703.07464, d the
  squared Euclidean distance. The bounds below hold for points within it.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_proxies, dim].
    labels: int [batch], the proxy of each point; by default its nearest.
    where: bool [batch], points that count.

  Returns:
    float32 [], in [0, 4]; 0 if no point counts.
  """
  if labels is None:
    labels = nearest_proxies(embeddings, proxies)
  own = distances.unit_norm(jnp.asarray(proxies)[labels])
  squares = jnp.sum((distances.unit_norm(embeddings) - own) ** 2, axis=1)
  return jnp.max(squares, where=where, initial=0)


def nca_bound(
  proxy_loss: chex.Array, error: chex.Array, *, temperature: float
) -> jax.Array:
  """Bounds the NCA loss of points by that of their proxies.

    L(x, y, Z) <= L(x, p(y), p(Z)) + 4 sqrt(eps) / T

  for unit vectors, where every point of y and Z is within eps of its proxy and
  p(Z) holds the proxy of each point of Z: a change of y by sqrt(eps) changes
  ||x - y||^2 = 2 - 2 x.y by at most 2 sqrt(eps), and each z likewise. Some
  triplets attain it: no smaller constant holds for squared distances. (The
  propositions of https://arxiv.org/abs/1703.07464 have 2 sqrt(eps) and
  2 sqrt(2 eps) as far as they are quoted; 2 sqrt(eps) is right for d = -x.y.)

  Args:
    proxy_loss: float32, such as `proxy_nca_loss` with one point of each other
      class in Z.
    error: float32 [], of `proxy_approximation_error`.
    temperature: T of the loss.

  Returns:
    float32, of the shape of `proxy_loss`.
  """
  return proxy_loss + 4 * jnp.sqrt(error) / temperature


def ranking_bound(
  embeddings: chex.Array,
  proxies: chex.Array,
  labels: chex.Array,
  error: chex.Array,
  *,
  where: chex.Array | None = None,
) -> jax.Array:
  """Bounds the share of triplets in the wrong order by that of their proxies.

    P[d(x, y) >= d(x, z)] <= P[d(x, p(y)) - d(x, p(z)) >= -4 sqrt(eps)]

  for unit vectors within eps of their proxies, x a point of the batch, y of its
  class and z of another class, all other classes alike. It is the ranking loss
  of the proxies plus the share of those within the slack (Sec. 3 of
  https://arxiv.org/abs/1703.07464), the slack that of `nca_bound`.

  Args:
    embeddings: float [batch, dim].
    proxies: float [num_classes, dim], at least two.
    labels: int [batch], in [0, num_classes).
    error: float32 [], of `proxy_approximation_error`, of all points.
    where: bool [batch], points that count.

  Returns:
    float32 [], in [0, 1]; 0 if no point counts.
  """
  cosines = distances.cosines(embeddings, proxies)
  is_own = labels[:, None] == jnp.arange(proxies.shape[0])[None, :]
  own = jnp.sum(cosines, axis=1, where=is_own, keepdims=True)
  is_wrong = 2 * (cosines - own) >= -4 * jnp.sqrt(error)
  is_pair = ~is_own if where is None else ~is_own & where[:, None]
  num_pairs = jnp.maximum(jnp.sum(is_pair), 1)
  return jnp.sum(is_wrong & is_pair) / num_pairs
