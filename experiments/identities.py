"""Do proxies of many classes generalise? Recall@1 against training classes.

python experiments/identities.py --workdir=DIR [--config=FILE] [--num_seeds=N]

Proxy-NCA with one proxy a class learns 10 train classes, 30, 100 and so on to
all, in as many steps, and is measured on the same test classes each time.
"""

import os
import pathlib
import sys

import ml_collections
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from experiments import runs
from proxy_nca_jax import datasets


def class_numbers(total: int) -> list[int]:
  """Returns 10, 30, 100, 300, ... below the total, and the total."""
  steps = [digit * 10**power for power in range(1, 9) for digit in (1, 3)]
  return [number for number in steps if number < total] + [total]


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  numbers = class_numbers(datasets.load(config).train.num_classes)
  seeds = range(runs.NUM_SEEDS.value)
  results = runs.train_all(
    config,
    {
      f'{number}_{seed}': {'dataset.num_train_classes': number, 'seed': seed}
      for number in numbers
      for seed in seeds
    },
    workdir,
  )
  scores = np.array(
    [
      [results[f'{n}_{seed}'].scores['trained']['recall@1'] for n in numbers]
      for seed in seeds
    ]
  )
  rows = [
    {
      'train classes': number,
      'train images': results[f'{number}_0'].scores['dataset']['train'][
        'images'
      ],
      'Recall@1, %': runs.spread(values),
    }
    for number, values in zip(numbers, scores.T)
  ]
  figure = runs.Figure(1, title='Recall@1 against the number of train classes')
  (axes,) = figure.axes
  figure.draw(axes, 'Proxy-NCA, one proxy a class', numbers, scores)
  last = results[f'{numbers[-1]}_0']
  untrained = last.scores['untrained']['recall@1']
  axes.axhline(
    100 * untrained, color='gray', linestyle='--', label='untrained network'
  )
  axes.set_xscale('log')
  axes.set_xticks(numbers, [f'{n:,}' for n in numbers])
  axes.minorticks_off()
  axes.set_xlabel('train classes')
  runs.publish(
    rows,
    figure,
    os.path.join(workdir, 'identities'),
    text=(
      'The line is the mean over the seeds, the band their range. Untrained, '
      f'seed 0: {100 * untrained:.2f}%.'
    ),
    config=config,
    result=last,
  )


if __name__ == '__main__':
  runs.start(main)
