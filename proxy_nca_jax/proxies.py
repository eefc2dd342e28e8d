"""Proxies: their initialisation and the assignment of points to them."""

import chex
import jax
import jax.numpy as jnp


def init_proxies(
    key: chex.PRNGKey, num_proxies: int, dim: int, *, norm: float = 1.0
) -> jax.Array:
  """Draws float32 [num_proxies, dim] from N(0, norm^2/dim): norms of about so.

  The paper names no scale. The loss projects proxies to the unit sphere, where
  a gradient is inverse to the norm, so that the norm and the proxies' learning
  rate belong together: norms near 1 keep the rate independent of the dimension.
  """
  return jax.random.normal(key, (num_proxies, dim)) * norm / jnp.sqrt(dim)


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
  proxies = proxies.astype(jnp.float32)
  # The length of an embedding does not change the order of its proxies.
  norms = jnp.maximum(jnp.linalg.norm(proxies, axis=1), 1e-30)
  cosines = jnp.dot(
    embeddings.astype(jnp.float32),
    (proxies / norms[:, None]).T,
    precision=jax.lax.Precision.HIGHEST,
  )
  return jnp.argmax(cosines, axis=1).astype(jnp.int32)
