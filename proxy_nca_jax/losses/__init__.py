"""Metric learning losses: pure functions, chosen by name from `LOSSES`."""

from typing import NamedTuple

from proxy_nca_jax.losses.center import (
  center_loss,
  center_softmax_loss,
  magnet_loss,
  update_centers,
)
from proxy_nca_jax.losses.classification import (
  arcface_loss,
  cosface_loss,
  normalized_softmax_loss,
  soft_triple_loss,
  subcenter_arcface_loss,
)
from proxy_nca_jax.losses.frequency import class_weights, log_priors
from proxy_nca_jax.losses.inputs import check_labels
from proxy_nca_jax.losses.pairwise import (
  contrastive_loss,
  facility_location_loss,
  lifted_structure_loss,
  multi_similarity_loss,
  n_pairs_loss,
  triplet_loss,
)
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
  'center': center_loss,
  'center_softmax': center_softmax_loss,
  'contrastive': contrastive_loss,
  'cosface': cosface_loss,
  'dynamic_proxy_nca': dynamic_proxy_nca_loss,
  'facility_location': facility_location_loss,
  'fractional_proxy_nca': fractional_proxy_nca_loss,
  'lifted_structure': lifted_structure_loss,
  'magnet': magnet_loss,
  'multi_similarity': multi_similarity_loss,
  'n_pairs': n_pairs_loss,
  'normalized_softmax': normalized_softmax_loss,
  'proxy_anchor': proxy_anchor_loss,
  'proxy_nca': proxy_nca_loss,
  'proxy_nca_pp': proxy_nca_pp_loss,
  'proxy_triplet': proxy_triplet_loss,
  'soft_triple': soft_triple_loss,
  'subcenter_arcface': subcenter_arcface_loss,
  'triplet': triplet_loss,
}


class Needs(NamedTuple):
  """What a loss is given besides embeddings and labels.

  Points are float32: 'one' a class, [num_classes, dim]; 'several' a class,
  [num_classes, num_centers, dim]; or a 'free' number that labels do not index,
  [num_proxies, dim].

  Attributes:
    proxies: the form of its argument `proxies`, learned; None if it has none.
    centers: the form of its argument `centers`, which `update_centers` moves
      after each step; None if it has none.
    assignment: whether it has an argument `assignment`, a constant made by
      `proxies.random_assignment`.
  """

  proxies: str | None = None
  centers: str | None = None
  assignment: bool = False

  @property
  def has_labelled_proxies(self) -> bool:
    """Whether labels index the proxies."""
    return self.proxies in ('one', 'several')


NEEDS = {
  'arcface': Needs(proxies='one'),
  'center': Needs(centers='one'),
  'center_softmax': Needs(proxies='one', centers='one'),
  'contrastive': Needs(),
  'cosface': Needs(proxies='one'),
  'dynamic_proxy_nca': Needs(proxies='free'),
  'facility_location': Needs(),
  'fractional_proxy_nca': Needs(proxies='free', assignment=True),
  'lifted_structure': Needs(),
  'magnet': Needs(centers='several'),
  'multi_similarity': Needs(),
  'n_pairs': Needs(),
  'normalized_softmax': Needs(proxies='one'),
  'proxy_anchor': Needs(proxies='one'),
  'proxy_nca': Needs(proxies='one'),
  'proxy_nca_pp': Needs(proxies='one'),
  'proxy_triplet': Needs(proxies='one'),
  'soft_triple': Needs(proxies='several'),
  'subcenter_arcface': Needs(proxies='several'),
  'triplet': Needs(),
}

__all__ = [
  'LOSSES',
  'NEEDS',
  'Needs',
  'check_labels',
  'class_weights',
  'log_priors',
  'update_centers',
  *(loss.__name__ for loss in LOSSES.values()),
]
