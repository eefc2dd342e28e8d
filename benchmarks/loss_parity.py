"""Losses and their gradients, compared with pytorch-metric-learning's.

python benchmarks/loss_parity.py [--seeds=3]

Needs pytorch-metric-learning and torch besides. Each loss that both have is
computed on the same random embeddings, proxies and labels, at three sizes, by
pytorch-metric-learning in float64 and in float32 and by this project, which
computes in float32. The columns are the largest differences from float64: of
the value, relative to it where it is above 1, and of the gradients, relative
to their largest entry; of this project ("ours"), and of
pytorch-metric-learning's own float32 ("peer"), which shows what rounding does.
"""

import argparse
import functools
import math
import pathlib
import sys

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
  """Builds the peer's loss around given proxies: (x, p, labels) -> scalar."""

  def total(x, p, labels):
    loss = loss_fn(p.shape[0], x.shape[1], **kwargs).to(x.dtype)
    rows = p.reshape(-1, x.shape[1])
    if attribute != 'proxies':  # It keeps weights as columns.
      rows = rows.T
    delattr(loss, attribute)
    setattr(loss, attribute, rows)
    # Its casts write to `.data`, which would cut the gradient.
    loss.cast_types = lambda dtype, device: None
    return loss(x, labels)

  return total


def without_proxies(loss, miner=None):
  def total(x, labels):
    return loss(x, labels, miner(x, labels) if miner else None)

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
  """Yields (name, our loss, the peer's, what was done to compare them)."""
  squared = distances.LpDistance(power=2, normalize_embeddings=False)
  plain = distances.LpDistance(normalize_embeddings=False)
  dot = distances.DotProductSimilarity(normalize_embeddings=False)
  own = {name: loss.fn for name, loss in losses.LOSSES.items()}
  proxy_nca = with_proxies(peer_losses.ProxyNCALoss, 'proxies', softmax_scale=9)
  degrees = math.degrees(0.5)
  yield (
    'proxy_nca',
    softplus_of_proxy_nca,
    proxy_nca,
    'it has the softmax form alone: softplus of ours',
  )
  yield 'proxy_nca_pp', own['proxy_nca_pp'], proxy_nca, ''
  yield (
    'proxy_anchor',
    own['proxy_anchor'],
    with_proxies(peer_losses.ProxyAnchorLoss, 'proxies'),
    '',
  )
  yield (
    'normalized_softmax',
    own['normalized_softmax'],
    with_proxies(peer_losses.NormalizedSoftmaxLoss, 'W'),
    '',
  )
  yield (
    'cosface',
    own['cosface'],
    with_proxies(peer_losses.CosFaceLoss, 'W'),
    '',
  )
  yield (
    'arcface',
    own['arcface'],
    with_proxies(peer_losses.ArcFaceLoss, 'W', margin=degrees),
    '',
  )
  yield (
    'subcenter_arcface',
    own['subcenter_arcface'],
    with_proxies(subcenter, 'W', margin=degrees, sub_centers=_CENTERS),
    '',
  )
  yield (
    'soft_triple',
    own['soft_triple'],
    with_proxies(soft_triple, 'fc'),
    'with its SparseCentersRegularizer',
  )
  triplet = functools.partial(own['triplet'], margin=5.0)
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
      'its distance squared, embeddings as they are',
    )
  yield (
    'triplet, semi_hard',
    None,
    None,
    'it takes all negatives of the band, ours the nearest of it or else the '
    'farthest at all',
  )
  yield (
    'contrastive',
    None,
    None,
    'its penalties are linear, each in the mean of those above 0; the '
    "paper's are squared, in the mean of all pairs",
  )
  yield (
    'n_pairs',
    own['n_pairs'],
    without_proxies(peer_losses.NPairsLoss(distance=dot)),
    'embeddings as they are',
  )
  yield (
    'lifted_structure',
    own['lifted_structure'],
    without_proxies(peer_losses.LiftedStructureLoss(distance=plain)),
    'embeddings as they are',
  )
  yield (
    'multi_similarity',
    own['multi_similarity'],
    without_proxies(
      peer_losses.MultiSimilarityLoss(),
      miners.MultiSimilarityMiner(epsilon=0.1),
    ),
    'with its miner',
  )


def make_inputs(name, size, seed):
  """Embeddings, maybe proxies; labels, of which none is alone."""
  batch, num_classes, dim = size
  rng = np.random.default_rng(seed)
  points = [rng.normal(size=(batch, dim))]
  form = losses.LOSSES[name].proxies
  if form:
    shape = (num_classes, dim)
    if form == losses.MULTI_CENTER:
      shape = (num_classes, _CENTERS, dim)
    points.append(rng.normal(size=shape))
  labels = rng.permutation(num_classes)[: max(batch // 4, 2)]
  return points, rng.permutation(np.resize(labels, batch))


def ours(loss_fn, points, labels):
  points = [jnp.asarray(x, jnp.float32) for x in points]

  def mean(points):
    return jnp.mean(loss_fn(*points, jnp.asarray(labels, jnp.int32)))

  return jax.jit(jax.value_and_grad(mean))(points)


def peers(loss_fn, points, labels, dtype):
  points = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in points]
  value = loss_fn(*points, torch.tensor(labels))
  value.backward()
  return value.item(), [x.grad.numpy() for x in points]


def differences(actual, expected):
  """The relative differences of the value and of the gradients."""
  value = abs(float(actual[0]) - expected[0]) / max(1, abs(expected[0]))
  return value, max(
    np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
    for a, b in zip(actual[1], expected[1])
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--seeds', type=int, default=3)
  arguments = parser.parse_args()
  print(
    f'jax {jax.__version__}, torch {torch.__version__}, '
    f'pytorch-metric-learning {peer.__version__}, {arguments.seeds} seeds; '
    f'batch, classes, dim: {", ".join(map(str, _SIZES))}'
  )
  print(f'{"":20}{"value":>16}{"":8}{"gradients":>16}')
  print(f'{"":20}' + f'{"ours":>12}{"peer":>12}' * 2)
  for name, own_loss, peer_loss, note in rows():
    if own_loss is None:
      print(f'{name:20}  not compared: {note}')
      continue
    worst = np.zeros((2, 2))
    for size in _SIZES:
      for seed in range(arguments.seeds):
        inputs = make_inputs(name.split(',')[0], size, seed)
        expected = peers(peer_loss, *inputs, torch.float64)
        both = (
          differences(ours(own_loss, *inputs), expected),
          differences(peers(peer_loss, *inputs, torch.float32), expected),
        )
        worst = np.maximum(worst, both)
    cells = ''.join(f'{cell:12.1e}' for cell in worst.T.flat)
    print(f'{name:20}{cells}  {note}')
  compared = {name.split(',')[0] for name, *_ in rows()}
  print('only here:', ', '.join(sorted(set(losses.LOSSES) - compared)))


if __name__ == '__main__':
  main()
