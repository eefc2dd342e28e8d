"""Which numbers a config may have; names are checked where they are used."""

import operator

import jax
import ml_collections


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if a number cannot be."""
  for field, least in (
    ('num_steps', 1),
    ('batch_size', 1),
    ('log_every', 1),
    ('save_every', 1),
    ('eval_every', 0),
    ('keep_checkpoints', 1),
    ('steps_per_dispatch', 1),
    ('stall_seconds', 0),
    ('model.freeze_batch_norm_steps', -1),
    ('optimizer.max_skipped_steps', 1),
  ):
    value = operator.attrgetter(field)(config)
    if value < least:
      raise ValueError(f'config.{field} ({value}) must be at least {least}.')
  _check_profile_steps(config)
  _check_steps_per_dispatch(config)
  factor = config.optimizer.plateau_factor
  if not 0 < factor <= 1 or config.optimizer.plateau_patience < 0:
    raise ValueError(
      f'config.optimizer.plateau_factor ({factor}) must be in (0, 1], and '
      f'plateau_patience ({config.optimizer.plateau_patience}) not negative.'
    )
  if factor < 1 and not (config.dataset.validation and config.eval_every):
    raise ValueError(
      f'config.optimizer.plateau_factor ({factor}) follows the validation '
      'scores: set config.dataset.validation, as 2/2, and config.eval_every.'
    )
  if config.dataset.validation and not config.eval_every:
    raise ValueError(
      'config.dataset.validation selects among the steps that are evaluated: '
      'set config.eval_every to a number of steps.'
    )
  if not config.proxies.init_norm > 0:
    raise ValueError(
      f'config.proxies.init_norm ({config.proxies.init_norm}) must be positive.'
    )
  if not config.evaluation.recall_at or min(config.evaluation.recall_at) < 1:
    raise ValueError(
      f'config.evaluation.recall_at ({config.evaluation.recall_at}) must hold '
      'numbers of at least 1.'
    )
  for field, size in (
    ('batch_size', config.batch_size),
    ('evaluation.batch_size', config.evaluation.batch_size),
  ):
    if size < 1 or size % jax.device_count():
      raise ValueError(
        f'Batch size ({size}, config.{field}) must be divisible by the number '
        f'of devices ({jax.device_count()}).'
      )


def _check_profile_steps(config) -> None:
  steps = config.profile_steps
  if not steps:
    return
  is_pair = len(steps) == 2 and all(isinstance(step, int) for step in steps)
  if not is_pair or not 1 <= steps[0] <= steps[1] <= config.num_steps:
    raise ValueError(
      f'config.profile_steps ({steps}) must be () or the first and the last '
      f'step to trace, in 1 to {config.num_steps} (config.num_steps), as '
      '100,110.'
    )


def _check_steps_per_dispatch(config) -> None:
  size = config.steps_per_dispatch
  periods = {
    name: operator.attrgetter(name)(config)
    for name in (
      'num_steps',
      'log_every',
      'eval_every',
      'save_every',
      'model.freeze_batch_norm_steps',
    )
  }
  odd = [
    f'config.{name} ({period})'
    for name, period in periods.items()
    if period > 0 and period % size
  ]
  if odd:
    raise ValueError(
      f'{", ".join(odd)} must be divisible by config.steps_per_dispatch '
      f'({size}): nothing happens between the steps of one dispatch.'
    )
