"""The optimizer: parameter groups, their learning rates and schedules."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from proxy_nca_jax import fine_tuning

if TYPE_CHECKING:
  # benchmarks/train_step.py runs without ml_collections.
  import ml_collections

GROUPS = ('backbone', 'head', 'proxies')
OPTIMIZERS = ('adam', 'adamw', 'rmsprop', 'sgd')
SCHEDULES = ('constant', 'cosine', 'exponential', 'step')


def make_optimizer(
  config: ml_collections.ConfigDict,
) -> optax.GradientTransformation:
  """Builds the optimizer of `params = {'backbone', 'head', 'proxies'}`.

  The update rules follow PyTorch, so that published learning rates carry over:
  eps is added outside the square root, momentum accumulates before the learning
  rate is applied, and weight decay is added to the gradient, except for
  `adamw`, which decouples it.

  For its first `freeze_steps` a group is not updated: its moments keep their
  initial values and its schedule does not advance, while the other groups
  train. This is Proxy-Anchor's warm-up. ProxyNCA++ warms up with a second
  optimizer, so that all moments are reset when the warm-up ends; here those of
  the other groups are kept. In both, batch statistics are updated meanwhile
  unless they are frozen too.
  """
  groups = {name: _make_group(config, name) for name in GROUPS}
  optimizer = optax.partition(
    groups | {fine_tuning.FROZEN: optax.set_to_zero()},
    functools.partial(fine_tuning.labels, config.model),
  )
  if config.optimizer.clip_norm:
    # Outside of the groups: the norm is over the gradients of all of them.
    clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
    optimizer = optax.chain(clip, optimizer)
  return optimizer


def _make_group(run, name):
  config, group = run.optimizer, run.optimizer[name]
  steps = _make_rule(config)
  decay = optax.add_decayed_weights(
    group.weight_decay, mask=None if config.decay_vectors else _are_matrices
  )
  steps = [*steps, decay] if config.name == 'adamw' else [decay, *steps]
  if group.clip_value:
    steps = [optax.clip(group.clip_value), *steps]
  schedule = make_schedule(config, name, run.num_steps)
  steps.append(optax.scale_by_learning_rate(schedule))
  if name == 'backbone' and config.layer_decay != 1:
    steps.append(fine_tuning.scale_by_layer(run.model.name, config.layer_decay))
  rule = optax.chain(*steps)
  if not group.freeze_steps:
    return rule
  return optax.conditionally_mask(rule, lambda step: step >= group.freeze_steps)


def _make_rule(config) -> list[optax.GradientTransformation]:
  """Returns the update rule without weight decay and learning rate."""
  if config.name in ('adam', 'adamw'):
    return [optax.scale_by_adam(b1=config.momentum, eps=config.eps)]
  if config.name == 'rmsprop':
    return [
      optax.scale_by_rms(
        decay=config.rms_decay, eps=config.eps, eps_in_sqrt=False
      ),
      optax.trace(decay=config.momentum),
    ]
  if config.name == 'sgd':
    return [optax.trace(decay=config.momentum)]
  raise ValueError(f'Unknown optimizer {config.name!r}.')


def _are_matrices(params):
  """Masks out vectors: biases, and the scales and offsets of norms."""
  return jax.tree.map(lambda x: x.ndim > 1, params)


def make_schedule(
  config: ml_collections.ConfigDict, name: str, num_steps: int
) -> optax.Schedule:
  """Returns the learning rate of a group as a function of its updates.

  A linear warm-up comes first; the schedule starts when it ends.

  Args:
    config: `optimizer` of a run's config.
    name: the group.
    num_steps: steps of the run, in which `cosine` decays to 0.
  """
  group = config[name]
  rate, warmup = group.learning_rate, group.warmup_steps
  if group.schedule == 'constant':
    schedule = optax.constant_schedule(rate)
  elif group.schedule == 'cosine':
    schedule = optax.cosine_decay_schedule(
      rate, max(num_steps - group.freeze_steps - warmup, 1)
    )
  elif group.schedule == 'exponential':
    schedule = optax.exponential_decay(
      rate, group.decay_every, group.decay_rate, staircase=True
    )
  elif group.schedule == 'step':
    schedule = optax.piecewise_constant_schedule(
      rate, {step: group.decay_rate for step in group.decay_at}
    )
  else:
    raise ValueError(f'Unknown schedule {group.schedule!r}.')
  if not warmup:
    return schedule
  linear = optax.linear_schedule(0, rate, warmup)
  return optax.join_schedules([linear, schedule], [warmup])


def make_learning_rates(
  config: ml_collections.ConfigDict,
) -> Callable[[jax.Array], dict[str, jax.Array]]:
  """Returns a function from the number of updates to each group's next rate.

  The rate of a frozen group is 0. The plateau's factor is not included.
  """

  def learning_rates(num_updates):
    rates = {}
    for name in GROUPS:
      schedule = make_schedule(config.optimizer, name, config.num_steps)
      num_unfrozen = num_updates - config.optimizer[name].freeze_steps
      rates[name] = jnp.where(num_unfrozen < 0, 0.0, schedule(num_unfrozen))
    return rates

  return learning_rates


def plateau_scale(
  scores: Iterable[float],
  *,
  patience: int,
  factor: float,
  threshold: float = 1e-4,
) -> float:
  """Returns the factor on all learning rates after scores stopped improving.

  Multiplies by `factor` whenever more than `patience` scores in a row do not
  exceed the best by a relative `threshold`: PyTorch's ReduceLROnPlateau in mode
  'max', with its default threshold. The result depends only on the scores, so a
  resumed run computes it from its metrics instead of saving it.

  >>> plateau_scale([0.5, 0.4, 0.5, 0.3], patience=1, factor=0.1)
  0.1

  Args:
    scores: scores of the evaluations so far, in order; higher is better.
    patience: number of scores in a row that may fail to improve.
    factor: in (0, 1].
    threshold: least relative improvement.
  """
  scale, best, num_worse = 1.0, -math.inf, 0
  for score in scores:
    if score > best * (1 + threshold):
      best, num_worse = score, 0
    else:
      num_worse += 1
    if num_worse > patience:
      scale, num_worse = scale * factor, 0
  return scale


def depends_on_num_steps(config: ml_collections.ConfigDict) -> bool:
  """Whether raising `config.num_steps` would change earlier steps."""
  return any(config.optimizer[name].schedule == 'cosine' for name in GROUPS)
