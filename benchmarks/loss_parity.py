"""Compares losses and gradients with those of pytorch-metric-learning.

python benchmarks/loss_parity.py [--seeds=3]

Needs: pip install torch pytorch-metric-learning

Computes each loss that both libraries define in the same way, on the same
random embeddings, proxies and labels, at three sizes: by
pytorch-metric-learning in float64 and float32, and by this project, which
computes in float32. The columns are the largest differences from the float64
results. Values are compared relative to max(1, |value|), gradients relative to
their largest entry. "ours" is this project; "peer" is pytorch-metric-learning
in float32, which shows the effect of rounding.
"""

import argparse
import functools
import math
import pathlib
import sys


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--seeds', type=int, default=3, help='number of random inputs per size'
  )
  return parser.parse_args()


# Parsed here because --help must work without the packages imported below.
_ARGUMENTS = _parse()

import jax
import jax.numpy as jnp
import numpy as np
import pytorch_metric_learning as peer
import torch
from pytorch_metric_learning import (
  distances,
  miners,
  reducers,
  regularizers,
)
from pytorch_metric_learning import losses as peer_losses

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax import losses

_SIZES = ((8, 4, 8), (48, 40, 64), (192, 300, 128))  # Batch, classes, dim.
_CENTERS = 3


def with_proxies(loss_fn, attribute, **kwargs):
  """Wraps a loss of the peer as a function (x, p, labels) -> scalar."""

  def total(x, p, labels):
    loss = loss_fn(p.shape[0], x.shape[1], **kwargs).to(x.dtype)
    rows = p.reshape(-1, x.shape[1])
    if attribute != 'proxies':  # `W` and `fc` hold the proxies as columns.
      rows = rows.T
    delattr(loss, attribute)
    setattr(loss, attribute, rows)
    # cast_types writes to `.data`, which would detach the gradient.
    loss.cast_types = lambda dtype, device: None
    return loss(x, labels)

  return total


def without_proxies(loss, miner=None):
  def total(x, labels):
    return loss(x, labels, miner(x, labels) if miner else None)

  return total


def adaface(x, p, labels):
  """AdaFace as in the authors' code, with the statistics of the batch.

  https://github.com/mk-minchul/AdaFace, whose `t_alpha` is 1 here.
  """
  norms = torch.linalg.norm(x, dim=1).clip(1e-3, 100).detach()
  quality = (norms - norms.mean()) / (norms.std() + 1e-3)
  quality = (0.333 * quality).clip(-1, 1)
  normalize = torch.nn.functional.normalize
  cosines = (normalize(x) @ normalize(p).T).clip(-1 + 1e-3, 1 - 1e-3)
  is_target = torch.nn.functional.one_hot(labels, len(p)).to(x.dtype)
  angles = cosines.acos() - 0.4 * quality[:, None] * is_target
  rotated = angles.clip(1e-3, math.pi - 1e-3).cos()
  logits = 64 * (rotated - 0.4 * (1 + quality[:, None]) * is_target)
  return torch.nn.functional.cross_entropy(logits, labels)


