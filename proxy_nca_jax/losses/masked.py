"""Reductions under a mask, finite in value and gradient where it is empty."""

import chex
import jax
import jax.numpy as jnp


def mean(
  x: chex.Array, *, where: chex.Array, axis: int | None = None
) -> jax.Array:
  """The mean of the elements where the mask holds; 0 where it holds nowhere."""
  count = jnp.sum(where, axis)
  return jnp.sum(x, axis, where=where) / jnp.maximum(count, 1)


def log_sum_exp(x: chex.Array, *, axis: int, where: chex.Array) -> jax.Array:
  """log(sum of exp(x)) along an axis, very negative where the mask is empty.

  Minus infinity, which it is, has no gradient; the lowest number has.
  """
  lowest = jnp.finfo(x.dtype).min
  return jax.nn.logsumexp(jnp.where(where, x, lowest), axis)


def log1p_sum_exp(x: chex.Array, *, axis: int, where: chex.Array) -> jax.Array:
  """log(1 + sum of exp(x)) along an axis; 0 where the mask is empty."""
  x = jnp.where(where, x, -jnp.inf)
  top = jax.lax.stop_gradient(jnp.maximum(jnp.max(x, axis, keepdims=True), 0))
  total = jnp.sum(jnp.exp(x - top), axis)
  top = jnp.squeeze(top, axis)
  return top + jnp.log(jnp.exp(-top) + total)
