"""Products and distances of rows in float32, with gradients that are finite.

One matmul serves all pairs, at full precision: accelerators would otherwise
round the factors to bfloat16, and a ranking depends on the last digits.
"""

import chex
import jax
import jax.numpy as jnp


def unit_norm(x: chex.Array) -> jax.Array:
  """Projects the rows of float [..., dim] to the unit sphere; 0 stays 0.

  Rows are first divided by their largest entry, a constant to the gradient
  (the result does not depend on it), so that the squares of very large or very
  small entries neither overflow nor vanish.
  """
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  largest = jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))
  x = x / largest
  squares = jnp.sum(x**2, axis=-1, keepdims=True)
  # The square root has no derivative at 0; a zero row gets the gradient of 1.
  return x * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


def products(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns x.y of all pairs, float32 [n, m], of float [n, d] and [m, d]."""
  return jnp.dot(
    x.astype(jnp.float32),
    y.astype(jnp.float32).T,
    precision=jax.lax.Precision.HIGHEST,
  )


def cosines(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns the cosines of all pairs, float32 [n, m]; 0 for a zero row."""
  return products(unit_norm(x), unit_norm(y))


def squared_distances(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns ||x - y||^2 of all pairs, float32 [n, m], at least 0.

  From ||x||^2 - 2 x.y + ||y||^2, whose rounding is relative to the norms: rows
  much nearer to each other than to the origin lose digits.
  """
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  norms = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None, :]
  return jnp.maximum(norms - 2 * products(x, y), 0)


def safe_sqrt(x: chex.Array) -> jax.Array:
  """The square root of x >= 0, with a derivative of 0 at 0, not infinity."""
  return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
