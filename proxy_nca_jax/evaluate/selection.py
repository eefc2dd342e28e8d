"""What the scores so far say: the best step, and the learning rates."""

import logging
import statistics
from collections.abc import Mapping

import ml_collections

from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax.evaluate import scores as scores_lib
from proxy_nca_jax.runtime import metric_writer, processes

_logger = logging.getLogger(__name__)

# The scores whose harmonic mean ProxyNCA++ selects by.
_AVERAGED = ('nmi', 'recall@1')


def read_metrics(workdir: str) -> list[dict]:
  """Returns the rows of metrics.jsonl, as process 0 reads them."""
  return processes.run_on_primary(lambda: metric_writer.read_metrics(workdir))


def select(
  config: ml_collections.ConfigDict, workdir: str
) -> tuple[int, float] | None:
  """Returns the first step with the best validation score, and that score.

  None if no step has been scored.
  """
  scores = _validation_scores(config, workdir)
  if not scores:
    return None
  best = max(scores, key=scores.get)
  return best, scores[best]


def rate_scale(config: ml_collections.ConfigDict, workdir: str) -> float:
  """Returns what the validation scores so far multiply all rates by."""
  if config.optimizer.plateau_factor == 1:
    return 1.0
  scores = _validation_scores(config, workdir)
  scale = optimizer_lib.plateau_scale(
    # The last step of a run that was made longer is in no straight run.
    [score for step, score in scores.items() if step % config.eval_every == 0],
    patience=config.optimizer.plateau_patience,
    factor=config.optimizer.plateau_factor,
  )
  if scale < 1:
    _logger.info('All learning rates are multiplied by %g', scale)
  return scale


def _validation_scores(config, workdir: str) -> dict[int, float]:
  """Returns the score to select by of each step evaluated so far."""
  select_by = config.evaluation.select_by
  names = _AVERAGED if select_by == 'harmonic_mean' else (select_by,)
  values = {
    row['step']: [row[f'validation.{name}'] for name in names]
    for row in read_metrics(workdir)
    if all(f'validation.{name}' in row for name in names)
  }
  return {
    step: statistics.harmonic_mean(scores) if len(scores) > 1 else scores[0]
    for step, scores in values.items()
  }


def check_select_by(
  config: ml_collections.ConfigDict, scores: Mapping[str, float]
) -> None:
  """Raises ValueError if no such score can select a step.

  Args:
    config: of the run.
    scores: those that an evaluation gives.
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
