"""Proxies: their initialisation, and who belongs to whom."""

import chex
import jax
import jax.numpy as jnp

from proxy_nca_jax import distances


def init_proxies(
    key: chex.PRNGKey, num_proxies: int, dim: int
) -> jax.Array:
  """Draws float32 [num_proxies, dim] from N(0, 1/dim): norms of about 1.

  The paper names no scale. The loss projects proxies to the unit sphere, where
  a gradient is inverse to the norm: norms near 1 keep the proxies' learning
  rate independent of the dimension.
  """
  return jax.random.normal(key, (num_proxies, dim)) / jnp.sqrt(dim)


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
