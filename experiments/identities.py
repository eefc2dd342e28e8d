"""Measures whether more training classes generalize better.

python experiments/identities.py --workdir=DIR [--config=FILE] [--num_seeds=N]

Trains Proxy-NCA with one proxy per class on 10, 30, 100, ... and all train
classes, for the same number of steps, and tests on the same unseen classes.
"""

import os
import pathlib
import sys

import ml_collections
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from experiments import runs
from proxy_nca_jax import datasets


def class_counts(total: int) -> list[int]:
  """Returns 10, 30, 100, 300, ... below the total, and the total."""
  counts = [digit * 10**power for power in range(1, 9) for digit in (1, 3)]
  return [count for count in counts if count < total] + [total]


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  counts = class_counts(datasets.load(config).train.num_classes)
  seeds = range(runs.NUM_SEEDS.value)
  results = runs.train_all(
    config,
    {
      f'{count}_{seed}': {'dataset.num_train_classes': count, 'seed': seed}
      for count in counts
      for seed in seeds
    },
    workdir,
  )
  scores = np.array(
    [
      [results[f'{n}_{seed}'].scores['trained']['recall@1'] for n in counts]
      for seed in seeds
    ]
  )
  rows = [
    {
      'train classes': count,
      'train images': results[f'{count}_0'].scores['dataset']['train'][
        'images'
      ],
      'Recall@1, %': runs.spread(values),
    }
    for count, values in zip(counts, scores.T)
  ]
  figure = runs.Figure(1, title='Recall@1 against the number of train classes')
  (axes,) = figure.axes
  figure.draw(axes, 'Proxy-NCA, one proxy per class', counts, scores)
  last = results[f'{counts[-1]}_0']
  untrained = last.scores['untrained']['recall@1']
  axes.axhline(
    100 * untrained, color='gray', linestyle='--', label='untrained network'
  )
  axes.set_xscale('log')
  axes.set_xticks(counts, [f'{n:,}' for n in counts])
  axes.minorticks_off()
  axes.set_xlabel('train classes')
  runs.publish(
    rows,
    figure,
    os.path.join(workdir, 'identities'),
    text=(
      'The line is the mean over seeds, the band their range. Untrained '
      f'network, seed 0: {100 * untrained:.2f}%.'
    ),
    config=config,
    result=last,
  )


if __name__ == '__main__':
  runs.start(main)
