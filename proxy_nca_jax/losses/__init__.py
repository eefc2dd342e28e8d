"""Metric learning losses: pure functions, chosen by name from `LOSSES`."""

from proxy_nca_jax.losses.inputs import check_labels
from proxy_nca_jax.losses.proxy import proxy_anchor_loss, proxy_nca_loss

LOSSES = {
  'proxy_anchor': proxy_anchor_loss,
  'proxy_nca': proxy_nca_loss,
}

__all__ = ['LOSSES', 'check_labels', 'proxy_anchor_loss', 'proxy_nca_loss']
