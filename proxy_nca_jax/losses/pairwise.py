"""Losses of the distances between the examples of a batch.

All functions take `embeddings: float [batch, dim]` and `labels: int [batch]` of
any values: a positive pair is two different examples with the same label. Pairs
with an example that `where: bool [batch]` masks are ignored. The functions
compute in float32 whatever the input dtype. They do not normalize embeddings:
for a loss of unit vectors, let the model normalize.

They are losses of the batch as a whole and return a scalar. A batch without the
required pairs has a loss and gradients of 0. The derivative of the distance of
two examples that coincide, which does not exist, is taken as 0.

`memory`, from `update_memory`, adds examples of earlier batches to those that
each example is compared with; `pairs`, from a miner of `losses.pairs`, selects
among all pairs. Losses that are defined by the structure of the batch as a
whole take neither.

References:
  Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping,
    CVPR 2006
  Schroff et al., FaceNet, CVPR 2015, https://arxiv.org/abs/1503.03832
  Hermans et al., In Defense of the Triplet Loss for Person Re-Identification,
    2017, https://arxiv.org/abs/1703.07737
  Song et al., Deep Metric Learning via Lifted Structured Feature Embedding,
    CVPR 2016, https://arxiv.org/abs/1511.06452
  Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective,
    NeurIPS 2016
  Song et al., Deep Metric Learning via Facility Location, CVPR 2017,
    https://arxiv.org/abs/1612.01213
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from proxy_nca_jax import distances
from proxy_nca_jax.losses import inputs, masked
from proxy_nca_jax.losses import pairs as pairs_lib


def contrastive_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  margin: float = 1.0,
  memory: pairs_lib.Memory | None = None,
  pairs: pairs_lib.Pairs | None = None,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the contrastive loss of a batch, a scalar.

  With D the Euclidean distance, the mean over all pairs of

    D^2 / 2 for a positive pair, [margin - D]_+^2 / 2 for a negative one

  (Eq. 4 of Hadsell et al.).

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    margin: the distance beyond which negatives have no loss.
    memory: examples of earlier batches; by default none.
    pairs: the pairs to compare; by default all.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.
  """
  anchors, items, (is_positive, is_negative) = pairs_lib.compare(
    embeddings, labels, memory=memory, pairs=pairs, where=where
  )
  lengths = distances.lengths_of_differences(anchors, items)
  shortfall = jax.nn.relu(margin - lengths)
  loss = jnp.where(is_positive, lengths**2, shortfall**2) / 2
  return masked.mean(loss, where=is_positive | is_negative)


def triplet_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  margin: float = 0.2,
  mining: str = 'semi_hard',
  memory: pairs_lib.Memory | None = None,
  pairs: pairs_lib.Pairs | None = None,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the triplet loss of a batch, a scalar.

  With d the squared Euclidean distance, the mean over triplets of an anchor a,
  a positive p and a negative n of

    [d(a, p) + margin - d(a, n)]_+

  (FaceNet, with unit embeddings and a margin of 0.2). Mining selects triplets:

    batch_all: all triplets with a nonzero loss (Hermans et al.). For each
      anchor it takes the square of the number of items in time and memory,
      which is too much with a large memory.
    batch_hard: for each anchor, the farthest positive and the nearest negative
      (Hermans et al.).
    semi_hard: for each positive pair, the nearest of the negatives that are
      farther from the anchor than the positive (FaceNet); if there is none, the
      farthest negative, as in the comparisons of Song et al.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    margin: by which a positive should be nearer than a negative.
    mining: 'batch_all', 'batch_hard' or 'semi_hard'.
    memory: examples of earlier batches; by default none.
    pairs: the pairs to compare; by default all.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.

  Raises:
    ValueError: if the mining is unknown.
  """
  _check_mining(mining)
  anchors, items, pairs = pairs_lib.compare(
    embeddings, labels, memory=memory, pairs=pairs, where=where
  )
  squares = distances.squared_distances(anchors, items)
  squares = jnp.where(jnp.eye(*squares.shape, dtype=bool), 0, squares)

  def hinge(positive, negative):
    return jax.nn.relu(positive + margin - negative)

  return _mean_of_triplets(squares, pairs, mining, hinge)


def soft_margin_triplet_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  mining: str = 'batch_hard',
  memory: pairs_lib.Memory | None = None,
  pairs: pairs_lib.Pairs | None = None,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the soft-margin triplet loss of a batch, a scalar.

  With D the Euclidean distance, the mean over triplets of an anchor a, a
  positive p and a negative n of

    log(1 + exp(D(a, p) - D(a, n)))

  (Sec. 2 of Hermans et al., https://arxiv.org/abs/1703.07737). Without a margin
  it pulls positives nearer however far negatives are.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    mining: as in `triplet_loss`; batch_all takes all triplets.
    memory: examples of earlier batches; by default none.
    pairs: the pairs to compare; by default all.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.

  Raises:
    ValueError: if the mining is unknown.
  """
  _check_mining(mining)
  anchors, items, pairs = pairs_lib.compare(
    embeddings, labels, memory=memory, pairs=pairs, where=where
  )
  lengths = distances.lengths_of_differences(anchors, items)

  def soft_hinge(positive, negative):
    return jax.nn.softplus(positive - negative)

  return _mean_of_triplets(lengths, pairs, mining, soft_hinge)


