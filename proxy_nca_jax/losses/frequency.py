"""Corrections for classes of different sizes; the paper has none.

Both take `counts: int [num_classes]`, the training examples of each class, at
least 1, and are constants of a run.

References:
  Menon et al., Long-tail learning via logit adjustment, ICLR 2021,
    https://arxiv.org/abs/2007.07314
  Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR
    2019, https://arxiv.org/abs/1901.05555 (whose weights lie between those of
    the powers 0 and 1)
"""

import chex
import jax
import jax.numpy as jnp


def class_weights(counts: chex.Array, *, power: float = 1.0) -> jax.Array:
  """Weights a class of n examples by n^-power, the mean of all examples by 1.

  >>> print(class_weights(jnp.array([3, 1])))
  [0.6666667 2.       ]

  Multiply them with the losses of examples, as `weights[labels] * loss`.

  Args:
    counts: int [num_classes], at least 1.
    power: 0 weighs every example alike, 1 every class.

  Returns:
    float32 [num_classes].
  """
  chex.assert_rank(counts, 1)
  counts = jnp.asarray(counts, jnp.float32)
  weights = counts**-power
  return weights * jnp.sum(counts) / jnp.sum(weights * counts)


def log_priors(counts: chex.Array, *, power: float = 1.0) -> jax.Array:
  """The logarithms of the classes' shares of the examples, times `power`.

  As `log_priors` of `proxy_nca_loss` they are logit adjustment, with `power`
  the tau of Menon et al.: a rare class must win by more than its rarity.

  Args:
    counts: int [num_classes], at least 1.
    power: 0 adjusts nothing.

  Returns:
    float32 [num_classes], at most 0.
  """
  chex.assert_rank(counts, 1)
  counts = jnp.asarray(counts, jnp.float32)
  return power * jnp.log(counts / jnp.sum(counts))
