"""Masks as callers give them: bool, or integers 0 and 1."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def as_mask(mask: chex.Array, *, name: str = 'where') -> chex.Array:
  """Returns a mask as bool.

  `~` and `&` of integers are not those of truth values, and integers index
  where bool selects, so every function converts its masks before use.

  Args:
    mask: bool [...], or integers 0 and 1.
    name: the argument's name, for the message.

  Returns:
    bool [...]: a NumPy array, or a JAX array if the mask is one. Under a jit,
    where values are unknown, any integer but 0 is True.

  Raises:
    ValueError: if the mask is of another type or holds other values.
  """
  if not isinstance(mask, jax.Array):
    mask = np.asarray(mask)
  is_known = not isinstance(mask, jax.core.Tracer)
  if mask.dtype == bool:
    return mask
  if not jnp.issubdtype(mask.dtype, jnp.integer):
    raise ValueError(
      f'{name} must be bool, or integers 0 and 1; got {mask.dtype}.'
    )
  if is_known and not np.isin(np.asarray(mask), (0, 1)).all():
    raise ValueError(
      f'{name} must be bool, or integers 0 and 1; got {mask.dtype} with other '
      'values.'
    )
  return mask.astype(bool)
