"""The optimiser: groups of parameters with their own rates and schedules."""

import ml_collections
import optax

GROUPS = ('backbone', 'head', 'proxies')
_OPTIMIZERS = ('adam', 'rmsprop', 'sgd')
_SCHEDULES = ('constant', 'cosine', 'exponential')


def make_optimizer(
    config: ml_collections.ConfigDict,
) -> optax.GradientTransformation:
  """Builds the optimiser of `params = {'backbone', 'head', 'proxies'}`.

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
    return optax.chain(clip, optimizer)
  return optimizer


def _make_group(config, name, num_steps):
  if config.name == 'adam':
    scale = optax.scale_by_adam(b1=config.momentum, eps=config.eps)
  elif config.name == 'rmsprop':
    scale = optax.scale_by_rms(eps=config.eps)
  elif config.name == 'sgd':
    scale = optax.trace(decay=config.momentum)
  else:
    raise ValueError(
      f'Unknown optimizer {config.name!r} (config.optimizer.name): choose one '
      f'of {", ".join(_OPTIMIZERS)}.'
    )
  return optax.chain(
    scale,
    optax.add_decayed_weights(config[name].weight_decay),
    optax.scale_by_learning_rate(make_schedule(config, name, num_steps)),
  )


def make_schedule(
    config: ml_collections.ConfigDict, name: str, num_steps: int
) -> optax.Schedule:
  """Returns the learning rate of a group as a function of the step."""
  group = config[name]
  rate, warmup = group.learning_rate, group.warmup_steps
  if group.schedule == 'constant':
    schedule = optax.constant_schedule(rate)
  elif group.schedule == 'cosine':
    schedule = optax.cosine_decay_schedule(rate, max(num_steps - warmup, 1))
  elif group.schedule == 'exponential':
    schedule = optax.exponential_decay(
      rate, group.decay_every, group.decay_rate, staircase=True
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


def depends_on_num_steps(config: ml_collections.ConfigDict) -> bool:
  """Whether a change of `config.num_steps` changes the steps before."""
  return any(config.optimizer[name].schedule == 'cosine' for name in GROUPS)
