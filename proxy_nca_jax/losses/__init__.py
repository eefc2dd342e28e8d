"""Metric learning losses: pure functions, chosen by name from `LOSSES`."""

from proxy_nca_jax.losses.proxy import check_labels, proxy_nca_loss

LOSSES = {'proxy_nca': proxy_nca_loss}

__all__ = ['LOSSES', 'check_labels', 'proxy_nca_loss']
