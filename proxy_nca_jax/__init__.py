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

__version__ = '0.2.0.dev0'

_LOSSES = (
  'adaface_loss',
  'arcface_loss',
  'center_loss',
  'center_softmax_loss',
  'circle_loss',
  'contrastive_loss',
  'cosface_loss',
  'dynamic_proxy_nca_loss',
  'facility_location_loss',
  'fractional_proxy_nca_loss',
  'lifted_structure_loss',
  'magnet_loss',
  'multi_similarity_loss',
  'n_pairs_loss',
  'normalized_softmax_loss',
  'nt_xent_loss',
  'proxy_anchor_loss',
  'proxy_nca_loss',
  'proxy_nca_pp_loss',
  'proxy_triplet_loss',
  'smooth_ap_loss',
  'soft_margin_triplet_loss',
  'soft_triple_loss',
  'subcenter_arcface_loss',
  'sup_con_loss',
  'triplet_loss',
)
# The module of each public name. It is imported at the first use, so that
# commands start without the modules that they do not need.
_MODULES = {
  'kmeans': 'clustering',
  'load': 'inference',
  'nearest': 'retrieval',
  'positive_ranks': 'retrieval',
  'score': 'evaluate',
  **dict.fromkeys(_LOSSES, 'losses'),
}
# Modules that are attributes of the package without an import of their own.
_SUBMODULES = (
  'clustering',
  'distances',
  'losses',
  'metrics',
  'proxies',
  'retrieval',
)

__all__ = ['__version__', 'metrics', *_MODULES]
__all__.sort()


def __getattr__(name: str):
  if name in _SUBMODULES:
    return importlib.import_module(f'proxy_nca_jax.{name}')
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'proxy_nca_jax.{_MODULES[name]}')
  return getattr(module, name)


def __dir__():
  return __all__
