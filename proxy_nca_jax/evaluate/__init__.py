"""Scores of embeddings: retrieval and clustering, and the step they select."""

from proxy_nca_jax.evaluate.scores import format_table, score

__all__ = ['format_table', 'score']
