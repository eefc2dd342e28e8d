"""Batches of images: sampled, augmented, read by threads or processes."""

from proxy_nca_jax.input_pipeline.batches import (
  check_splits,
  evaluation_batches,
  raw_pixels,
  train_batches,
)

__all__ = ['check_splits', 'evaluation_batches', 'raw_pixels', 'train_batches']
