"""Corrections for class imbalance, which Proxy-NCA itself does not have.

Both take `counts: int [num_classes]`, the number of training examples of each
class, at least 1. The results are constants of a run.

References:
  Menon et al., Long-tail learning via logit adjustment, ICLR 2021,
    https://arxiv.org/abs/2007.07314
  Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR
    2019, https://arxiv.org/abs/1901.05555 (its weights lie between those of
    the powers 0 and 1)
"""

import chex
import jax
import jax.numpy as jnp


def class_weights(counts: chex.Array, *, power: float = 1.0) -> jax.Array:
  """Returns n^-power of each class, scaled to a mean of 1 over all examples.

  >>> print(class_weights(jnp.array([3, 1])))
  [0.6666667 2.       ]

  Multiply them with unreduced losses: `weights[labels] * loss`.

  Args:
    counts: int [num_classes], at least 1.
    power: 0 weights all examples equally, 1 all classes.

  Returns:
    float32 [num_classes].
  """
  chex.assert_rank(counts, 1)
  counts = jnp.asarray(counts, jnp.float32)
  weights = counts**-power
  return weights * jnp.sum(counts) / jnp.sum(weights * counts)


def log_priors(counts: chex.Array, *, power: float = 1.0) -> jax.Array:
  """Returns power * log(n / total), the scaled log frequencies of the classes.

  Passed as `log_priors` to `proxy_nca_loss` they are the logit adjustment of
  Menon et al., with tau = `power`: it enlarges the margin of rare classes.

  Args:
    counts: int [num_classes], at least 1.
    power: 0 disables the adjustment.

  Returns:
    float32 [num_classes], at most 0.
  """
  chex.assert_rank(counts, 1)
  counts = jnp.asarray(counts, jnp.float32)
  return power * jnp.log(counts / jnp.sum(counts))