def _check_mining(mining):
  if mining not in _MINING:
    raise ValueError(
      f'Unknown mining {mining!r}: choose one of {", ".join(sorted(_MINING))}.'
    )


def _mean_of_triplets(
  lengths: chex.Array,
  pairs: pairs_lib.Pairs,
  mining: str,
  penalty: Callable[[chex.Array, chex.Array], jax.Array],
) -> jax.Array:
  """Returns the mean of penalty(D(a, p), D(a, n)) over the mined triplets.

  Args:
    lengths: float32 [batch, num_items], the distance of any kind.
    pairs: positives and negatives of each anchor.
    mining: 'batch_all', of which penalties of 0 do not count, 'batch_hard' or
      'semi_hard'.
    penalty: by broadcasting.

  Returns:
    float32 [].
  """
  select = functools.partial(_MINING[mining], penalty=penalty)

  def sum_of_anchor(row):
    penalties, is_selected = select(*row)
    return jnp.sum(penalties, where=is_selected), jnp.sum(is_selected)

  # Both passes go anchor by anchor: all triplets at once would take batch^3.
  sums, counts = jax.lax.map(jax.checkpoint(sum_of_anchor), (lengths, *pairs))
  return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)


def _batch_all(lengths, is_positive, is_negative, *, penalty):
  """Returns an anchor's penalties, [num_items, num_items], and a mask."""
  penalties = penalty(lengths[:, None], lengths[None, :])
  is_triplet = is_positive[:, None] & is_negative[None, :]
  return penalties, is_triplet & (penalties > 0)


def _batch_hard(lengths, is_positive, is_negative, *, penalty):
  """Returns the penalty of an anchor's hardest triplet, [], and a mask."""
  farthest = jnp.max(lengths, where=is_positive, initial=0)
  nearest = jnp.min(lengths, where=is_negative, initial=jnp.inf)
  has_both = jnp.any(is_positive) & jnp.any(is_negative)
  return penalty(farthest, jnp.where(has_both, nearest, 0)), has_both


def _semi_hard(lengths, is_positive, is_negative, *, penalty):
  """Returns the penalties of an anchor's positives, [num_items], and a mask."""
  ordered = jnp.sort(jnp.where(is_negative, lengths, jnp.inf))
  nearest_farther = jnp.searchsorted(ordered, lengths, side='right')
  farthest = jnp.sum(is_negative) - 1
  has_negative = jnp.any(is_negative)
  negative = jnp.where(
    has_negative, ordered[jnp.minimum(nearest_farther, farthest)], 0
  )
  return penalty(lengths, negative), is_positive & has_negative


_MINING = {
  'batch_all': _batch_all,
  'batch_hard': _batch_hard,
  'semi_hard': _semi_hard,
}


