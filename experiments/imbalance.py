"""Compares corrections for long-tailed classes, which the paper does not study.

python experiments/imbalance.py --workdir=DIR [--config=FILE] [--num_seeds=N]

Subsamples the train classes to a long tail with a ratio of 50 and trains
Proxy-NCA without a correction; with losses weighted by the inverse square root
and by the inverse of the class frequency; with logit adjustment; with
class-balanced batches; and with twice as many proxies as classes, more for
larger classes. Held-out images of the train classes, which search among the
train images, show the effect on frequent and rare classes; the test classes
show the effect on generalization.
"""

import os
import pathlib
import sys

import ml_collections
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from experiments import runs
from proxy_nca_jax import datasets

_RATIO = 50.0
_PARTS = ('recall@1_head', 'recall@1_middle', 'recall@1_tail')


def make_methods(num_classes: int) -> dict[str, dict]:
  return {
    'Proxy-NCA': {},
    'weighted, n^-1/2': {'loss.class_weighting': 0.5},
    'weighted, n^-1': {'loss.class_weighting': 1.0},
    'logit-adjusted': {'loss.logit_adjustment': 1.0},
    'class-balanced batches': {'dataset.images_per_class': 4},
    'proxies by size': {
      'loss.name': 'fractional_proxy_nca',
      'loss.num_proxies': 2 * num_classes,
      'proxies.by_size': True,
    },
  }


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  config.dataset.long_tail = _RATIO
  sizes = datasets.load(config).train.class_sizes
  methods = make_methods(len(sizes))
  seeds = range(runs.NUM_SEEDS.value)
  results = runs.train_all(
    config,
    {
      f'{index}_{seed}': {**fields, 'seed': seed}
      for index, fields in enumerate(methods.values())
      for seed in seeds
    },
    workdir,
  )
  figure = runs.Figure(1, title='Recall@1 by frequency of the train class')
  (axes,) = figure.axes
  rows = []
  for index, name in enumerate(methods):
    per_seed = [results[f'{index}_{seed}'].scores for seed in seeds]
    parts = np.array(
      [[scores['seen_classes'][part] for part in _PARTS] for scores in per_seed]
    )
    figure.draw(axes, name, range(len(_PARTS)), parts)
    cells = {
      part.removeprefix('recall@1_'): runs.spread(values)
      for part, values in zip(_PARTS, parts.T)
    }
    for title, split in (('all', 'seen_classes'), ('unseen', 'trained')):
      values = [scores[split]['recall@1'] for scores in per_seed]
      cells[title] = runs.spread(values)
    rows.append({'Recall@1, %': name, **cells})
  axes.set_xticks(range(len(_PARTS)), ['head', 'middle', 'tail'])
  axes.set_ylabel('Recall@1 of held-out images, %')
  runs.publish(
    rows,
    figure,
    os.path.join(workdir, 'imbalance'),
    text=(
      f'Train classes have {sizes.min()} to {sizes.max()} images; head, middle '
      'and tail are the most frequent, middle and rarest third of them. Lines '
      'are means over seeds, bands their range. "unseen" are the test classes, '
      'which keep all their images.'
    ),
    config=config,
    result=next(iter(results.values())),
  )


if __name__ == '__main__':
  runs.start(main)
