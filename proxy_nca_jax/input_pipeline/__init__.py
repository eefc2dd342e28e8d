"""Batches of images: sampled, augmented, read by threads or processes."""

from proxy_nca_jax.input_pipeline.batches import (
  check_image_size,
  check_train_batches,
  evaluation_batches,
  normalize,
  raw_pixels,
  train_batches,
)
from proxy_nca_jax.input_pipeline.sampling import balanced_position

__all__ = [
  'balanced_position',
  'check_image_size',
  'check_train_batches',
  'evaluation_batches',
  'normalize',
  'raw_pixels',
  'train_batches',
]
