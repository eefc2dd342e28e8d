"""Exact ranks of positives by counting, and nearest neighbors, in blocks."""

from proxy_nca_jax.retrieval.neighbors import (
  nearest,
  neighbor_distances,
  pairs_above,
)
from proxy_nca_jax.retrieval.ranks import positive_ranks

__all__ = ['nearest', 'neighbor_distances', 'pairs_above', 'positive_ranks']
