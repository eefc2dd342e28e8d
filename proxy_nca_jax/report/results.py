"""The scores of a run: its JSON file and its table in the log."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from proxy_nca_jax import evaluate
from proxy_nca_jax.evaluate import verification
from proxy_nca_jax.runtime import processes, saved_json
from proxy_nca_jax.runtime import workdir as workdir_lib

_DESCRIPTIONS = {
  'untrained': 'the network before training',
  'pretrained': 'the pretrained features without a head',
  'raw_pixels': 'raw pixels',
  'as_given': 'the vectors as given',
}
_BASELINES = tuple(_DESCRIPTIONS)
# The columns of the table, in this order.
COLUMNS = ('selected', 'trained', 'seen_classes', *_BASELINES)

_logger = logging.getLogger(__name__)


def _is_scores(value: Any) -> bool:
  """Whether a value holds scores, counts, and perhaps their intervals."""
  if not isinstance(value, dict) or not value:
    return False
  scores = {name: each for name, each in value.items() if name != 'intervals'}
  intervals = value.get('intervals', {})
  return (
    all(map(saved_json.is_number, scores.values()))
    and all(
      saved_json.is_count(scores.get(name, 0))
      for name in ('num_queries', 'queries_without_match')
    )
    and isinstance(intervals, dict)
    and all(
      isinstance(bounds, list)
      and len(bounds) == 2
      and all(map(saved_json.is_number, bounds))
      for bounds in intervals.values()
    )
  )


_SCORES = saved_json.Kind(
  'an object of finite scores and counts',
  _is_scores,
)


def _is_verification(value: Any) -> bool:
  """Whether a value is what `evaluate.verify` returns."""
  if not isinstance(value, dict):
    return False
  rates = ('eer', 'eer_distance')
  points, curve = value.get('operating_points'), value.get('curve')
  return (
    all(saved_json.is_number(value.get(name)) for name in rates)
    and saved_json.is_count(value.get('num_genuine'))
    and saved_json.is_count(value.get('num_impostor'))
    and isinstance(points, list)
    and all(
      isinstance(point, dict)
      and all(
        saved_json.is_number(point.get(name))
        for name in ('fmr', 'fnmr', 'distance')
      )
      for point in points
    )
    and isinstance(curve, list)
    and all(
      isinstance(row, list)
      and len(row) == 3
      and all(map(saved_json.is_number, row))
      for row in curve
    )
  )


_FIELDS = {
  'step': saved_json.COUNT,
  'versions': saved_json.OBJECT,
  'dataset': saved_json.OBJECT,
  'dataset.digest': saved_json.TEXT,
  'dataset.shared_classes': saved_json.optional(saved_json.COUNT),
  'dataset.test': saved_json.OBJECT,
  'dataset.test.classes': saved_json.COUNT,
  **{name: saved_json.optional(_SCORES) for name in COLUMNS},
  'trained': _SCORES,
  'verification': saved_json.optional(
    saved_json.Kind('the error rates of verification', _is_verification)
  ),
}


def read(workdir: str) -> dict | None:
  """Returns the content of results.json; None if it does not exist.

  Raises:
    ValueError: if it is damaged; names the file and the field.
  """
  return saved_json.read(os.path.join(workdir, 'results.json'), _FIELDS)


def write(name: str, results: Mapping, workdir: str) -> None:
  """Writes results to a JSON file of the workdir, and logs their table."""
  workdir_lib.write_json(os.path.join(workdir, name), results)
  log_table(results)


def log_step(
  step: int, num_steps: int, title: str, scores: Mapping[str, float]
) -> None:
  """Logs the first score of an evaluation during training."""
  name, value = next(iter(scores.items()))
  _logger.info(
    'step %d/%d  %s %.2f%% on the %s classes',
    step,
    num_steps,
    name,
    100 * value,
    title,
  )


def log_table(results: Mapping) -> None:
  """Logs the scores in percent, a column for each network or baseline."""
  rows = {title: results[title] for title in COLUMNS if results.get(title)}
  num_shared = results.get('dataset', {}).get('shared_classes') or 0
  _logger.info(
    'Scores on %s, percent:',
    f'test classes, of which training saw {num_shared}'
    if num_shared
    else 'unseen classes',
  )
  for line in evaluate.format_table(rows).splitlines():
    _logger.info('%s', line)
  warning = better_baselines(results)
  # Processes other than the primary one log warnings, but no table.
  if warning and processes.is_primary():
    _logger.warning('%s', warning)
  if results.get('verification'):
    _logger.info('Verification: error rates by distance threshold')
    for line in verification.format_table(results['verification']).splitlines():
      _logger.info('%s', line)
  scores = results['trained']
  if scores.get('queries_without_match'):
    _logger.info(
      '%d of %d queries have no match and are left out of every mean.',
      scores['queries_without_match'],
      scores['queries_without_match'] + scores.get('num_queries', 0),
    )


def better_baselines(results: Mapping) -> str:
  """Returns a warning of baselines above the trained network; '' if none is."""
  scores = results.get('selected') or results['trained']
  name = next(iter(scores))
  better = [
    f'{100 * results[baseline][name]:.2f}% from {_DESCRIPTIONS[baseline]}'
    for baseline in _BASELINES
    if (results.get(baseline) or {}).get(name, -1) > scores[name]
  ]
  if not better:
    return ''
  is_of_vectors = bool(results.get('as_given'))
  start = 'pretrained weights (config.model.init_from)'
  if is_of_vectors:
    start = 'the vectors (config.model.head_init)'
  return (
    f'Training did not pay: {name} is {100 * scores[name]:.2f}% after it, but '
    f'{" and ".join(better)}. Start from {start}, lower the learning rates or '
    f'the number of steps, add {"vectors" if is_of_vectors else "images"}, or '
    'let validation classes select the step (config.dataset.validation).'
  )
