"""Datasets: TFDS builders, prepared once and split by class."""

from proxy_nca_jax.datasets.embeddings import NAME as EMBEDDINGS
from proxy_nca_jax.datasets.loading import find_files, is_resized_source, load
from proxy_nca_jax.datasets.preparation import (
  DATASETS,
  PUBLISHED,
  find_data_dir,
  prepare,
)
from proxy_nca_jax.datasets.splits import Datasets, Split
from proxy_nca_jax.datasets.vectors import Vectors

__all__ = [
  'DATASETS',
  'EMBEDDINGS',
  'PUBLISHED',
  'Datasets',
  'Split',
  'Vectors',
  'find_data_dir',
  'find_files',
  'is_resized_source',
  'load',
  'prepare',
]
