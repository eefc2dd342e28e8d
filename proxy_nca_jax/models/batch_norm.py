"""Batch normalization with torch's running statistics."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn


class BatchNorm(nn.Module):
  """Normalizes each channel over the whole batch, in at least float32.

  As in torch's BatchNorm2d, and unlike in `nn.BatchNorm`, the running variance
  averages the unbiased variance of batches, while a batch is normalized by the
  biased one.

  Attributes:
    momentum: decay of the running statistics, 1 - torch's `momentum`.
    epsilon: added to the variance.
    dtype: of the result.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, *, train: bool, where: jax.Array | None = None
  ) -> jax.Array:
    """Normalizes a batch.

    Args:
      x: float [batch, ..., channels].
      train: whether to normalize by the statistics of the batch and to update
        the running ones, instead of normalizing by the running ones.
      where: bool [batch], the rows that the statistics include; by default all.
        Networks do not pass it on: see `masked_statistics`.

    Returns:
      [batch, ..., channels] of `dtype`.
    """
    channels = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    running = {
      'mean': self.variable('batch_stats', 'mean', jnp.zeros, (channels,)),
      'var': self.variable('batch_stats', 'var', jnp.ones, (channels,)),
    }
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if train:
      y, mean, var = _normalize_batch(x, scale, bias, where, self.epsilon)
      count = _count(x, where)
      unbiased = var * (count / jnp.maximum(count - 1, 1))
      batch = {'mean': mean, 'var': unbiased}
      if not self.is_initializing():
        for name, variable in running.items():
          new = batch[name].astype(variable.value.dtype)
          variable.value = (
            self.momentum * variable.value + (1 - self.momentum) * new
          )
      return y.astype(self.dtype)
    mean, var = (running[name].value for name in ('mean', 'var'))
    y = _normalize(x, mean, scale * jax.lax.rsqrt(var + self.epsilon), bias)
    return y.astype(self.dtype)


def masked_statistics(
  where: chex.Array | None,
) -> contextlib.AbstractContextManager:
  """Returns a context in which batch statistics include only some rows.

  Every `BatchNorm` that is called in it gets the mask, in whatever network:
  the modules between need not pass it on.

  Args:
    where: bool [batch]; None includes all.
  """
  if where is None:
    return contextlib.nullcontext()

  def add_mask(call, args, kwargs, context):
    is_norm = isinstance(context.module, BatchNorm)
    if is_norm and context.method_name == '__call__':
      kwargs = {'where': where} | kwargs
    return call(*args, **kwargs)

  return nn.intercept_methods(add_mask)


def _count(x, where):
  """Returns the number of values per channel that the statistics include."""
  count = x.size // x.shape[-1]
  if where is None:
    return count
  return jnp.maximum(jnp.sum(where), 1) * (count // x.shape[0])


def _weigh(x, where):
  """Returns x with rows of 0 where the mask is False."""
  if where is None:
    return x
  return jnp.where(where.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0)


def _row(vector, x):
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _normalize(x, mean, factor, bias):
  return (x - _row(mean, x)) * _row(factor, x) + _row(bias, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalize_batch(x, scale, bias, where, epsilon):
  """Returns the normalized batch, and its biased mean and variance.

  The gradients are those of equation (2) in Ioffe and Szegedy, Batch
  Normalization, https://arxiv.org/abs/1502.03167, in two passes over the batch;
  derived automatically they take twice the time on CPUs. Mean and variance have
  none: they only update the running statistics.
  """
  axes, count = tuple(range(x.ndim - 1)), _count(x, where)
  mean = jnp.sum(_weigh(x, where), axes) / count
  # Two passes: E[x^2] - E[x]^2 cancels where the mean is large.
  var = jnp.sum(_weigh((x - _row(mean, x)) ** 2, where), axes) / count
  factor = scale * jax.lax.rsqrt(var + epsilon)
  return _normalize(x, mean, factor, bias), mean, var


def _normalize_batch_forward(x, scale, bias, where, epsilon):
  y, mean, var = _normalize_batch(x, scale, bias, where, epsilon)
  return (y, mean, var), (x, scale, where, mean, jax.lax.rsqrt(var + epsilon))


def _normalize_batch_backward(epsilon, saved, gradients):
  del epsilon
  x, scale, where, mean, inverse = saved
  gradient, _, _ = gradients
  axes, count = tuple(range(x.ndim - 1)), _count(x, where)
  normalized = (x - _row(mean, x)) * _row(inverse, x)
  dbias = jnp.sum(gradient, axes)
  dscale = jnp.sum(gradient * normalized, axes)
  # All rows depend on the statistics, which depend on the included rows.
  common = _row(dbias / count, x) + normalized * _row(dscale / count, x)
  dx = _row(scale * inverse, x) * (gradient - _weigh(common, where))
  return dx, dscale, dbias, None


_normalize_batch.defvjp(_normalize_batch_forward, _normalize_batch_backward)