def in_square_batches(loss, library):
  """Wraps a loss as that of the first n^2 examples, n of each of n classes."""

  def total(x, labels):
    n = math.isqrt(len(labels))
    return loss(x[: n * n], library.arange(n * n) // n)

  return total


def softplus_of_proxy_nca(x, p, labels):
  return jax.nn.softplus(losses.proxy_nca_loss(x, p, labels))


def subcenter(num_classes, dim, **kwargs):
  return peer_losses.SubCenterArcFaceLoss(
    num_classes=num_classes, embedding_size=dim, **kwargs
  )


def soft_triple(num_classes, dim):
  return peer_losses.SoftTripleLoss(
    num_classes,
    dim,
    centers_per_class=_CENTERS,
    weight_regularizer=regularizers.SparseCentersRegularizer(
      num_classes, _CENTERS
    ),
    weight_reg_weight=0.2,
  )


def rows():
  """Yields (name, our loss, the peer's loss, how they are made comparable)."""
  squared = distances.LpDistance(power=2, normalize_embeddings=False)
  plain = distances.LpDistance(normalize_embeddings=False)
  dot = distances.DotProductSimilarity(normalize_embeddings=False)
  proxy_nca = with_proxies(peer_losses.ProxyNCALoss, 'proxies', softmax_scale=9)
  degrees = math.degrees(0.5)
  yield (
    'proxy_nca',
    softplus_of_proxy_nca,
    proxy_nca,
    'the peer has only the softmax form, which is softplus of ours',
  )
  yield 'proxy_nca_pp', losses.LOSSES['proxy_nca_pp'].fn, proxy_nca, ''
  yield (
    'proxy_anchor',
    losses.LOSSES['proxy_anchor'].fn,
    with_proxies(peer_losses.ProxyAnchorLoss, 'proxies'),
    '',
  )
  yield (
    'normalized_softmax',
    losses.LOSSES['normalized_softmax'].fn,
    with_proxies(peer_losses.NormalizedSoftmaxLoss, 'W'),
    '',
  )
  yield (
    'cosface',
    losses.LOSSES['cosface'].fn,
    with_proxies(peer_losses.CosFaceLoss, 'W'),
    '',
  )
  yield (
    'arcface',
    losses.LOSSES['arcface'].fn,
    with_proxies(peer_losses.ArcFaceLoss, 'W', margin=degrees),
    '',
  )
  yield (
    'subcenter_arcface',
    losses.LOSSES['subcenter_arcface'].fn,
    with_proxies(subcenter, 'W', margin=degrees, sub_centers=_CENTERS),
    '',
  )
  yield (
    'soft_triple',
    losses.LOSSES['soft_triple'].fn,
    with_proxies(soft_triple, 'fc'),
    'with its SparseCentersRegularizer',
  )
  yield (
    'adaface',
    losses.LOSSES['adaface'].fn,
    adaface,
    "not of the library: the authors' formula, written in torch",
  )
  triplet = functools.partial(losses.LOSSES['triplet'].fn, margin=5.0)
  for mining, miner, reducer in (
    ('batch_all', None, reducers.AvgNonZeroReducer()),
    (
      'batch_hard',
      miners.BatchHardMiner(distance=squared),
      reducers.MeanReducer(),
    ),
  ):
    yield (
      f'triplet, {mining}',
      functools.partial(triplet, mining=mining),
      without_proxies(
        peer_losses.TripletMarginLoss(
          margin=5.0, distance=squared, reducer=reducer
        ),
        miner,
      ),
      'squared distance, embeddings not normalized',
    )
  yield (
    'triplet, semi_hard',
    None,
    None,
    'the peer averages over all negatives in the band; ours takes the nearest, '
    'or the farthest negative if the band is empty',
  )
  yield (
    'contrastive',
    None,
    None,
    'the peer has linear penalties, averaged over nonzero ones; those '
    'of the paper are squared and averaged over all pairs',
  )
  yield (
    'soft_margin_triplet',
    losses.LOSSES['soft_margin_triplet'].fn,
    without_proxies(
      peer_losses.TripletMarginLoss(
        margin=0,
        smooth_loss=True,
        distance=plain,
        reducer=reducers.MeanReducer(),
      ),
      miners.BatchHardMiner(distance=plain),
    ),
    'embeddings not normalized',
  )
  for name, loss in (
    ('circle', peer_losses.CircleLoss()),
    ('nt_xent', peer_losses.NTXentLoss(temperature=0.1)),
    ('sup_con', peer_losses.SupConLoss()),
  ):
    yield name, losses.LOSSES[name].fn, without_proxies(loss), ''
  yield (
    'smooth_ap',
    in_square_batches(losses.LOSSES['smooth_ap'].fn, np),
    in_square_batches(peer_losses.SmoothAPLoss(), torch),
    'n sorted classes of n examples: the peer groups others across classes',
  )
  yield (
    'n_pairs',
    losses.LOSSES['n_pairs'].fn,
    without_proxies(peer_losses.NPairsLoss(distance=dot)),
    'embeddings not normalized',
  )
  yield (
    'lifted_structure',
    losses.LOSSES['lifted_structure'].fn,
    without_proxies(peer_losses.LiftedStructureLoss(distance=plain)),
    'embeddings not normalized',
  )
  yield (
    'multi_similarity',
    losses.LOSSES['multi_similarity'].fn,
    without_proxies(
      peer_losses.MultiSimilarityLoss(),
      miners.MultiSimilarityMiner(epsilon=0.1),
    ),
    'with its miner',
  )


def make_inputs(name, size, seed):
  """Returns ([embeddings] or [embeddings, proxies], labels).

  Every label occurs at least twice.
  """
  batch, num_classes, dim = size
  rng = np.random.default_rng(seed)
  arrays = [rng.normal(size=(batch, dim))]
  form = losses.LOSSES[name].proxies
  if form:
    shape = (num_classes, dim)
    if form == losses.MULTI_CENTER:
      shape = (num_classes, _CENTERS, dim)
    arrays.append(rng.normal(size=shape))
  labels = rng.permutation(num_classes)[: max(batch // 4, 2)]
  return arrays, rng.permutation(np.resize(labels, batch))


def ours(loss_fn, arrays, labels):
  arrays = [jnp.asarray(x, jnp.float32) for x in arrays]

  def mean(arrays):
    return jnp.mean(loss_fn(*arrays, jnp.asarray(labels, jnp.int32)))

  return jax.jit(jax.value_and_grad(mean))(arrays)


def peers(loss_fn, arrays, labels, dtype):
  tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in arrays]
  value = loss_fn(*tensors, torch.tensor(labels))
  value.backward()
  return value.item(), [x.grad.numpy() for x in tensors]


def differences(actual, expected):
  """Returns the relative differences of the value and of the gradients."""
  value = abs(float(actual[0]) - expected[0]) / max(1, abs(expected[0]))
  return value, max(
    np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
    for a, b in zip(actual[1], expected[1])
  )


def main() -> None:
  num_seeds = _ARGUMENTS.seeds
  print(
    f'jax {jax.__version__}, torch {torch.__version__}, '
    f'pytorch-metric-learning {peer.__version__}, {num_seeds} seeds; '
    f'batch, classes, dim: {", ".join(map(str, _SIZES))}'
  )
  print(f'{"":20}{"value":>16}{"":8}{"gradients":>16}')
  print(f'{"":20}' + f'{"ours":>12}{"peer":>12}' * 2)
  for name, our_loss, peer_loss, note in rows():
    if our_loss is None:
      print(f'{name:20}  not compared: {note}')
      continue
    worst = np.zeros((2, 2))
    for size in _SIZES:
      for seed in range(num_seeds):
        inputs = make_inputs(name.split(',')[0], size, seed)
        expected = peers(peer_loss, *inputs, torch.float64)
        both = (
          differences(ours(our_loss, *inputs), expected),
          differences(peers(peer_loss, *inputs, torch.float32), expected),
        )
        worst = np.maximum(worst, both)
    cells = ''.join(f'{cell:12.1e}' for cell in worst.T.flat)
    print(f'{name:20}{cells}  {note}')
  compared = {name.split(',')[0] for name, *_ in rows()}
  print('only here:', ', '.join(sorted(set(losses.LOSSES) - compared)))


if __name__ == '__main__':
  main()
