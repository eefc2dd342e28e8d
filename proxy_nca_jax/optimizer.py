"""The optimiser: groups of parameters with their own rates and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

if TYPE_CHECKING:
  # Who trains without a config does without the library.
  import ml_collections

GROUPS = ('backbone', 'head', 'proxies')
_OPTIMIZERS = ('adam', 'adamw', 'rmsprop', 'sgd')
_ON_NONFINITE = ('stop', 'skip')
_SCHEDULES = ('constant', 'cosine', 'exponential', 'step')


def make_optimizer(
  config: ml_collections.ConfigDict,
) -> optax.GradientTransformation:
  """Builds the optimiser of `params = {'backbone', 'head', 'proxies'}`.

  The rules are PyTorch's, so that published numbers carry over: eps is added to
  the root, momentum accumulates before the learning rate, and weight decay
  enters the gradient, but with `adamw` is subtracted from the parameters.

  For its first `freeze_steps` a group's updates are zero, its moments stay as
  they began and its schedule waits, while the other groups train. This is
  Proxy-Anchor's warm-up. ProxyNCA++ warms up by a second optimiser, so that in
  the end the moments of the other groups begin anew as well; here they go on.
  In both, batch statistics move all the while unless they are frozen too.

  With `config.optimizer.on_nonfinite='skip'` gradients that are not finite give
  updates of zero and change nothing but the counts of `skip_counts`.

  Raises:
    ValueError: if a name is unknown.
  """
  groups = {
    name: _make_group(config.optimizer, name, config.num_steps)
    for name in GROUPS
  }
  optimizer = optax.partition(groups, {name: name for name in GROUPS})
  if config.optimizer.clip_norm:
    # Before the groups: the norm is that of all gradients together.
    clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
    optimizer = optax.chain(clip, optimizer)
  if config.optimizer.on_nonfinite not in _ON_NONFINITE:
    raise ValueError(
      'Unknown config.optimizer.on_nonfinite '
      f'({config.optimizer.on_nonfinite!r}): choose one of '
      f'{", ".join(_ON_NONFINITE)}.'
    )
  if config.optimizer.on_nonfinite == 'skip':
    # Optax takes what is not finite after so many in a row: never.
    return optax.apply_if_finite(optimizer, np.iinfo(np.int32).max)
  return optimizer


def skip_counts(opt_state: optax.OptState) -> dict[str, jax.Array]:
  """Returns the steps that were skipped, in all and in a row until now.

  Returns:
    {'skipped_steps', 'skipped_in_row'}: int32 []; {} of an optimiser that skips
    none.
  """
  if not isinstance(opt_state, optax.ApplyIfFiniteState):
    return {}
  return {
    'skipped_steps': opt_state.total_notfinite,
    'skipped_in_row': opt_state.notfinite_count,
  }


def _make_group(config, name, num_steps):
  group = config[name]
  if config.name in ('adam', 'adamw'):
    steps = [optax.scale_by_adam(b1=config.momentum, eps=config.eps)]
  elif config.name == 'rmsprop':
    steps = [
      optax.scale_by_rms(
        decay=config.rms_decay, eps=config.eps, eps_in_sqrt=False
      ),
      optax.trace(decay=config.momentum),
    ]
  elif config.name == 'sgd':
    steps = [optax.trace(decay=config.momentum)]
  else:
    raise ValueError(
      f'Unknown optimizer {config.name!r} (config.optimizer.name): choose one '
      f'of {", ".join(_OPTIMIZERS)}.'
    )
  decay = optax.add_decayed_weights(
    group.weight_decay, mask=None if config.decay_vectors else _are_matrices
  )
  steps = [*steps, decay] if config.name == 'adamw' else [decay, *steps]
  if group.clip_value:
    steps = [optax.clip(group.clip_value), *steps]
  schedule = make_schedule(config, name, num_steps)
  rule = optax.chain(*steps, optax.scale_by_learning_rate(schedule))
  if not group.freeze_steps:
    return rule
  return optax.conditionally_mask(rule, lambda step: step >= group.freeze_steps)


def _are_matrices(params):
  """Leaves out vectors: biases, and the scales and shifts of norms."""
  return jax.tree.map(lambda x: x.ndim > 1, params)


def make_schedule(
  config: ml_collections.ConfigDict, name: str, num_steps: int
) -> optax.Schedule:
  """Returns the learning rate of a group by its steps, frozen ones left out.

  The warm-up comes first, and the schedule begins when it ends.
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
    raise ValueError(
      f'Unknown schedule {group.schedule!r} (config.optimizer.{name}.schedule):'
      f' choose one of {", ".join(_SCHEDULES)}.'
    )
  if not warmup:
    return schedule
  linear = optax.linear_schedule(0, rate, warmup)
  return optax.join_schedules([linear, schedule], [warmup])


def make_learning_rates(
  config: ml_collections.ConfigDict,
) -> Callable[[jax.Array], dict[str, jax.Array]]:
  """Returns the map from updates done to each group's rate in the next one.

  It is 0 while a group is frozen. The plateau's factor is not in it.
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
  """Returns what learning rates are multiplied by when scores stop rising.

  By `factor` each time that more than `patience` scores in a row are not
  better than the best by a share of `threshold`: PyTorch's ReduceLROnPlateau
  in mode 'max', with its threshold. The scores are all that it depends on: a
  resumed run has them and need not save it.

  >>> plateau_scale([0.5, 0.4, 0.5, 0.3], patience=1, factor=0.1)
  0.1

  Args:
    scores: of the evaluations so far, in order; higher is better.
    patience: scores that may pass without a better one.
    factor: in (0, 1].
    threshold: how much better a score must be, as a share of the best.
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
  """Whether a change of `config.num_steps` changes the steps before."""
  return any(config.optimizer[name].schedule == 'cosine' for name in GROUPS)
