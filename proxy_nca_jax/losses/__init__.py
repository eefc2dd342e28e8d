"""Metric learning losses: pure functions, chosen by name from `LOSSES`."""

from proxy_nca_jax.losses.classification import (
  arcface_loss,
  cosface_loss,
  normalized_softmax_loss,
  soft_triple_loss,
  subcenter_arcface_loss,
)
from proxy_nca_jax.losses.inputs import check_labels
from proxy_nca_jax.losses.proxy import (
  dynamic_proxy_nca_loss,
  fractional_proxy_nca_loss,
  proxy_anchor_loss,
  proxy_nca_loss,
  proxy_nca_pp_loss,
  proxy_triplet_loss,
)

LOSSES = {
  'arcface': arcface_loss,
  'cosface': cosface_loss,
  'dynamic_proxy_nca': dynamic_proxy_nca_loss,
  'fractional_proxy_nca': fractional_proxy_nca_loss,
  'normalized_softmax': normalized_softmax_loss,
  'proxy_anchor': proxy_anchor_loss,
  'proxy_nca': proxy_nca_loss,
  'proxy_nca_pp': proxy_nca_pp_loss,
  'proxy_triplet': proxy_triplet_loss,
  'soft_triple': soft_triple_loss,
  'subcenter_arcface': subcenter_arcface_loss,
}

# The learned proxies that each loss is given: one a class [classes, dim],
# several centers a class [classes, centers, dim], any free number [number, dim]
# that no label indexes, or none.
PROXIES = {
  'arcface': 'class',
  'cosface': 'class',
  'dynamic_proxy_nca': 'free',
  'fractional_proxy_nca': 'free',
  'normalized_softmax': 'class',
  'proxy_anchor': 'class',
  'proxy_nca': 'class',
  'proxy_nca_pp': 'class',
  'proxy_triplet': 'class',
  'soft_triple': 'centers',
  'subcenter_arcface': 'centers',
}

__all__ = [
  'LOSSES',
  'PROXIES',
  'check_labels',
  *(loss.__name__ for loss in LOSSES.values()),
]
