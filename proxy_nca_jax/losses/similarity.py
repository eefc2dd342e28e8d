"""Losses of the cosines between the examples of a batch.

All functions take `embeddings: float [batch, dim]` and `labels: int [batch]` of
any values: a positive pair is two different examples with the same label. Pairs
with an example that `where: bool [batch]` masks are ignored. The functions
normalize embeddings, compute in float32 whatever the input dtype, and return
the unreduced `float32 [batch]`, 0 for masked examples and for those without the
required pairs.

`memory`, from `update_memory`, adds examples of earlier batches to those that
each example is compared with; `pairs`, from a miner of `losses.pairs`, selects
among all pairs.

References:
  Wang et al., Multi-Similarity Loss, CVPR 2019,
    https://arxiv.org/abs/1904.06627
  Khosla et al., Supervised Contrastive Learning, NeurIPS 2020,
    https://arxiv.org/abs/2004.11362
  Chen et al., A Simple Framework for Contrastive Learning of Visual
    Representations, ICML 2020, https://arxiv.org/abs/2002.05709
  Sun et al., Circle Loss, CVPR 2020, https://arxiv.org/abs/2002.10857
  Brown et al., Smooth-AP, ECCV 2020, https://arxiv.org/abs/2007.12163
"""

import chex
import jax
import jax.numpy as jnp

from proxy_nca_jax import distances
from proxy_nca_jax.losses import masked
from proxy_nca_jax.losses import pairs as pairs_lib


def multi_similarity_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  alpha: float = 2.0,
  beta: float = 50.0,
  base: float = 0.5,
  epsilon: float = 0.1,
  memory: pairs_lib.Memory | None = None,
  pairs: pairs_lib.Pairs | None = None,
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
    embeddings: float [batch, dim].
    labels: int [batch].
    alpha: the scale of positives, > 0.
    beta: the scale of negatives, > 0.
    base: lambda, the offset of the cosines; 0.5 as in the authors' code.
    epsilon: slack of the selection. With infinity, an anchor that has both a
      positive and a negative selects all of its pairs. An anchor without one
      of them selects none, and its loss is 0, whatever epsilon.
    memory: examples of earlier batches; by default none.
    pairs: the pairs to compare; by default all.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example; 0 for an anchor without a
    positive or without a negative.
  """
  cosines, pairs = _compare(embeddings, labels, memory, pairs, where)
  is_positive, is_negative = pairs_lib.by_similarity(cosines, pairs, epsilon)
  pulls = masked.log1p_sum_exp(
    -alpha * (cosines - base), axis=1, where=is_positive
  )
  pushes = masked.log1p_sum_exp(
    beta * (cosines - base), axis=1, where=is_negative
  )
  return pulls / alpha + pushes / beta


def sup_con_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  temperature: float = 0.1,
  memory: pairs_lib.Memory | None = None,
  pairs: pairs_lib.Pairs | None = None,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the supervised contrastive loss of each example.

  With S the cosines, P(i) the positives of example i, and A(i) its positives
  and negatives (L_out, Eq. 2 of https://arxiv.org/abs/2004.11362),

    loss_i = -1/|P(i)| sum_{p in P(i)}
      log(exp(S_ip / T) / sum_{a in A(i)} exp(S_ia / T)).

  The other positives are in the sum: with several the loss stays above
  log |P(i)|. `nt_xent_loss` leaves them out.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    temperature: T, positive; the paper's is 0.1.
    memory: examples of earlier batches; by default none.
    pairs: the pairs to compare; by default all.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example; 0 for one without a positive.
  """
  cosines, pairs = _compare(embeddings, labels, memory, pairs, where)
  logits = cosines / temperature
  log_sum = masked.log_sum_exp(
    logits, axis=1, where=pairs.is_positive | pairs.is_negative
  )
  loss = log_sum - masked.mean(logits, axis=1, where=pairs.is_positive)
  return jnp.where(jnp.any(pairs.is_positive, axis=1), loss, 0.0)


