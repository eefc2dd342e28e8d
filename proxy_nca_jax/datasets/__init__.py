"""Data sets: TFDS builders, prepared once, split by class."""

from proxy_nca_jax.datasets.loading import (
  DATASETS,
  PUBLISHED,
  Datasets,
  Split,
  find_data_dir,
  load,
  prepare,
)

__all__ = [
  'DATASETS',
  'PUBLISHED',
  'Datasets',
  'Split',
  'find_data_dir',
  'load',
  'prepare',
]