def n_pairs_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  regularization: float = 0.0,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the multi-class N-pair loss of a batch, a scalar.

  The first two examples of each class are its pair (x, x+). With N pairs
  (Eq. 6 of Sohn, and the regularizer of Sec. 3.2.2),

    loss = 1/N sum_i log(1 + sum_{j != i} exp(x_i.x_j+ - x_i.x_i+))
         + regularization/(2 N) sum_i (||x_i||^2 + ||x_i+||^2).

  Further examples of a class, and classes with a single example, are ignored:
  batches of the paper have two examples of each class.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    regularization: the weight of the squared norms.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.
  """
  embeddings, where = inputs.validate(embeddings, labels, where=where)
  is_positive, _ = inputs.pairs(labels, where)
  is_later, is_earlier = jnp.triu(is_positive), jnp.tril(is_positive)
  is_anchor = jnp.any(is_later, axis=1) & ~jnp.any(is_earlier, axis=1)
  positives = embeddings[jnp.argmax(is_later, axis=1)]
  logits = distances.products(embeddings, positives)
  logits -= jnp.diagonal(logits)[:, None]
  is_other = is_anchor[None, :] & ~jnp.eye(labels.shape[0], dtype=bool)
  losses = masked.log1p_sum_exp(logits, axis=1, where=is_other)
  norms = jnp.sum(embeddings**2 + positives**2, axis=1) / 2
  return masked.mean(losses + regularization * norms, where=is_anchor)


def lifted_structure_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  margin: float = 1.0,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the lifted structured loss of a batch, a scalar.

  With D the Euclidean distance, P the positive pairs and N the negative ones
  (Eq. 4 of https://arxiv.org/abs/1511.06452),

    loss = 1/(2 |P|) sum_{(i, j) in P} [J_ij]_+^2
    J_ij = log(sum_{(i, k) in N} exp(margin - D_ik)
             + sum_{(j, k) in N} exp(margin - D_jk)) + D_ij.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    margin: alpha; the paper's is 1.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.
  """
  embeddings, where = inputs.validate(embeddings, labels, where=where)
  lengths = distances.lengths_of_differences(embeddings, embeddings)
  is_positive, is_negative = inputs.pairs(labels, where)
  pushes = masked.log_sum_exp(margin - lengths, axis=1, where=is_negative)
  pushes = jnp.logaddexp(pushes[:, None], pushes[None, :])
  losses = jax.nn.relu(pushes + lengths) ** 2 / 2
  return masked.mean(losses, where=is_positive)


