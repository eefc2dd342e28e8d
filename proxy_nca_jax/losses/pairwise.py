"""Losses that compare the examples of a batch with each other, without proxies.

All functions take `embeddings: float [batch, dim]` and `labels: int [batch]` of
any values: a positive pair is two different examples with the same label. Pairs
with an example that `where: bool [batch]` masks are ignored. The functions
compute in float32 whatever the input dtype. They do not normalize embeddings,
except for `multi_similarity_loss`, which is defined by cosines: for a loss of
unit vectors, let the model normalize.

That one returns `float32 [batch]`; the others are losses of the batch as a
whole and return a scalar. A batch without the required pairs has a loss and
gradients of 0. The derivative of the distance of two examples that coincide,
which does not exist, is taken as 0.

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
  Wang et al., Multi-Similarity Loss, CVPR 2019,
    https://arxiv.org/abs/1904.06627
"""

import chex
import jax
import jax.numpy as jnp

from proxy_nca_jax import distances
from proxy_nca_jax.losses import inputs, masked


def contrastive_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  margin: float = 1.0,
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
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.
  """
  embeddings, where = inputs.validate(embeddings, labels, where=where)
  lengths = distances.lengths_of_differences(embeddings)
  shortfall = jax.nn.relu(margin - lengths)
  is_positive, is_negative = inputs.pairs(labels, where)
  loss = jnp.where(is_positive, lengths**2, shortfall**2) / 2
  return masked.mean(loss, where=is_positive | is_negative)


def triplet_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  margin: float = 0.2,
  mining: str = 'semi_hard',
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the triplet loss of a batch, a scalar.

  With d the squared Euclidean distance, the mean over triplets of an anchor a,
  a positive p and a negative n of

    [d(a, p) + margin - d(a, n)]_+

  (FaceNet, with unit embeddings and a margin of 0.2). Mining selects triplets:

    batch_all: all triplets with a nonzero loss (Hermans et al.).
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
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [], the loss of the batch.

  Raises:
    ValueError: if the mining is unknown.
  """
  if mining not in _MINING:
    raise ValueError(
      f'Unknown mining {mining!r}: choose one of {", ".join(sorted(_MINING))}.'
    )
  embeddings, where = inputs.validate(embeddings, labels, where=where)
  squares = distances.squared_distances(embeddings, embeddings)
  squares = jnp.where(jnp.eye(labels.shape[0], dtype=bool), 0, squares)

  def sum_of_anchor(row):
    hinges, is_selected = _MINING[mining](*row, margin)
    return jnp.sum(hinges, where=is_selected), jnp.sum(is_selected)

  # Both passes go anchor by anchor: all triplets at once would take batch^3.
  sums, counts = jax.lax.map(
    jax.checkpoint(sum_of_anchor), (squares, *inputs.pairs(labels, where))
  )
  return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)


def _batch_all(squares, is_positive, is_negative, margin):
  """Returns the hinges of an anchor's triplets, [batch, batch], and a mask."""
  hinges = jax.nn.relu(squares[:, None] + margin - squares[None, :])
  is_triplet = is_positive[:, None] & is_negative[None, :]
  return hinges, is_triplet & (hinges > 0)


def _batch_hard(squares, is_positive, is_negative, margin):
  """Returns the hinge of an anchor's hardest triplet, [], and a mask."""
  farthest = jnp.max(squares, where=is_positive, initial=0)
  nearest = jnp.min(squares, where=is_negative, initial=jnp.inf)
  hinge = jax.nn.relu(farthest + margin - nearest)
  return hinge, jnp.any(is_positive) & jnp.any(is_negative)


def _semi_hard(squares, is_positive, is_negative, margin):
  """Returns the hinges of an anchor's positive pairs, [batch], and a mask."""
  is_farther = is_negative[None, :] & (squares[None, :] > squares[:, None])
  nearest = jnp.min(
    jnp.broadcast_to(squares, is_farther.shape),
    axis=1,
    where=is_farther,
    initial=jnp.inf,
  )
  farthest = jnp.max(squares, where=is_negative, initial=0)
  negative = jnp.where(jnp.any(is_farther, axis=1), nearest, farthest)
  hinges = jax.nn.relu(squares + margin - negative)
  return hinges, is_positive & jnp.any(is_negative)


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
  lengths = distances.lengths_of_differences(embeddings)
  is_positive, is_negative = inputs.pairs(labels, where)
  pushes = masked.log_sum_exp(margin - lengths, axis=1, where=is_negative)
  pushes = jnp.logaddexp(pushes[:, None], pushes[None, :])
  losses = jax.nn.relu(pushes + lengths) ** 2 / 2
  return masked.mean(losses, where=is_positive)


def multi_similarity_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  alpha: float = 2.0,
  beta: float = 50.0,
  base: float = 0.5,
  epsilon: float = 0.1,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the multi-similarity loss of each example.

  With S the cosines, each anchor i selects the negatives N with a cosine above
  that of its least similar positive minus epsilon, and the positives P with a
  cosine below that of its most similar negative plus epsilon (Eq. 11 to 15 of
  https://arxiv.org/abs/1904.06627):

    loss_i = 1/alpha log(1 + sum_{k in P} exp(-alpha (S_ik - base)))
           + 1/beta log(1 + sum_{k in N} exp(beta (S_ik - base))).

  Args:
    embeddings: float [batch, dim]; normalized by this function.
    labels: int [batch].
    alpha: the scale of positives, > 0.
    beta: the scale of negatives, > 0.
    base: lambda, the offset of the cosines; 0.5 as in the authors' code.
    epsilon: slack of the selection. With infinity, an anchor that has both a
      positive and a negative selects all of its pairs; an anchor without one
      of them still selects none.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example; 0 for an anchor without a
    positive or without a negative.
  """
  embeddings, where = inputs.validate(embeddings, labels, where=where)
  cosines = distances.cosines(embeddings, embeddings)
  is_positive, is_negative = inputs.pairs(labels, where)
  # Without a positive (or a negative), the threshold is infinite. An infinite
  # epsilon makes it NaN, with which no comparison holds either.
  least = jnp.min(
    cosines, axis=1, where=is_positive, initial=jnp.inf, keepdims=True
  )
  most = jnp.max(
    cosines, axis=1, where=is_negative, initial=-jnp.inf, keepdims=True
  )
  pulls = masked.log1p_sum_exp(
    -alpha * (cosines - base),
    axis=1,
    where=is_positive & (cosines < most + epsilon),
  )
  pushes = masked.log1p_sum_exp(
    beta * (cosines - base),
    axis=1,
    where=is_negative & (cosines > least - epsilon),
  )
  return pulls / alpha + pushes / beta


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
  lengths = distances.lengths_of_differences(embeddings)
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
