"""Compares how fast losses converge; the paper claims three times fewer steps.

python experiments/convergence.py --workdir=DIR [--config=FILE] [--num_seeds=N]

Trains Proxy-NCA, Proxy-triplet, triplets with semi-hard negatives, N-pairs,
lifted structure and center loss from the same initial network for the same
number of steps. For each loss, a small grid of factors for all learning rates
is first evaluated on the second half of the train classes. With the best
factor, the loss then trains on all train classes, and the test classes are
scored along the way.

Losses between examples need several images per class in a batch: four of each
of 16 classes, or two of each of 32 for N-pairs. The others draw images at
random. As in their papers, N-pairs, lifted structure and center loss use
embeddings that are not normalized; N-pairs has the regularization weight of
TensorFlow's npairs_loss.
"""

import os
import pathlib
import sys

import ml_collections
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from experiments import runs

_BALANCED = {'dataset.images_per_class': 4}
_PAIRS = {
  'dataset.images_per_class': 2,
  'model.normalize': False,
  'loss.n_pairs.regularization': 0.002,
}
_LOSSES = {
  'Proxy-NCA': {'loss.name': 'proxy_nca'},
  'Proxy-triplet': {'loss.name': 'proxy_triplet'},
  'triplet, semi-hard': {'loss.name': 'triplet', **_BALANCED},
  'N-pairs': {'loss.name': 'n_pairs', **_PAIRS},
  'lifted structure': {
    'loss.name': 'lifted_structure',
    'model.normalize': False,
    **_BALANCED,
  },
  'center': {'loss.name': 'center_softmax', 'model.normalize': False},
}
_PROXY_LOSSES = ('Proxy-NCA', 'Proxy-triplet')
_FACTORS = (1.0, 3.0, 10.0)


def _folder_name(*parts) -> str:
  return '_'.join(map(str, parts)).replace(',', '').replace(' ', '_')


def scale_learning_rates(config, factor: float) -> dict[str, float]:
  return {
    f'optimizer.{group}.learning_rate': factor
    * config.optimizer[group].learning_rate
    for group in ('backbone', 'head', 'proxies')
  }


def choose_factors(config, workdir: str) -> dict[str, float]:
  """Returns, for each loss, the factor with the best validation score."""
  changes = {
    _folder_name(name, f'x{factor:g}'): {
      **fields,
      **scale_learning_rates(config, factor),
      'dataset.validation': '2/2',
      'eval_every': config.num_steps,
      'evaluation.baselines': False,
    }
    for name, fields in _LOSSES.items()
    for factor in _FACTORS
  }
  results = iter(runs.train_all(config, changes, workdir).values())
  best = {}
  for name in _LOSSES:
    scores = {
      factor: next(results).scores['selected_by']['recall@1']
      for factor in _FACTORS
    }
    best[name] = max(scores, key=scores.get)
  return best


def steps_to(level: float, steps: np.ndarray, scores: np.ndarray) -> float:
  """Returns the first step that reaches a score, by linear interpolation.

  Args:
    level: the score to reach.
    steps: int [num_evaluations], ascending.
    scores: float [num_evaluations].

  Returns:
    The step, or infinity if no score reaches the level.
  """
  reached = np.flatnonzero(scores >= level)
  if not reached.size:
    return np.inf
  after = reached[0]
  if after == 0:
    return float(steps[0])
  before = after - 1
  fraction = (level - scores[before]) / (scores[after] - scores[before])
  return float(steps[before] + fraction * (steps[after] - steps[before]))


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  factors = choose_factors(config, workdir)
  seeds = range(runs.NUM_SEEDS.value)
  changes = {
    (name, seed): {
      **fields,
      **scale_learning_rates(config, factors[name]),
      'seed': seed,
      'eval_every': max(config.num_steps // 10, 1),
    }
    for name, fields in _LOSSES.items()
    for seed in seeds
  }
  results = runs.train_all(
    config,
    {
      _folder_name(name, seed): fields
      for (name, seed), fields in changes.items()
    },
    workdir,
  )
  results = dict(zip(changes, results.values()))

  curves = {}
  for name in _LOSSES:
    per_seed = [results[name, seed].curve() for seed in seeds]
    curves[name] = per_seed[0][0], np.stack([scores for _, scores in per_seed])
  level = max(
    scores.mean(axis=0)[-1]
    for name, (_, scores) in curves.items()
    if name not in _PROXY_LOSSES
  )
  figure = runs.Figure(2, title='Recall@1 during training')
  rows = []
  for name, (steps, scores) in curves.items():
    seconds = np.median(
      [results[name, seed].seconds_per_step() for seed in seeds]
    )
    figure.draw(figure.axes[0], name, steps, scores)
    figure.draw(figure.axes[1], name, steps * seconds, scores)
    num_steps = steps_to(level, steps, scores.mean(axis=0))
    num_proxy_nca_steps = steps_to(
      scores[:, -1].mean(), steps, curves['Proxy-NCA'][1].mean(axis=0)
    )
    rows.append(
      {
        'loss': name,
        'learning rates': f'x{factors[name]:g}',
        'Recall@1, %': runs.spread(scores[:, -1]),
        'steps to the best baseline': f'{num_steps:.0f}'
        if np.isfinite(num_steps)
        else 'not reached',
        'speedup': f'{config.num_steps / num_steps:.2f}x'
        if np.isfinite(num_steps)
        else '',
        'steps of Proxy-NCA to the same score': f'{num_proxy_nca_steps:.0f}'
        if np.isfinite(num_proxy_nca_steps)
        else '',
        'ms per step': f'{1000 * seconds:.0f}',
      }
    )
  figure.axes[0].set_xlabel('steps')
  figure.axes[1].set_xlabel('seconds of training')
  runs.publish(
    rows,
    figure,
    os.path.join(workdir, 'convergence'),
    text=(
      'Lines are means over seeds, bands their range. The best baseline is the '
      'highest final mean Recall@1 of the losses other than Proxy-NCA and '
      f'Proxy-triplet, {100 * level:.2f}%. Learning rates are those of the '
      f'config times the best of {_FACTORS}, chosen on half of the train '
      'classes.'
    ),
    config=config,
    result=next(iter(results.values())),
  )


if __name__ == '__main__':
  runs.start(main)
