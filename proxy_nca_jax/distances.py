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
  x = x / _largest_entry(x)
  return x * _inverse_norm(x)


def _largest_entry(x: chex.Array) -> jax.Array:
  """The largest |entry| of each row, float [..., 1], or 1 if that is 0."""
  largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  return jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))


def _inverse_norm(x: chex.Array) -> jax.Array:
  """1 / ||x|| of each row, float [..., 1], or 1 if that is 1 / 0."""
  squares = jnp.sum(x**2, axis=-1, keepdims=True)
  # The square root has no derivative at 0; a zero row gets the gradient of 1.
  return jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


def products(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns x.y of all pairs, float32 [n, m], of float [n, d] and [m, d]."""
  return jnp.dot(
    x.astype(jnp.float32),
    y.astype(jnp.float32).T,
    precision=jax.lax.Precision.HIGHEST,
  )


def projections(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns x.y / ||y|| of all pairs, float32 [n, m]; 0 where y is 0.

  The same as products(x, unit_norm(y)), but it never holds unit_norm(y), which
  is as large as all proxies, neither forwards nor backwards. Entries of y from
  1e-37 to 1e35 lose nothing.
  """
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  largest = _largest_entry(y)
  return _project(x, y, _inverse_norm(y / largest) / largest)


@jax.custom_jvp
def _project(x, y, inverse):
  return products(x, y) * inverse.T


@_project.defjvp
def _project_jvp(primals, tangents):
  # Of u = y / ||y||, du = (dy - u (u.dy)) / ||y||, which holds what `inverse`
  # changes. Transposed, it sums over dim; derived from x.y / ||y|| it would
  # keep all products, to sum over n.
  (x, y, inverse), (dx, dy, _) = primals, tangents
  unit = y * inverse
  across = dy - unit * jnp.sum(unit * dy, axis=1, keepdims=True)
  tangent = (products(dx, y) + products(x, across)) * inverse.T
  return _project(x, y, inverse), tangent


def cosines(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns the cosines of all pairs, float32 [n, m]; 0 for a zero row."""
  return projections(unit_norm(x), y)


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
