"""Masked reductions with finite values and gradients for empty masks."""

import chex
import jax
import jax.numpy as jnp


def mean(
  x: chex.Array, *, where: chex.Array, axis: int | None = None
) -> jax.Array:
  """Returns the mean of the unmasked elements; 0 if there are none."""
  count = jnp.sum(where, axis)
  return jnp.sum(x, axis, where=where) / jnp.maximum(count, 1)


def log_sum_exp(x: chex.Array, *, axis: int, where: chex.Array) -> jax.Array:
  """Returns log(sum(exp(x))) along an axis, very negative for an empty mask.

  The exact value, -infinity, has no finite gradient; the lowest float32 has.
  """
  lowest = jnp.finfo(x.dtype).min
  return jax.nn.logsumexp(jnp.where(where, x, lowest), axis)


def log1p_sum_exp(x: chex.Array, *, axis: int, where: chex.Array) -> jax.Array:
  """Returns log(1 + sum(exp(x))) along an axis; 0 for an empty mask."""
  x = jnp.where(where, x, -jnp.inf)
  top = jax.lax.stop_gradient(jnp.maximum(jnp.max(x, axis, keepdims=True), 0))
  total = jnp.sum(jnp.exp(x - top), axis)
  top = jnp.squeeze(top, axis)
  return top + jnp.log(jnp.exp(-top) + total)
