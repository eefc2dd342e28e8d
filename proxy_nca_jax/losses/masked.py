"""Reductions under a mask, finite in value and gradient where it is empty."""

import chex
import jax
import jax.numpy as jnp


def mean(x: chex.Array, *, where: chex.Array) -> jax.Array:
  """The mean over all elements where the mask holds; 0 if it holds nowhere."""
  return jnp.sum(x, where=where) / jnp.maximum(jnp.sum(where), 1)


def log1p_sum_exp(
    x: chex.Array, *, axis: int, where: chex.Array
) -> jax.Array:
  """log(1 + sum of exp(x)) along an axis; 0 where the mask is empty."""
  x = jnp.where(where, x, -jnp.inf)
  top = jax.lax.stop_gradient(jnp.maximum(jnp.max(x, axis, keepdims=True), 0))
  total = jnp.sum(jnp.exp(x - top), axis)
  top = jnp.squeeze(top, axis)
  return top + jnp.log(jnp.exp(-top) + total)
