"""Proxy-NCA deep metric learning in JAX: pure losses, ranking, clustering."""

from proxy_nca_jax import metrics
from proxy_nca_jax.losses import LOSSES, proxy_nca_loss

__all__ = ['LOSSES', 'metrics', 'proxy_nca_loss']
