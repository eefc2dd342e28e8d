"""Compares the numbers of the fine-tuning recipe, one change at a time.

python experiments/fine_tuning.py --config=configs/image_folder.py \
  --config.dataset.root=DIR --workdir=/tmp/fine_tuning

Half of the train classes are trained on, and the scores are of the other half;
two seeds swap the halves. Test classes choose nothing. The first row is the
network before training, the second the recipe, and each other row changes the
fields that it names.
"""

import os
import pathlib
import sys

import ml_collections

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from experiments import runs

_SCORES = ('recall@1', 'map@r')
_CHANGES = (
  {},
  {'num_epochs': 2.0},
  {'num_epochs': 8.0},
  {'optimizer.backbone.learning_rate': 3e-5},
  {'optimizer.backbone.learning_rate': 3e-4},
  {'optimizer.head.learning_rate': 1e-4},
  {'optimizer.head.learning_rate': 1e-3},
  {'optimizer.proxies.learning_rate': 1e-3},
  {'optimizer.proxies.learning_rate': 1e-2},
  {'batch_size': 16},
  {'dataset.crop_scale': (0.08, 1.0)},
  {'dataset.crop_scale': (0.6, 1.0)},
  {'loss.proxy_nca.temperature': 1 / 18},
  {'loss.proxy_nca.temperature': 1 / 5},
  {'optimizer.layer_decay': 0.8},
  {'model.freeze_layers': 4},
  {'optimizer.ema_decay': 0.9},
  {
    'optimizer.layer_decay': 0.8,
    'model.freeze_layers': 4,
    'optimizer.ema_decay': 0.9,
  },
)


def _name(change: dict) -> str:
  fields = ', '.join(f'{name}={value}' for name, value in change.items())
  return fields or 'the recipe'


def _row(results: list[runs.Result], *, last: bool) -> dict[str, str]:
  """Returns the first or the last validation scores of some runs."""
  row = {}
  for name in _SCORES:
    title = f'validation.{name}'
    curves = [[r[title] for r in x.rows if title in r] for x in results]
    row[f'{name}, %'] = runs.spread([c[-1 if last else 0] for c in curves])
  return row


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  config.evaluation.baselines = False
  config.evaluation.kmeans_iterations = 0
  config.report = False
  # The network is scored before training and after the last step.
  config.eval_every = 10**6
  seeds = range(runs.NUM_SEEDS.value)
  results = runs.train_all(
    config,
    {
      f'{_name(change)}_{seed}': {
        **change,
        'seed': seed,
        'dataset.validation': f'{1 + seed % 2}/2',
      }
      for seed in seeds
      for change in _CHANGES
    },
    workdir,
  )
  by_change = {
    _name(change): [results[f'{_name(change)}_{seed}'] for seed in seeds]
    for change in _CHANGES
  }
  recipe = by_change[_name({})]
  rows = [{'change': 'before training', **_row(recipe, last=False)}] + [
    {'change': name, **_row(same, last=True)}
    for name, same in by_change.items()
  ]
  runs.write_table(
    rows,
    os.path.join(workdir, 'fine_tuning'),
    text='Scores of held-out train classes: the mean over the seeds, and the '
    'range.',
    config=config,
    result=recipe[0],
  )


if __name__ == '__main__':
  runs.start(main)
