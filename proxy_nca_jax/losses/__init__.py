"""Metric learning losses: pure functions, one row of `LOSSES` each."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from proxy_nca_jax.losses.center import (
  center_loss,
  center_softmax_loss,
  magnet_loss,
  update_centers,
)
from proxy_nca_jax.losses.classification import (
  adaface_loss,
  arcface_loss,
  cosface_loss,
  normalized_softmax_loss,
  soft_triple_loss,
  subcenter_arcface_loss,
)
from proxy_nca_jax.losses.frequency import class_weights, log_priors
from proxy_nca_jax.losses.inputs import check_labels
from proxy_nca_jax.losses.multi_label import (
  multi_label_proxy_anchor_loss,
  multi_label_proxy_nca_loss,
)
from proxy_nca_jax.losses.pairs import (
  Memory,
  Pairs,
  batch_hard_pairs,
  distance_weighted_pairs,
  init_memory,
  multi_similarity_pairs,
  semi_hard_pairs,
  update_memory,
)
from proxy_nca_jax.losses.pairwise import (
  contrastive_loss,
  facility_location_loss,
  lifted_structure_loss,
  n_pairs_loss,
  soft_margin_triplet_loss,
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
from proxy_nca_jax.losses.similarity import (
  circle_loss,
  multi_similarity_loss,
  nt_xent_loss,
  smooth_ap_loss,
  sup_con_loss,
)

# Forms of proxies and centers.
PER_CLASS = 'per_class'  # float32 [num_classes, dim].
MULTI_CENTER = 'multi_center'  # float32 [num_classes, num_centers, dim].
UNASSIGNED = 'unassigned'  # float32 [num_proxies, dim]: no label indexes them.


class Loss(NamedTuple):
  """A loss function and the arrays it takes beyond embeddings and labels.

  Attributes:
    fn: the pure function.
    proxies: the form of its argument `proxies`, which is trained; None if it
      has none.
    centers: the form of its argument `centers`, which `update_centers` moves
      after each step; None if it has none.
    has_assignment: whether it has an argument `assignment`, a constant from
      `proxies.random_assignment` or `proxies.assignment_by_size`.
  """

  fn: Callable[..., jax.Array]
  proxies: str | None = None
  centers: str | None = None
  has_assignment: bool = False

  @property
  def has_class_proxies(self) -> bool:
    """Whether labels index the proxies."""
    return self.proxies in (PER_CLASS, MULTI_CENTER)


LOSSES = {
  'adaface': Loss(adaface_loss, proxies=PER_CLASS),
  'arcface': Loss(arcface_loss, proxies=PER_CLASS),
  'center': Loss(center_loss, centers=PER_CLASS),
  'center_softmax': Loss(
    center_softmax_loss, proxies=PER_CLASS, centers=PER_CLASS
  ),
  'circle': Loss(circle_loss),
  'contrastive': Loss(contrastive_loss),
  'cosface': Loss(cosface_loss, proxies=PER_CLASS),
  'dynamic_proxy_nca': Loss(dynamic_proxy_nca_loss, proxies=UNASSIGNED),
  'facility_location': Loss(facility_location_loss),
  'fractional_proxy_nca': Loss(
    fractional_proxy_nca_loss, proxies=UNASSIGNED, has_assignment=True
  ),
  'lifted_structure': Loss(lifted_structure_loss),
  'magnet': Loss(magnet_loss, centers=MULTI_CENTER),
  'multi_similarity': Loss(multi_similarity_loss),
  'n_pairs': Loss(n_pairs_loss),
  'normalized_softmax': Loss(normalized_softmax_loss, proxies=PER_CLASS),
  'nt_xent': Loss(nt_xent_loss),
  'proxy_anchor': Loss(proxy_anchor_loss, proxies=PER_CLASS),
  'proxy_nca': Loss(proxy_nca_loss, proxies=PER_CLASS),
  'proxy_nca_pp': Loss(proxy_nca_pp_loss, proxies=PER_CLASS),
  'proxy_triplet': Loss(proxy_triplet_loss, proxies=PER_CLASS),
  'smooth_ap': Loss(smooth_ap_loss),
  'soft_margin_triplet': Loss(soft_margin_triplet_loss),
  'soft_triple': Loss(soft_triple_loss, proxies=MULTI_CENTER),
  'subcenter_arcface': Loss(subcenter_arcface_loss, proxies=MULTI_CENTER),
  'sup_con': Loss(sup_con_loss),
  'triplet': Loss(triplet_loss),
}

# Miners of a batch, by `config.loss.pairs`: (embeddings, labels, *, memory) ->
# Pairs.
MINERS = {
  'batch_hard': batch_hard_pairs,
  'multi_similarity': multi_similarity_pairs,
  'semi_hard': semi_hard_pairs,
}

__all__ = [
  'LOSSES',
  'MINERS',
  'MULTI_CENTER',
  'PER_CLASS',
  'UNASSIGNED',
  'Loss',
  'Memory',
  'Pairs',
  'batch_hard_pairs',
  'check_labels',
  'class_weights',
  'distance_weighted_pairs',
  'init_memory',
  'log_priors',
  'multi_label_proxy_anchor_loss',
  'multi_label_proxy_nca_loss',
  'multi_similarity_pairs',
  'semi_hard_pairs',
  'update_centers',
  'update_memory',
  *(loss.fn.__name__ for loss in LOSSES.values()),
]
