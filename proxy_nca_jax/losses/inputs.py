"""What all losses do with their inputs: check, cast, leave out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def prepare(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  num_classes: int | None = None,
  where: chex.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Checks the inputs of a loss and takes the examples out that do not count.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    num_classes: with it, labels must be in [0, num_classes).
    where: bool [batch], or None for all.

  Returns:
    (embeddings, where): float32 [batch, dim], 0 where not; bool [batch].

  Raises:
    ValueError: if a known label has no proxy.
  """
  chex.assert_rank([embeddings, labels], [2, 1])
  chex.assert_equal_shape_prefix([embeddings, labels], 1)
  chex.assert_type(labels, int)
  if where is None:
    where = jnp.ones(labels.shape, bool)
  chex.assert_equal_shape([labels, where])
  if num_classes is not None:
    check_labels(labels, num_classes, where=where)
  # An example that does not count must not reach the arithmetic: the zero
  # cotangent of its loss times an infinite derivative would be NaN.
  embeddings = jnp.where(where[:, None], embeddings.astype(jnp.float32), 0)
  return embeddings, where


def check_labels(
  labels: chex.Array, num_proxies: int, *, where: chex.Array | None = None
) -> None:
  """Raises ValueError if a known label has no proxy; traced ones pass."""
  if isinstance(labels, jax.core.Tracer) or isinstance(where, jax.core.Tracer):
    return
  labels = np.asarray(labels)
  if where is not None:
    labels = labels[np.asarray(where)]
  wrong = labels[(labels < 0) | (labels >= num_proxies)]
  if wrong.size:
    raise ValueError(
      f'{wrong.size} of {labels.size} labels have no proxy, such as '
      f'{wrong[0]}: labels must be in [0, {num_proxies}), the number of '
      'proxies. Renumber the classes from 0.'
    )


def finish(
  loss: chex.Array, labels: chex.Array, num_classes: int, where: chex.Array
) -> jax.Array:
  """Marks what cannot be: NaN for a label without a proxy.

  Args:
    loss: float32 [batch], or [] for a loss of the batch as a whole.
    labels: int [batch].
    num_classes: labels from 0 to below it have a proxy.
    where: bool [batch], examples that count.

  Returns:
    The loss; of each example NaN where its label has no proxy and 0 where it
    does not count; of a batch NaN if any label that counts has no proxy.
  """
  is_wrong = where & ((labels < 0) | (labels >= num_classes))
  if loss.ndim == 0:
    return jnp.where(jnp.any(is_wrong), jnp.nan, loss)
  return jnp.where(where, jnp.where(is_wrong, jnp.nan, loss), 0.0)


def is_class(labels: chex.Array, num_classes: int) -> jax.Array:
  """Whether each example is of each class: bool [batch, num_classes]."""
  return labels[:, None] == jnp.arange(num_classes)[None, :]


def pairs(labels: chex.Array, where: chex.Array) -> tuple[jax.Array, jax.Array]:
  """Whether two examples are a positive and a negative pair of the batch.

  Args:
    labels: int [batch], of any values.
    where: bool [batch], examples that count; the others are in no pair.

  Returns:
    (is_positive, is_negative): bool [batch, batch], symmetric. No example is
    its own positive.
  """
  is_alike = labels[:, None] == labels[None, :]
  is_pair = where[:, None] & where[None, :]
  is_self = jnp.eye(labels.shape[0], dtype=bool)
  return is_alike & is_pair & ~is_self, ~is_alike & is_pair
