"""Exact ranks of positives, nearest neighbors and pairs, in blocks."""

from proxy_nca_jax.retrieval.neighbors import (
  nearest,
  neighbor_distances,
  pairs_above,
)
from proxy_nca_jax.retrieval.ranks import positive_ranks
from proxy_nca_jax.retrieval.verification import verification

__all__ = [
  'nearest',
  'neighbor_distances',
  'pairs_above',
  'positive_ranks',
  'verification',
]
