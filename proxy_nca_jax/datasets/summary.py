"""How many images and classes a run has: for the log and results.json."""

import logging

from proxy_nca_jax.datasets import loading

_logger = logging.getLogger(__name__)


def log(data: loading.Datasets) -> None:
  """Logs how many images and classes there are, and what was left out."""
  _logger.info(
    'Training on %d images of %d classes, measuring on %d images of %d others',
    len(data.train),
    data.train.num_classes,
    len(data.test),
    data.test.num_classes,
  )
  if data.validation:
    _logger.info(
      'Selecting on %d images of %d classes more',
      len(data.validation),
      data.validation.num_classes,
    )
  if data.num_shared_classes:
    _logger.warning(
      '%d test classes have the name of a train class: the scores are not of '
      'unseen classes.',
      data.num_shared_classes,
    )
  if data.skipped:
    _logger.warning('%d files were left out:', len(data.skipped))
    for name, reason in data.skipped[:20]:
      _logger.warning('  %s: %s', name, reason)
    if len(data.skipped) > 20:
      _logger.warning('  ... all of them are in results.json')


def summarize(data: loading.Datasets) -> dict:
  """Returns what results.json tells of the data, with its digest."""
  splits = {
    'train': data.train,
    'validation': data.validation,
    'test': data.test,
  }
  summary = {
    name: {'images': len(split), 'classes': split.num_classes}
    for name, split in splits.items()
    if split
  }
  return summary | {
    'resized_source': data.is_resized_source,
    'shared_classes': data.num_shared_classes,
    'skipped': [list(row) for row in data.skipped],
    'digest': data.digest,
  }
