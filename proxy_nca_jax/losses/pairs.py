"""The pairs that losses between examples compare, mined or remembered.

A pairwise loss compares each example of a batch, the anchor, with `items`: the
examples of the batch and, behind them, those of a memory of earlier batches.
`Pairs` says which of them are positives and negatives of which anchor. A miner
selects some of these pairs, and any loss with the argument `pairs` takes them:

  pairs = losses.multi_similarity_pairs(embeddings, labels)
  loss = losses.contrastive_loss(embeddings, labels, pairs=pairs)

Miners take `embeddings: float [batch, dim]` and `labels: int [batch]` of any
values. They are pure functions; no gradient flows through a selection.

References:
  Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020,
    https://arxiv.org/abs/1912.06798
  Schroff et al., FaceNet, CVPR 2015, https://arxiv.org/abs/1503.03832
  Hermans et al., In Defense of the Triplet Loss for Person Re-Identification,
    2017, https://arxiv.org/abs/1703.07737
  Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017,
    https://arxiv.org/abs/1706.07567
  Wang et al., Multi-Similarity Loss, CVPR 2019,
    https://arxiv.org/abs/1904.06627
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from proxy_nca_jax import distances, masks
from proxy_nca_jax.losses import inputs

# {'embeddings': float32 [size, dim], 'labels': int32 [size], 'where': bool
# [size]}, the newest example first; `where` is False where there is none yet.
Memory = dict[str, jax.Array]


class Pairs(NamedTuple):
  """Which items are compared with which anchors.

  Attributes:
    is_positive: bool [batch, num_items], whether an item is a positive of an
      anchor that counts.
    is_negative: the same of negatives.
  """

  is_positive: jax.Array
  is_negative: jax.Array


def init_memory(size: int, dim: int) -> Memory:
  """Returns an empty memory.

  Args:
    size: number of examples that it holds.
    dim: dimension of the embeddings.
  """
  return {
    'embeddings': jnp.zeros((size, dim)),
    'labels': jnp.zeros(size, jnp.int32),
    'where': jnp.zeros(size, bool),
  }


def update_memory(
  memory: Memory,
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  where: chex.Array | None = None,
) -> Memory:
  """Adds the examples of a batch to a memory, which forgets the oldest ones.

  To be called after a step: the examples of the batch itself are compared with
  gradients, those of the memory are constants (Algorithm 1 of
  https://arxiv.org/abs/1912.06798, which adds the batch first and thereby
  compares it twice).

  Args:
    memory: from `init_memory` or an earlier update.
    embeddings: float [batch, dim].
    labels: int [batch].
    where: bool [batch], examples to remember; by default all. The others take a
      place that is not compared.

  Returns:
    The memory after the batch, of the same shapes.
  """
  embeddings, where = inputs.validate(embeddings, labels, where=where)
  batch = {
    'embeddings': jax.lax.stop_gradient(embeddings),
    'labels': jnp.asarray(labels, jnp.int32),
    'where': where,
  }
  size = memory['labels'].shape[0]
  return {
    name: jnp.concatenate([batch[name], rows])[:size]
    for name, rows in memory.items()
  }


def compare(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  memory: Memory | None = None,
  pairs: Pairs | None = None,
  where: chex.Array | None = None,
) -> tuple[jax.Array, jax.Array, Pairs]:
  """Returns the anchors, the items and their pairs.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    memory: examples of earlier batches; by default none.
    pairs: bool [batch, num_items] twice, or integers 0 and 1, from a miner; by
      default all pairs.
    where: bool [batch], examples to include; by default all.

  Returns:
    (anchors, items, pairs): float32 [batch, dim]; float32 [num_items, dim], of
    which the first rows are the anchors; and the pairs of both. An example is
    not paired with itself.
  """
  anchors, where = inputs.validate(embeddings, labels, where=where)
  chosen = Pairs(*inputs.pairs(labels, where))
  items = anchors
  if memory is not None:
    rows, is_used = jnp.asarray(memory['embeddings']), memory['where']
    items = jnp.concatenate([anchors, jnp.where(is_used[:, None], rows, 0)])
    is_same_class = labels[:, None] == memory['labels'][None, :]
    is_pair = where[:, None] & is_used[None, :]
    remembered = (is_same_class & is_pair, ~is_same_class & is_pair)
    chosen = Pairs(
      *(jnp.concatenate(x, axis=1) for x in zip(chosen, remembered))
    )
  if pairs is not None:
    chex.assert_equal_shape([*pairs, *chosen])
    chosen = Pairs(
      *(x & masks.as_mask(y, name='pairs') for x, y in zip(chosen, pairs))
    )
  return anchors, items, chosen


def batch_hard_pairs(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  memory: Memory | None = None,
  where: chex.Array | None = None,
) -> Pairs:
  """Selects the farthest positive and the nearest negative of each anchor.

  Of the Euclidean distance (Sec. 2 of https://arxiv.org/abs/1703.07737). Items
  at equal distances are all selected.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    memory: examples of earlier batches; by default none.
    where: bool [batch], examples to include; by default all.

  Returns:
    bool [batch, num_items] twice.
  """
  squares, pairs = _squares(embeddings, labels, memory, where)
  farthest = _max(squares, pairs.is_positive)
  nearest = _min(squares, pairs.is_negative)
  return Pairs(
    pairs.is_positive & (squares == farthest),
    pairs.is_negative & (squares == nearest),
  )


def semi_hard_pairs(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  margin: float = 0.2,
  memory: Memory | None = None,
  where: chex.Array | None = None,
) -> Pairs:
  """Selects the semi-hard negatives of each anchor, and all positives.

  With d the squared Euclidean distance, a negative n of an anchor a is
  semi-hard if, for some positive p (Sec. 3.2 of
  https://arxiv.org/abs/1503.03832),

    d(a, p) < d(a, n) < d(a, p) + margin.

  For triplets, `triplet_loss` selects them positive by positive.

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    margin: the width of the band.
    memory: examples of earlier batches; by default none.
    where: bool [batch], examples to include; by default all.

  Returns:
    bool [batch, num_items] twice.
  """
  squares, pairs = _squares(embeddings, labels, memory, where)
  # Of the positives nearer than a negative, the farthest has the band that
  # reaches it, if any has.
  nearer = _largest_below(squares, pairs.is_positive)
  return pairs._replace(
    is_negative=pairs.is_negative & (squares < nearer + margin)
  )


def multi_similarity_pairs(
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  epsilon: float = 0.1,
  memory: Memory | None = None,
  where: chex.Array | None = None,
) -> Pairs:
  """Selects pairs by the cosines of the anchor's hardest pairs.

  With S the cosines, an anchor selects the negatives with a cosine above that
  of its least similar positive minus epsilon, and the positives with a cosine
  below that of its most similar negative plus epsilon (Eq. 11 and 12 of
  https://arxiv.org/abs/1904.06627).

  Args:
    embeddings: float [batch, dim].
    labels: int [batch].
    epsilon: slack of the selection. With infinity, an anchor that has both a
      positive and a negative selects all of its pairs; an anchor without one
      of them still selects none.
    memory: examples of earlier batches; by default none.
    where: bool [batch], examples to include; by default all.

  Returns:
    bool [batch, num_items] twice.
  """
  anchors, items, pairs = compare(
    embeddings, labels, memory=memory, where=where
  )
  return by_similarity(distances.cosines(anchors, items), pairs, epsilon)


def by_similarity(cosines: chex.Array, pairs: Pairs, epsilon: float) -> Pairs:
  """Returns the selection of `multi_similarity_pairs`, from the cosines."""
  # Without a positive (or a negative), the threshold is infinite. An infinite
  # epsilon makes it NaN, with which no comparison holds either.
  least = _min(cosines, pairs.is_positive)
  most = _max(cosines, pairs.is_negative)
  return Pairs(
    pairs.is_positive & (cosines < most + epsilon),
    pairs.is_negative & (cosines > least - epsilon),
  )


def distance_weighted_pairs(
  key: chex.PRNGKey,
  embeddings: chex.Array,
  labels: chex.Array,
  *,
  cutoff: float = 0.5,
  nonzero_loss_cutoff: float = 1.4,
  memory: Memory | None = None,
  where: chex.Array | None = None,
) -> Pairs:
  """Samples as many negatives as an anchor has positives, of all distances.

  On the unit sphere in n dimensions most negatives are at a distance D of about
  sqrt(2). A negative is drawn with a probability proportional to (Sec. 4 of
  https://arxiv.org/abs/1706.07567)

    1 / q(max(D, cutoff)), q(D) = D^(n-2) [1 - D^2 / 4]^((n-3)/2).

  Negatives are drawn without replacement. Those beyond `nonzero_loss_cutoff`
  are not drawn, as in the authors' code, whose cutoffs these are.

  Args:
    key: of `jax.random.key`.
    embeddings: float [batch, dim]; normalized by this function.
    labels: int [batch].
    cutoff: the distance below which all negatives have the same weight.
    nonzero_loss_cutoff: the largest distance of a negative.
    memory: examples of earlier batches; by default none.
    where: bool [batch], examples to include; by default all.

  Returns:
    bool [batch, num_items] twice; all positives.
  """
  anchors, items, pairs = compare(
    embeddings, labels, memory=memory, where=where
  )
  dim = anchors.shape[1]
  squares = jnp.maximum(2 - 2 * distances.cosines(anchors, items), cutoff**2)
  log_weights = -(dim - 2) / 2 * jnp.log(squares) - (dim - 3) / 2 * jnp.log(
    jnp.maximum(1 - squares / 4, 1e-8)
  )
  is_near = pairs.is_negative & (squares < nonzero_loss_cutoff**2)
  # The largest of log weights with Gumbel noise are a sample without
  # replacement.
  scores = log_weights + jax.random.gumbel(key, squares.shape)
  scores = jnp.where(is_near, scores, -jnp.inf)
  count = jnp.sum(pairs.is_positive, axis=1, keepdims=True)
  ranks = jnp.argsort(jnp.argsort(-scores, axis=1), axis=1)
  return pairs._replace(is_negative=is_near & (ranks < count))


def _squares(embeddings, labels, memory, where):
  """Returns the squared distances [batch, num_items], and all pairs."""
  anchors, items, pairs = compare(
    embeddings, labels, memory=memory, where=where
  )
  return distances.squared_distances(anchors, items), pairs


def _max(x, where):
  return jnp.max(x, axis=1, where=where, initial=-jnp.inf, keepdims=True)


def _min(x, where):
  return jnp.min(x, axis=1, where=where, initial=jnp.inf, keepdims=True)


def _largest_below(x, where):
  """Returns the largest value of a row that `where` marks below each value.

  Args:
    x: float32 [batch, num_items].
    where: bool [batch, num_items].

  Returns:
    float32 [batch, num_items]; -infinity where there is none.
  """
  marked = jnp.sort(jnp.where(where, x, jnp.inf), axis=1)
  index = jax.vmap(jnp.searchsorted)(marked, x) - 1
  below = jnp.take_along_axis(marked, jnp.maximum(index, 0), axis=1)
  return jnp.where(index >= 0, below, -jnp.inf)
