"""Losses that compare the examples of a batch with each other: no proxies.

All functions take `embeddings: float [batch, dim]` and `labels: int [batch]` of
any values, which say who is alike, and `where: bool [batch]`: an example that
does not count is in no pair. No example is paired with itself. They compute in
float32 whatever comes in, and take the embeddings as they are: where a paper
has them on the unit sphere, the network puts them there. Only
`multi_similarity_loss` is of cosines by definition.

Except for that one, which returns `float32 [batch]`, they are losses of the
batch as a whole and return a scalar. A batch in which they find nothing to
compare has a loss and gradients of 0. Where two examples coincide, a distance
has no derivative; it is taken as 0.

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


def _squared_distances(embeddings):
  """Those of all pairs, float32 [batch, batch], exactly 0 on the diagonal."""
  squares = distances.squared_distances(embeddings, embeddings)
  return jnp.where(jnp.eye(embeddings.shape[0], dtype=bool), 0, squares)


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
    margin: the distance from which on negatives have no loss.
    where: bool [batch], examples that count.

  Returns:
    float32 [], the loss of the batch.
  """
  embeddings, where = inputs.prepare(embeddings, labels, where=where)
  squares = _squared_distances(embeddings)
  shortfall = jax.nn.relu(margin - distances.safe_sqrt(squares))
  is_positive, is_negative = inputs.pairs(labels, where)
  loss = jnp.where(is_positive, squares, shortfall**2) / 2
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
  a positive p and a negative n (FaceNet, whose embeddings are unit vectors and
  whose margin is 0.2) of

    [d(a, p) + margin - d(a, n)]_+.

  Mining chooses the triplets:

    batch_all: all whose loss is not 0 (Hermans et al.).
    batch_hard: for each anchor its farthest positive and its nearest negative
      (Hermans et al.).
    semi_hard: for each positive pair the nearest of the negatives farther from
      the anchor than the positive is (FaceNet); where there is none, the
      farthest negative, as in the loss of Song et al.'s comparisons.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    margin: by which a positive should be nearer than a negative.
    mining: 'batch_all', 'batch_hard' or 'semi_hard'.
    where: bool [batch], examples that count.

  Returns:
    float32 [], the loss of the batch.

  Raises:
    ValueError: if the mining is unknown.
  """
  if mining not in _MINING:
    raise ValueError(
      f'Unknown mining {mining!r}: choose one of {", ".join(sorted(_MINING))}.'
    )
  embeddings, where = inputs.prepare(embeddings, labels, where=where)
  squares = _squared_distances(embeddings)

  def sum_of_anchor(row):
    hinges, is_chosen = _MINING[mining](*row, margin)
    return jnp.sum(hinges, where=is_chosen), jnp.sum(is_chosen)

  # Anchor by anchor, forwards and backwards: all triplets at once are batch^3.
  sums, counts = jax.lax.map(
    jax.checkpoint(sum_of_anchor), (squares, *inputs.pairs(labels, where))
  )
  return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)


def _batch_all(squares, is_positive, is_negative, margin):
  """The hinges of an anchor's triplets, [batch, batch], and which count."""
  hinges = jax.nn.relu(squares[:, None] + margin - squares[None, :])
  is_triplet = is_positive[:, None] & is_negative[None, :]
  return hinges, is_triplet & (hinges > 0)


def _batch_hard(squares, is_positive, is_negative, margin):
  farthest = jnp.max(squares, where=is_positive, initial=0)
  nearest = jnp.min(squares, where=is_negative, initial=jnp.inf)
  hinge = jax.nn.relu(farthest + margin - nearest)
  return hinge, jnp.any(is_positive) & jnp.any(is_negative)


