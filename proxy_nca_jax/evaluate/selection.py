"""Decisions from the scores so far: the best step, and the learning rates.

All functions take the history of a run, the rows of metrics.jsonl.
"""

import logging
import statistics
from collections.abc import Mapping, Sequence

import ml_collections

from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax.evaluate import scores as scores_lib

_logger = logging.getLogger(__name__)

History = Sequence[Mapping[str, float]]

# ProxyNCA++ selects by the harmonic mean of these scores.
_AVERAGED = ('nmi', 'recall@1')


def select(
  config: ml_collections.ConfigDict, history: History
) -> tuple[int, float] | None:
  """Returns the first step with the best validation score, and that score.

  Returns None if no step has been scored.
  """
  scores = _validation_scores(config, history)
  if not scores:
    return None
  best = max(scores, key=scores.get)
  return best, scores[best]


def lr_scale(config: ml_collections.ConfigDict, history: History) -> float:
  """Returns the plateau's factor on all learning rates, in (0, 1]."""
  if config.optimizer.plateau_factor == 1:
    return 1.0
  scores = _validation_scores(config, history)
  scale = optimizer_lib.plateau_scale(
    # A run that was extended has also scored the last step of its first part;
    # one that was not has not, and both must decide alike.
    [score for step, score in scores.items() if step % config.eval_every == 0],
    patience=config.optimizer.plateau_patience,
    factor=config.optimizer.plateau_factor,
  )
  if scale < 1:
    _logger.info('All learning rates are multiplied by %g', scale)
  return scale


def _validation_scores(config, history: History) -> dict[int, float]:
  """Returns the score that selects, by step."""
  select_by = config.evaluation.select_by
  names = _AVERAGED if select_by == 'harmonic_mean' else (select_by,)
  values = {
    row['step']: [row[f'validation.{name}'] for name in names]
    for row in history
    if all(f'validation.{name}' in row for name in names)
  }
  return {
    step: statistics.harmonic_mean(scores) if len(scores) > 1 else scores[0]
    for step, scores in values.items()
  }


def check_select_by(
  config: ml_collections.ConfigDict, scores: Mapping[str, float]
) -> None:
  """Raises ValueError if an evaluation does not give the score that selects.

  Args:
    config: the run's config.
    scores: the scores of an evaluation.
  """
  if not config.dataset.validation:
    return
  names = scores_lib.score_names(scores)
  if set(_AVERAGED) <= set(names):
    names.append('harmonic_mean')
  if config.evaluation.select_by not in names:
    raise ValueError(
      f'config.evaluation.select_by ({config.evaluation.select_by!r}) must be '
      f'one of {", ".join(names)}.'
    )
