"""What results come from: the data, the code and its libraries."""

import importlib.metadata
import logging
import os
import subprocess

from proxy_nca_jax import datasets

_logger = logging.getLogger(__name__)


def log_data(data: datasets.Datasets) -> None:
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
      'unseen classes.', data.num_shared_classes,
    )
  if data.skipped:
    _logger.warning('%d files were left out:', len(data.skipped))
    for name, reason in data.skipped[:20]:
      _logger.warning('  %s: %s', name, reason)
    if len(data.skipped) > 20:
      _logger.warning('  ... all of them are in results.json')


def summarize_data(data: datasets.Datasets) -> dict:
  """Returns what results.json tells of the data, with its digest."""
  splits = {
    'train': data.train, 'validation': data.validation, 'test': data.test
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


def commit() -> str:
  """Returns the commit of this code, or 'unknown' if it is no checkout."""
  folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  # An installed package may lie in a checkout of something else.
  if not os.path.exists(os.path.join(folder, '.git')):
    return 'unknown'
  command = ['git', '-C', folder, 'rev-parse', 'HEAD']
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:  # There is no git.
    return 'unknown'
  return found.stdout.strip() or 'unknown'


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that results depend on."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
  return {name: importlib.metadata.version(name) for name in names}
