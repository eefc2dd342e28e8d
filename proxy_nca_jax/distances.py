"""Inner products and distances of rows, in float32, with finite gradients.

All pairs are computed by one matmul at full precision, unless the caller sets
another by `jax.default_matmul_precision`. By default accelerators round the
factors to bfloat16, but a ranking depends on the last digits.
"""

import chex
import jax
import jax.numpy as jnp


def unit_norm(x: chex.Array) -> jax.Array:
  """Projects rows to the unit sphere; a zero row stays 0.

  Rows are first divided by their largest absolute entry, so that squares
  neither overflow nor underflow. The result does not depend on this divisor,
  which is therefore a constant to the gradient.

  Args:
    x: float [..., dim].

  Returns:
    float32 [..., dim].
  """
  x = x.astype(jnp.float32)
  x = x / _largest_entry(x)
  return x * _inverse_norm(x)


def _largest_entry(x: chex.Array) -> jax.Array:
  """Returns max |x| of each row, or 1 for a zero row: float32 [..., 1]."""
  largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  return jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))


def _inverse_norm(x: chex.Array) -> jax.Array:
  """Returns 1 / ||x|| of each row, or 1 for a zero row: float32 [..., 1]."""
  squares = jnp.sum(x**2, axis=-1, keepdims=True)
  # The square root has no derivative at 0: a zero row has a constant norm of 1.
  return jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


def products(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns x.y of all pairs: float [n, d] and [m, d] to float32 [n, m]."""
  is_set = jax.config.jax_default_matmul_precision is not None
  return jnp.dot(
    x.astype(jnp.float32),
    y.astype(jnp.float32).T,
    precision=None if is_set else jax.lax.Precision.HIGHEST,
  )


def projections(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns x.y / ||y|| of all pairs, float32 [n, m]; 0 where y is 0.

  The same as products(x, unit_norm(y)), without materializing unit_norm(y),
  which is as large as all proxies, in the forward or the backward pass. Entries
  of y between 1e-37 and 1e35 lose no precision.
  """
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  largest = _largest_entry(y)
  return _project(x, y, _inverse_norm(y / largest) / largest)


@jax.custom_jvp
def _project(x, y, inverse):
  return products(x, y) * inverse.T


@_project.defjvp
def _project_jvp(primals, tangents):
  # u = y / ||y|| has du = (dy - u (u.dy)) / ||y||; this includes the derivative
  # of `inverse`. Its transpose reduces over dim. The derivative of the form
  # x.y / ||y|| would instead keep all products, to reduce them over n.
  (x, y, inverse), (dx, dy, _) = primals, tangents
  unit = y * inverse
  tangential = dy - unit * jnp.sum(unit * dy, axis=1, keepdims=True)
  tangent = (products(dx, y) + products(x, tangential)) * inverse.T
  return _project(x, y, inverse), tangent


def cosines(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns the cosines of all pairs, float32 [n, m]; 0 with a zero row."""
  return projections(unit_norm(x), y)


def squared_distances(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns ||x - y||^2 of all pairs, float32 [n, m], at least 0.

  Computed as ||x||^2 - 2 x.y + ||y||^2, with an error relative to the norms:
  distances much smaller than the norms lose digits.
  """
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  norms = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None, :]
  return jnp.maximum(norms - 2 * products(x, y), 0)


# Below this squared distance, relative to the squared norms, `lengths_of_
# differences` computes differences: at it, rounding changes a length by 1e-5.
_NEAR = 1e-4


def lengths_of_differences(x: chex.Array, y: chex.Array) -> jax.Array:
  """Returns ||x_i - y_j|| of all pairs of rows, float32 [n, m].

  Rows that coincide are at a distance of exactly 0, and near ones lose no
  digits: the square root would turn the rounding of `squared_distances`, 1e-7
  of the squared norms, into 3e-4. If some rows are that near, all rows are
  compared one by one, in both passes, since all differences at a time would
  take n m dim; this takes up to fifteen times as long.

  Args:
    x: float [n, dim].
    y: float [m, dim], whose first n rows are those of x.
  """
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  squares = squared_distances(x, y)
  itself = jnp.eye(*squares.shape, dtype=bool)
  squares = jnp.where(itself, 0, squares)
  norms = jnp.maximum(
    jnp.sum(x**2, axis=1)[:, None], jnp.sum(y**2, axis=1)[None, :]
  )
  is_near = squares < _NEAR * norms

  def lengths_of_row(row):
    return safe_sqrt(jnp.sum((row[None, :] - y) ** 2, axis=1))

  return jax.lax.cond(
    jnp.any(is_near & ~itself),
    lambda: jax.lax.map(jax.checkpoint(lengths_of_row), x),
    lambda: safe_sqrt(squares),
  )


def safe_sqrt(x: chex.Array) -> jax.Array:
  """Returns the square root of x >= 0, with derivative 0 at 0."""
  return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
