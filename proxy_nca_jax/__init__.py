"""Deep metric learning with proxies: losses, evaluation, trained networks.

>>> from proxy_nca_jax import proxy_nca_loss
>>> proxy_nca_loss(embeddings, proxies, labels)  # doctest: +SKIP

The losses are pure functions of JAX arrays; `help(proxy_nca_loss)` has the
formula. `score` measures embeddings by retrieval and clustering; `nearest`,
`positive_ranks`, `kmeans` and `metrics` are its parts. `load` gives the network
of a run as a function from images to embeddings.
"""

import importlib

from proxy_nca_jax.runtime import parent as _parent

_parent.watch_if_worker()

from proxy_nca_jax import metrics
from proxy_nca_jax.clustering import kmeans
from proxy_nca_jax.losses import (
  arcface_loss,
  center_loss,
  center_softmax_loss,
  contrastive_loss,
  cosface_loss,
  dynamic_proxy_nca_loss,
  facility_location_loss,
  fractional_proxy_nca_loss,
  lifted_structure_loss,
  magnet_loss,
  multi_similarity_loss,
  n_pairs_loss,
  normalized_softmax_loss,
  proxy_anchor_loss,
  proxy_nca_loss,
  proxy_nca_pp_loss,
  proxy_triplet_loss,
  soft_triple_loss,
  subcenter_arcface_loss,
  triplet_loss,
)
from proxy_nca_jax.retrieval import nearest, positive_ranks

__version__ = '0.2.0.dev0'

# Imported at first use: the losses need neither runs nor images.
_LAZY = {'load': 'inference', 'score': 'evaluate'}

__all__ = [
  '__version__',
  'arcface_loss',
  'center_loss',
  'center_softmax_loss',
  'contrastive_loss',
  'cosface_loss',
  'dynamic_proxy_nca_loss',
  'facility_location_loss',
  'fractional_proxy_nca_loss',
  'kmeans',
  'lifted_structure_loss',
  'load',
  'magnet_loss',
  'metrics',
  'multi_similarity_loss',
  'n_pairs_loss',
  'nearest',
  'normalized_softmax_loss',
  'positive_ranks',
  'proxy_anchor_loss',
  'proxy_nca_loss',
  'proxy_nca_pp_loss',
  'proxy_triplet_loss',
  'score',
  'soft_triple_loss',
  'subcenter_arcface_loss',
  'triplet_loss',
]


def __getattr__(name: str):
  if name not in _LAZY:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'proxy_nca_jax.{_LAZY[name]}')
  return getattr(module, name)


def __dir__():
  return __all__
