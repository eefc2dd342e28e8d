"""Reports the datasets of a run, in the log and in results.json."""

import logging

from proxy_nca_jax.datasets import splits
from proxy_nca_jax.runtime import errors

_logger = logging.getLogger(__name__)


def log(data: splits.Datasets) -> None:
  """Logs the numbers of images and classes, and the skipped files."""
  _logger.info(
    'Training on %d %s of %d classes, testing on %d %s of %d other classes',
    len(data.train),
    data.train.noun,
    data.train.num_classes,
    len(data.test),
    data.test.noun,
    data.test.num_classes,
  )
  if data.validation:
    _logger.info(
      'Selecting by %d validation %s of %d other classes',
      len(data.validation),
      data.validation.noun,
      data.validation.num_classes,
    )
  if data.num_shared_classes:
    _logger.warning(
      '%d test classes share their name with a train class: the scores do not '
      'measure unseen classes only.',
      data.num_shared_classes,
    )
  if data.skipped:
    _logger.warning('Left out, or not as expected (%d):', len(data.skipped))
    for name, reason in data.skipped[: errors.MAX_NAMED]:
      _logger.warning('  %s: %s', name, reason)
    if len(data.skipped) > errors.MAX_NAMED:
      _logger.warning(
        '  ... (%s); results.json lists all of them',
        errors.count_kinds(reason for _, reason in data.skipped),
      )


def summarize(data: splits.Datasets) -> dict:
  """Returns the entry of results.json that describes the datasets."""
  parts = {
    'train': data.train,
    'validation': data.validation,
    'test': data.test,
  }
  summary = {
    name: {'images': len(split), 'classes': split.num_classes}
    for name, split in parts.items()
    if split
  }
  return summary | {
    'resized_source': data.is_resized_source,
    'shared_classes': data.num_shared_classes,
    'skipped': [list(row) for row in data.skipped],
    'digest': data.digest,
  }
