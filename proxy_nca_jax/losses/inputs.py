"""Shared input handling of the losses: validation, float32 cast, masking."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from proxy_nca_jax import masks


def validate(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  num_classes: int | None = None,
  where: chex.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Validates the inputs of a loss, casts to float32, zeroes masked examples.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    num_classes: if given, labels must be in [0, num_classes).
    where: bool [batch], or integers 0 and 1, examples to include; None
      includes all.

  Returns:
    (embeddings, where): float32 [batch, dim], 0 for masked examples; and bool
    [batch].

  Raises:
    ValueError: if a concrete label is out of range, or the mask is neither bool
      nor 0 and 1.
  """
  chex.assert_rank([embeddings, labels], [2, 1])
  chex.assert_equal_shape_prefix([embeddings, labels], 1)
  chex.assert_type(labels, int)
  where = jnp.ones(labels.shape, bool) if where is None else where
  where = masks.as_mask(where)
  chex.assert_equal_shape([labels, where])
  if num_classes is not None:
    check_labels(labels, num_classes, where=where)
  # Masked before any arithmetic: the zero cotangent of a masked loss times an
  # infinite derivative would be NaN.
  embeddings = jnp.where(where[:, None], embeddings.astype(jnp.float32), 0)
  return embeddings, where


def check_labels(
  labels: chex.Array, num_proxies: int, *, where: chex.Array | None = None
) -> None:
  """Raises ValueError if a label is out of range; traced ones are ignored."""
  if isinstance(labels, jax.core.Tracer) or isinstance(where, jax.core.Tracer):
    return
  labels = np.asarray(labels)
  if where is not None:
    labels = labels[np.asarray(masks.as_mask(where))]
  invalid = labels[(labels < 0) | (labels >= num_proxies)]
  if invalid.size:
    raise ValueError(
      f'{invalid.size} of {labels.size} labels are out of range, such as '
      f'{invalid[0]}: labels must be in [0, {num_proxies}), one per proxy. '
      'Renumber the classes from 0.'
    )


def mask_loss(
  loss: chex.Array, labels: chex.Array, num_classes: int, where: chex.Array
) -> jax.Array:
  """Masks the loss, and sets it to NaN where a label is out of range.

  Args:
    loss: float32 [batch], or [] for a loss of the batch as a whole.
    labels: int [batch].
    num_classes: labels in [0, num_classes) are valid.
    where: bool [batch], examples to include.

  Returns:
    float32 [batch], 0 for masked examples and NaN for invalid labels; or
    float32 [], NaN if any included label is invalid.
  """
  is_invalid = where & ((labels < 0) | (labels >= num_classes))
  if loss.ndim == 0:
    return jnp.where(jnp.any(is_invalid), jnp.nan, loss)
  return jnp.where(where, jnp.where(is_invalid, jnp.nan, loss), 0.0)


def one_hot(labels: chex.Array, num_classes: int) -> jax.Array:
  """Returns the one-hot labels: bool [batch, num_classes]."""
  return labels[:, None] == jnp.arange(num_classes)[None, :]


def pairs(labels: chex.Array, where: chex.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the masks of the positive and the negative pairs of a batch.

  Args:
    labels: int [batch], of any values.
    where: bool [batch], examples to include; others are in no pair.

  Returns:
    (is_positive, is_negative): bool [batch, batch], symmetric. An example is
    not paired with itself.
  """
  is_same_class = labels[:, None] == labels[None, :]
  is_pair = where[:, None] & where[None, :]
  is_self = jnp.eye(labels.shape[0], dtype=bool)
  is_positive = is_same_class & is_pair & ~is_self
  return is_positive, ~is_same_class & is_pair
