"""Batch normalization with torch's running statistics."""

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
    axes = tuple(range(x.ndim - 1))
    row = (1,) * len(axes) + (channels,)
    mean, var = (running[name].value.reshape(row) for name in ('mean', 'var'))
    if train:
      mean = jnp.mean(x, axes, keepdims=True)
      # Two passes: E[x^2] - E[x]^2 cancels where the mean is large.
      var = jnp.mean((x - mean) ** 2, axes, keepdims=True)
      count = x.size // channels
      batch = {'mean': mean, 'var': var * (count / max(count - 1, 1))}
      if not self.is_initializing():
        for name, variable in running.items():
          new = batch[name].reshape(channels).astype(variable.value.dtype)
          variable.value = (
            self.momentum * variable.value + (1 - self.momentum) * new
          )
    scale = scale.reshape(row) * jax.lax.rsqrt(var + self.epsilon)
    return ((x - mean) * scale + bias.reshape(row)).astype(self.dtype)
