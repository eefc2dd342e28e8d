"""Long-tailed classes, which the paper leaves out: what helps?

python experiments/imbalance.py --workdir=DIR [--config=FILE] [--num_seeds=N]

The train classes are thinned out, the largest to 50 times the smallest, and
learned by Proxy-NCA as it is; with losses weighted by the inverse square root
of the frequency, and by the inverse; with adjusted logits; with class-balanced
batches; and with twice as many proxies as classes, by size. Pictures of the
train classes that were held out show what becomes of frequent and rare ones,
searching among those that were learned; the test classes what generalises.
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
      f'{number}_{seed}': {**fields, 'seed': seed}
      for number, fields in enumerate(methods.values())
      for seed in seeds
    },
    workdir,
  )
  figure = runs.Figure(1, title='Recall@1 by frequency of the train class')
  (axes,) = figure.axes
  rows = []
  for number, name in enumerate(methods):
    of_seeds = [results[f'{number}_{seed}'].scores for seed in seeds]
    parts = np.array(
      [[scores['seen_classes'][part] for part in _PARTS] for scores in of_seeds]
    )
    figure.draw(axes, name, range(len(_PARTS)), parts)
    cells = {
      part.removeprefix('recall@1_'): runs.spread(values)
      for part, values in zip(_PARTS, parts.T)
    }
    for title, split in (('all', 'seen_classes'), ('unseen', 'trained')):
      values = [scores[split]['recall@1'] for scores in of_seeds]
      cells[title] = runs.spread(values)
    rows.append({'Recall@1, %': name, **cells})
  axes.set_xticks(range(len(_PARTS)), ['head', 'middle', 'tail'])
  axes.set_ylabel('Recall@1 of held-out pictures, %')
  runs.publish(
    rows,
    figure,
    os.path.join(workdir, 'imbalance'),
    text=(
      f'Train classes have {sizes.min()} to {sizes.max()} images; head, middle '
      'and tail are thirds of them. Lines are means over the seeds, bands '
      'their range. Unseen are the test classes, which are not thinned out.'
    ),
    config=config,
    result=next(iter(results.values())),
  )


if __name__ == '__main__':
  runs.start(main)