def _semi_hard(squares, is_positive, is_negative, margin):
  """The hinge of each positive pair of an anchor, [batch], and which count."""
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
  (Eq. 6 of Sohn, and its regulariser of Sec. 3.2.2)

    loss = 1/N sum_i log(1 + sum_{j != i} exp(x_i.x_j+ - x_i.x_i+))
         + regularization/(2 N) sum_i (||x_i||^2 + ||x_i+||^2).

  Further examples of a class and classes with one take no part: the paper's
  batches hold two of each.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    regularization: the weight of the squared norms.
    where: bool [batch], examples that count.

  Returns:
    float32 [], the loss of the batch.
  """
  embeddings, where = inputs.prepare(embeddings, labels, where=where)
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
    where: bool [batch], examples that count.

  Returns:
    float32 [], the loss of the batch.
  """
  embeddings, where = inputs.prepare(embeddings, labels, where=where)
  lengths = distances.safe_sqrt(_squared_distances(embeddings))
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

  With S the cosines, an anchor i keeps the negatives N more similar than its
  least similar positive less epsilon, and the positives P less similar than its
  most similar negative plus epsilon (Eq. 11 to 15 of
  https://arxiv.org/abs/1904.06627):

    loss_i = 1/alpha log(1 + sum_{k in P} exp(-alpha (S_ik - base)))
           + 1/beta log(1 + sum_{k in N} exp(beta (S_ik - base))).

  Args:
    embeddings: float [batch, dim]; they are normalised.
    labels: int [batch].
    alpha: of the positives, positive.
    beta: of the negatives, positive.
    base: lambda, the cosine from which on pairs weigh; 0.5 as in the authors'
      code.
    epsilon: by which a pair may be easy and still be kept; infinity keeps all.
    where: bool [batch], examples that count.

  Returns:
    float32 [batch], the loss of each example; 0 without a positive or without a
    negative.
  """
  embeddings, where = inputs.prepare(embeddings, labels, where=where)
  cosines = distances.cosines(embeddings, embeddings)
  is_positive, is_negative = inputs.pairs(labels, where)
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

  A set S of examples, the medoids, clusters the batch: each example goes to its
  nearest medoid. With D the Euclidean distance (https://arxiv.org/abs/1612.01213),

    loss = [max_S {F(S) + margin_multiplier (1 - NMI(S, labels))} - F_true]_+
    F(S) = -sum_i min_{j in S} D_ij
    F_true = sum_c max_{j in c} -sum_{i in c} D_ij,

  S of as many examples as there are classes c. The maximum is searched as in
  the paper: medoids are added one by one, each the best (Algorithm 1), then
  each is exchanged for the best example of its cluster, over and over
  (Algorithm 2). NMI has the geometric mean of the entropies. The search is a
  constant to the gradient. Its time grows with the batch to the third times the
  number of classes.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    margin_multiplier: gamma; the paper lets it decay.
    num_refinements: rounds of exchanges.
    where: bool [batch], examples that count.

  Returns:
    float32 [], the loss of the batch.
  """
  embeddings, where = inputs.prepare(embeddings, labels, where=where)
  lengths = distances.safe_sqrt(_squared_distances(embeddings))
  is_alike = (labels[:, None] == labels[None, :]) & where[None, :]
  # The first of its class stands for it.
  classes = jnp.argmax(is_alike, axis=1)
  is_first = where & (classes == jnp.arange(labels.shape[0]))

  def score(is_medoid, lengths):
    """F(S) and the weighted 1 - NMI, and the medoid of each example."""
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
  costs = jnp.sum(lengths, axis=0, where=is_alike.T & where[:, None])
  costs = jnp.min(
    jnp.broadcast_to(costs, is_alike.shape),
    axis=1,
    where=is_alike,
    initial=jnp.inf,
  )
  return jax.nn.relu(worst + jnp.sum(costs, where=is_first))


def _search_medoids(score, where, num_medoids, num_refinements):
  """Searches the medoids of the largest score: bool [batch].

  Args:
    score: bool [batch] -> (float32 [], the medoid of each example).
    where: bool [batch], examples that count.
    num_medoids: int32 [].
    num_refinements: rounds of exchanges after the greedy search.
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
    # Even a medoid whose twin has taken its cluster may stay.
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
  """I(a, b) / sqrt(H(a) H(b)) of two partitions, int [batch] below batch.

  Each entropy is a mean over examples of the logarithm of the share of those
  that are in the same part. Two partitions of one part each are alike.
  """
  size = where.shape[0]
  total = jnp.maximum(jnp.sum(where), 1)

  def entropy(parts):
    order = jnp.sort(jnp.where(where, parts, size**2))
    first = jnp.searchsorted(order, parts, 'left')
    count = jnp.searchsorted(order, parts, 'right') - first
    count = jnp.where(where, count, 1)
    return -masked.mean(jnp.log(count / total), where=where)

  of_a, of_b = entropy(a), entropy(b)
  shared = of_a + of_b - entropy(size * a + b)
  norm = jnp.sqrt(of_a * of_b)
  is_trivial = (of_a == 0) & (of_b == 0)
  return jnp.where(norm > 0, shared / jnp.where(norm > 0, norm, 1), is_trivial)
