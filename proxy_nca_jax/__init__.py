"""Proxy-NCA deep metric learning in JAX: pure losses, ranking, clustering."""

from proxy_nca_jax import metrics
from proxy_nca_jax.losses import LOSSES, proxy_nca_loss

__all__ = ['LOSSES', 'load', 'metrics', 'proxy_nca_loss']


def __getattr__(name: str):
  # Who takes a loss alone does without what reads runs and pictures.
  if name == 'load':
    from proxy_nca_jax import inference

    return inference.load
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
