"""Batch normalization with torch's running statistics."""

import functools

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
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Normalizes a batch.

    Args:
      x: float [..., channels].
      train: whether to normalize by the statistics of the batch and to update
        the running ones, instead of normalizing by the running ones.

    Returns:
      [..., channels] of `dtype`.
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
      y, mean, var = _normalize_batch(x, scale, bias, self.epsilon)
      count = x.size // channels
      batch = {'mean': mean, 'var': var * (count / max(count - 1, 1))}
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


def _row(vector, x):
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _normalize(x, mean, factor, bias):
  return (x - _row(mean, x)) * _row(factor, x) + _row(bias, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize_batch(x, scale, bias, epsilon):
  """Returns the normalized batch, and its biased mean and variance.

  The gradients are those of equation (2) in Ioffe and Szegedy, Batch
  Normalization, https://arxiv.org/abs/1502.03167, in two passes over the batch;
  derived automatically they take twice the time on CPUs. Mean and variance have
  none: they only update the running statistics.
  """
  axes = tuple(range(x.ndim - 1))
  mean = jnp.mean(x, axes)
  # Two passes: E[x^2] - E[x]^2 cancels where the mean is large.
  var = jnp.mean((x - _row(mean, x)) ** 2, axes)
  factor = scale * jax.lax.rsqrt(var + epsilon)
  return _normalize(x, mean, factor, bias), mean, var


def _normalize_batch_forward(x, scale, bias, epsilon):
  y, mean, var = _normalize_batch(x, scale, bias, epsilon)
  return (y, mean, var), (x, scale, mean, jax.lax.rsqrt(var + epsilon))


def _normalize_batch_backward(epsilon, saved, gradients):
  del epsilon
  x, scale, mean, inverse = saved
  gradient, _, _ = gradients
  axes = tuple(range(x.ndim - 1))
  normalized = (x - _row(mean, x)) * _row(inverse, x)
  dbias = jnp.sum(gradient, axes)
  dscale = jnp.sum(gradient * normalized, axes)
  count = x.size // x.shape[-1]
  dx = _row(scale * inverse, x) * (
    gradient - _row(dbias / count, x) - normalized * _row(dscale / count, x)
  )
  return dx, dscale, dbias


_normalize_batch.defvjp(_normalize_batch_forward, _normalize_batch_backward)
