"""Data sets: TFDS builders, prepared once, split by class."""

from proxy_nca_jax.datasets.loading import (
  DATASETS,
  Datasets,
  Split,
  load,
)

__all__ = ['DATASETS', 'Datasets', 'Split', 'load']
