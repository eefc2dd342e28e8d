"""Scores of embeddings: retrieval, clustering, verification; selection."""

from proxy_nca_jax.evaluate.scores import format_table, score
from proxy_nca_jax.evaluate.verification import verify

__all__ = ['format_table', 'score', 'verify']
