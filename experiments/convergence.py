"""How fast do losses converge? The paper claims three times fewer steps.

python experiments/convergence.py --workdir=DIR [--config=FILE] [--num_seeds=N]

From the same initial network, with the same budget, Proxy-NCA and
Proxy-triplet are trained beside triplets with semi-hard negatives, N-pairs,
lifted structure and center loss. All rates of each are multiplied by the factor
of a small grid that is best on the second half of the train classes; then all
train classes are learned with it, and the test classes scored as they go.

Losses that compare examples need several of a class in a batch: four images of
16 classes, for N-pairs two of 32. The others draw images at random. N-pairs,
lifted structure and center loss have embeddings of any length, as their papers,
and N-pairs the weight on it of TensorFlow's npairs_loss.
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


def _folder(*parts) -> str:
  return '_'.join(map(str, parts)).replace(',', '').replace(' ', '_')


def scale_rates(config, factor: float) -> dict[str, float]:
  return {
    f'optimizer.{group}.learning_rate': factor
    * config.optimizer[group].learning_rate
    for group in ('backbone', 'head', 'proxies')
  }


def choose_factors(config, workdir: str) -> dict[str, float]:
  """Returns the factor of each loss with the best validation score."""
  changes = {
    _folder(name, f'x{factor:g}'): {
      **fields,
      **scale_rates(config, factor),
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
  """The first step, between those scored, at which a level is reached."""
  reached = np.flatnonzero(scores >= level)
  if not reached.size:
    return np.inf
  place = reached[0]
  if place == 0:
    return float(steps[0])
  share = (level - scores[place - 1]) / (scores[place] - scores[place - 1])
  return float(steps[place - 1] + share * (steps[place] - steps[place - 1]))


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  factors = choose_factors(config, workdir)
  seeds = range(runs.NUM_SEEDS.value)
  changes = {
    (name, seed): {
      **fields,
      **scale_rates(config, factors[name]),
      'seed': seed,
      'eval_every': max(config.num_steps // 10, 1),
    }
    for name, fields in _LOSSES.items()
    for seed in seeds
  }
  results = runs.train_all(
    config,
    {_folder(name, seed): fields for (name, seed), fields in changes.items()},
    workdir,
  )
  results = dict(zip(changes, results.values()))

  curves = {}
  for name in _LOSSES:
    of_seeds = [results[name, seed].curve() for seed in seeds]
    curves[name] = of_seeds[0][0], np.stack([scores for _, scores in of_seeds])
  level = max(
    scores.mean(axis=0)[-1]
    for name, (_, scores) in curves.items()
    if name not in _PROXY_LOSSES
  )
  figure = runs.Figure(2, title='Recall@1 while training')
  rows = []
  for name, (steps, scores) in curves.items():
    seconds = np.median(
      [results[name, seed].seconds_per_step() for seed in seeds]
    )
    figure.draw(figure.axes[0], name, steps, scores)
    figure.draw(figure.axes[1], name, steps * seconds, scores)
    needed = steps_to(level, steps, scores.mean(axis=0))
    proxy_nca_needs = steps_to(
      scores[:, -1].mean(), steps, curves['Proxy-NCA'][1].mean(axis=0)
    )
    rows.append(
      {
        'loss': name,
        'rates': f'x{factors[name]:g}',
        'Recall@1, %': runs.spread(scores[:, -1]),
        'steps to the best baseline': f'{needed:.0f}'
        if np.isfinite(needed)
        else 'not reached',
        'fewer': f'{config.num_steps / needed:.2f}x'
        if np.isfinite(needed)
        else '',
        'Proxy-NCA gets there after': f'{proxy_nca_needs:.0f}'
        if np.isfinite(proxy_nca_needs)
        else '',
        'ms a step': f'{1000 * seconds:.0f}',
      }
    )
  figure.axes[0].set_xlabel('steps')
  figure.axes[1].set_xlabel('seconds of training')
  runs.publish(
    rows,
    figure,
    os.path.join(workdir, 'convergence'),
    text=(
      'Lines are means over the seeds, bands their range. The best baseline is '
      f'the best mean Recall@1 of the others, {100 * level:.2f}%, '
      f'after all steps. Rates are those of the config times the best of '
      f'{_FACTORS} on half of the train classes.'
    ),
    config=config,
    result=next(iter(results.values())),
  )


if __name__ == '__main__':
  runs.start(main)
