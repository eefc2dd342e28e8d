"""Compares numbers of proxies per class, with static and dynamic assignment.

python experiments/proxy_fraction.py --workdir=DIR [--config=FILE]

Trains Proxy-NCA with 0.1 to 2 proxies per class. Static: classes are assigned
to proxies at random before training. Dynamic: each example is assigned to its
nearest proxy, and labels only say which examples of a batch match; batches
therefore hold four images per class.
"""

import os
import pathlib
import sys

import ml_collections
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from experiments import runs
from proxy_nca_jax import datasets

_FRACTIONS = (0.1, 0.25, 0.5, 1.0, 2.0)
_ASSIGNMENTS = {
  'static': {'loss.name': 'fractional_proxy_nca'},
  'dynamic': {'loss.name': 'dynamic_proxy_nca', 'dataset.images_per_class': 4},
}


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  num_classes = datasets.load(config).train.num_classes
  counts = [max(round(f * num_classes), 2) for f in _FRACTIONS]
  seeds = range(runs.NUM_SEEDS.value)
  results = runs.train_all(
    config,
    {
      f'{name}_{count}_{seed}': {
        **fields,
        'loss.num_proxies': count,
        'seed': seed,
      }
      for name, fields in _ASSIGNMENTS.items()
      for count in counts
      for seed in seeds
    },
    workdir,
  )
  figure = runs.Figure(1, title='Recall@1 against proxies per class')
  (axes,) = figure.axes
  rows = [
    {'proxies per class': f'{f:g}', 'proxies': n}
    for f, n in zip(_FRACTIONS, counts)
  ]
  for name in _ASSIGNMENTS:
    scores = np.array(
      [
        [
          results[f'{name}_{n}_{seed}'].scores['trained']['recall@1']
          for n in counts
        ]
        for seed in seeds
      ]
    )
    figure.draw(axes, name, _FRACTIONS, scores)
    for row, values in zip(rows, scores.T):
      row[f'{name}, Recall@1, %'] = runs.spread(values)
  axes.set_xscale('log')
  axes.set_xticks(_FRACTIONS, [f'{f:g}' for f in _FRACTIONS])
  axes.minorticks_off()
  axes.set_xlabel('proxies per class')
  runs.publish(
    rows,
    figure,
    os.path.join(workdir, 'proxy_fraction'),
    text='Lines are means over seeds, bands their range.',
    config=config,
    result=next(iter(results.values())),
  )


if __name__ == '__main__':
  runs.start(main)