def facility_location_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  margin_multiplier: float = 1.0,
  num_refinements: int = 5,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the structured clustering loss of a batch, a scalar.

  A set S of examples, the medoids, clusters the batch by the nearest medoid.
  With D the Euclidean distance (https://arxiv.org/abs/1612.01213),

    loss = [max_S {F(S) + margin_multiplier (1 - NMI(S, labels))} - F_true]_+
    F(S) = -sum_i min_{j in S} D_ij
    F_true = sum_c max_{j in c} -sum_{i in c} D_ij,

  where S has one medoid per class c in the batch. The maximum is approximated
  as in the paper: a greedy search adds the best medoid, one at a time
  (Algorithm 1); then, repeatedly, each medoid is exchanged for the best example
  of its cluster (Algorithm 2). NMI uses the geometric mean of the entropies. No
  gradient flows through the search. Its time is proportional to batch^3 times
  the number of classes.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    margin_multiplier: gamma, which the paper decays during training.
    num_refinements: number of rounds of exchanges.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.
  """
  embeddings, where = inputs.validate(embeddings, labels, where=where)
  lengths = distances.lengths_of_differences(embeddings, embeddings)
  is_same_class = (labels[:, None] == labels[None, :]) & where[None, :]
  # A class is represented by the index of its first example.
  classes = jnp.argmax(is_same_class, axis=1)
  is_first = where & (classes == jnp.arange(labels.shape[0]))

  def score(is_medoid, lengths):
    """Returns F(S) + gamma (1 - NMI), and each example's medoid."""
    to_medoids = jnp.where(is_medoid[None, :], lengths, jnp.inf)
    clusters = jnp.argmin(to_medoids, axis=1)
    facility = -jnp.sum(jnp.min(to_medoids, axis=1), where=where)
    distance = 1 - _normalized_mutual_information(classes, clusters, where)
    return facility + margin_multiplier * distance, clusters

  medoids = _search_medoids(
    lambda is_medoid: score(is_medoid, jax.lax.stop_gradient(lengths)),
    where,
    jnp.sum(is_first),
    num_refinements,
  )
  worst, _ = score(medoids, lengths)
  costs = jnp.sum(lengths, axis=0, where=is_same_class.T & where[:, None])
  costs = jnp.min(
    jnp.broadcast_to(costs, is_same_class.shape),
    axis=1,
    where=is_same_class,
    initial=jnp.inf,
  )
  return jax.nn.relu(worst + jnp.sum(costs, where=is_first))


def _search_medoids(score, where, num_medoids, num_refinements):
  """Searches for the medoids with the largest score.

  First a greedy search: each step adds the example that increases the score
  most. Then local search: each round visits the medoids in order, removes one,
  and adds the best example of the cluster it had at the start of the round,
  which can be the same one.

  Args:
    score: maps medoids, bool [batch], to (score, clusters): float32 [], and
      int32 [batch], each example's medoid.
    where: bool [batch], examples to include; by default all.
    num_medoids: int32 [], number of medoids.
    num_refinements: number of rounds of local search.

  Returns:
    bool [batch], whether each example is a medoid.
  """
  indices = jnp.arange(where.shape[0])

  def add_best(is_medoid, candidates):
    def score_with(index):
      return jax.lax.cond(
        candidates[index],
        lambda: score(is_medoid.at[index].set(True))[0],
        lambda: -jnp.inf,
      )

    best = jnp.argmax(jax.lax.map(score_with, indices))
    return is_medoid.at[best].set(True)

  def exchange(index, is_medoid, clusters):
    # A medoid stays a candidate even if its cluster is empty, because another
    # medoid coincides with it.
    candidates = (where & (clusters == index)).at[index].set(True)
    return add_best(is_medoid.at[index].set(False), candidates)

  def refine(_, is_medoid):
    _, clusters = score(is_medoid)
    was_medoid = is_medoid
    return jax.lax.fori_loop(
      0,
      where.shape[0],
      lambda index, is_medoid: jax.lax.cond(
        was_medoid[index],
        lambda: exchange(index, is_medoid, clusters),
        lambda: is_medoid,
      ),
      is_medoid,
    )

  medoids = jax.lax.fori_loop(
    0,
    num_medoids,
    lambda _, is_medoid: add_best(is_medoid, where & ~is_medoid),
    jnp.zeros_like(where),
  )
  return jax.lax.fori_loop(0, num_refinements, refine, medoids)


def _normalized_mutual_information(a, b, where):
  """Returns I(a, b) / sqrt(H(a) H(b)) of two partitions.

  An entropy is the mean over examples of -log(fraction of the examples in the
  same part). Two partitions with a single part each have an NMI of 1.

  Args:
    a, b: int [batch], in [0, batch).
    where: bool [batch], examples to include.

  Returns:
    float32 [].
  """
  size = where.shape[0]
  total = jnp.maximum(jnp.sum(where), 1)

  def entropy(parts):
    order = jnp.sort(jnp.where(where, parts, size**2))
    first = jnp.searchsorted(order, parts, 'left')
    count = jnp.searchsorted(order, parts, 'right') - first
    count = jnp.where(where, count, 1)
    return -masked.mean(jnp.log(count / total), where=where)

  entropy_a, entropy_b = entropy(a), entropy(b)
  information = entropy_a + entropy_b - entropy(size * a + b)
  norm = jnp.sqrt(entropy_a * entropy_b)
  is_trivial = (entropy_a == 0) & (entropy_b == 0)
  return jnp.where(
    norm > 0, information / jnp.where(norm > 0, norm, 1), is_trivial
  )