def nt_xent_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  temperature: float = 0.1,
  memory: pairs_lib.Memory | None = None,
  pairs: pairs_lib.Pairs | None = None,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the normalized temperature-scaled cross-entropy of each example.

  With S the cosines, P(i) the positives of example i and N(i) its negatives,

    loss_i = -1/|P(i)| sum_{p in P(i)}
      log(exp(S_ip / T) / (exp(S_ip / T) + sum_{n in N(i)} exp(S_in / T))).

  With two examples of each class it is the loss of SimCLR (Eq. 1 of
  https://arxiv.org/abs/2002.05709), whose two are views of one image: give both
  views of image i the label i.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    temperature: T, positive; 0.1 is the paper's on ImageNet.
    memory: examples of earlier batches; by default none.
    pairs: the pairs to compare; by default all.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example; 0 for one without a positive or
    without a negative.
  """
  cosines, pairs = _compare(embeddings, labels, memory, pairs, where)
  logits = cosines / temperature
  others = masked.log_sum_exp(logits, axis=1, where=pairs.is_negative)
  losses = jax.nn.softplus(others[:, None] - logits)
  return masked.mean(losses, axis=1, where=pairs.is_positive)


def circle_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  scale: float = 80.0,
  margin: float = 0.4,
  memory: pairs_lib.Memory | None = None,
  pairs: pairs_lib.Pairs | None = None,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the circle loss of each example.

  With S the cosines, P(i) the positives of example i and N(i) its negatives
  (Sec. 3 of https://arxiv.org/abs/2002.10857),

    loss_i = log(1 + sum_{n in N(i)} exp(scale a_n (S_in - margin))
               * sum_{p in P(i)} exp(-scale a_p (S_ip - 1 + margin)))
    a_n = [S_in + margin]_+, a_p = [1 + margin - S_ip]_+.

  The weights a_n and a_p are constants to the gradient, as in the paper's
  gradients and in common code.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    scale: gamma, positive; 80 is the paper's for image retrieval, and 256 for
      faces.
    margin: m, the relaxation; 0.4 for image retrieval, and 0.25 for faces.
    memory: examples of earlier batches; by default none.
    pairs: the pairs to compare; by default all.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example; 0 for one without a positive or
    without a negative.
  """
  cosines, pairs = _compare(embeddings, labels, memory, pairs, where)
  constant = jax.lax.stop_gradient(cosines)
  pulls = jax.nn.relu(1 + margin - constant) * (1 - margin - cosines)
  pushes = jax.nn.relu(constant + margin) * (cosines - margin)
  has_both = jnp.any(pairs.is_positive, 1) & jnp.any(pairs.is_negative, 1)
  total = masked.log_sum_exp(
    scale * pulls, axis=1, where=pairs.is_positive | ~has_both[:, None]
  ) + masked.log_sum_exp(
    scale * pushes, axis=1, where=pairs.is_negative | ~has_both[:, None]
  )
  return jnp.where(has_both, jax.nn.softplus(total), 0.0)


def smooth_ap_loss(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  temperature: float = 0.01,
  pairs: pairs_lib.Pairs | None = None,
  where: chex.Array | None = None,
) -> jax.Array:
  """Calculates the Smooth-AP loss of each example: 1 - its average precision.

  Example q ranks the batch by its cosines S. With P its positives and N its
  negatives, and a sigmoid G(x) = 1 / (1 + exp(-x / T)) in place of a step
  (Sec. 4 of https://arxiv.org/abs/2007.12163),

    AP_q = 1/|P| sum_{i in P} (1 + sum_{j in P, j != i} G(S_qj - S_qi))
      / (1 + sum_{j in P, j != i} G(S_qj - S_qi) + sum_{j in N} G(S_qj - S_qi)).

  As in the authors' code the example itself is one of its positives. Time is
  proportional to batch^3, memory to batch^2: examples are ranked one by one, in
  both passes.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    temperature: T, positive; the paper's is 0.01.
    pairs: the pairs to compare; by default all.
    where: bool [batch], examples to include; by default all.

  Returns:
    float32 [batch], the loss of each example, in [0, 1); 0 for one without a
    positive.
  """
  cosines, pairs = _compare(embeddings, labels, None, pairs, where)
  itself = jnp.eye(len(cosines), dtype=bool)

  def of_example(row):
    cosines, is_positive, is_negative, is_itself = row
    is_relevant = is_positive | is_itself
    above = jax.nn.sigmoid((cosines[None, :] - cosines[:, None]) / temperature)
    is_other = is_relevant[None, :] & ~itself
    rank = 1 + jnp.sum(above, axis=1, where=is_other)
    negatives = jnp.sum(above, axis=1, where=is_negative[None, :])
    loss = masked.mean(negatives / (rank + negatives), where=is_relevant)
    return jnp.where(jnp.any(is_positive), loss, 0.0)

  return jax.lax.map(jax.checkpoint(of_example), (cosines, *pairs, itself))


def _compare(embeddings, labels, memory, pairs, where):
  """Returns the cosines of anchors and items, and their pairs."""
  anchors, items, pairs = pairs_lib.compare(
    embeddings, labels, memory=memory, pairs=pairs, where=where
  )
  return distances.cosines(anchors, items), pairs
