"""Compares heads that need no training, on halves of the train classes.

python experiments/heads.py --config=configs/image_folder.py:frozen \
  --config.dataset.root=DIR --workdir=/tmp/heads

A head is made from the features of half of the classes and scored on the other
half, for --num_seeds random halves, and for fewer classes and fewer images of
each. Test classes are not used: the scores may choose a head. 'lda, random' has
random directions in place of those of the pretraining's classifier. Prints
Recall@1 and MAP@R in percent, the mean over the halves, and writes
WORKDIR/heads.csv.
"""

import csv
import os
import pathlib
import sys
from collections.abc import Callable

import ml_collections
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from experiments import runs
from proxy_nca_jax import evaluate, models, train, warm_start, weights
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.runtime import files

_SHRINKAGES = (0.9, 0.8, 0.7, 0.6, 0.3)
_CLASSES, _IMAGES = (10, 20, 40), (5, 10, 16)


def _extract(config, data) -> np.ndarray:
  """Returns the features of the train images."""
  mesh, model = mesh_lib.make_mesh(), models.create_model(config)
  digest = weights.digest(config, None)
  state = state_lib.create(
    config,
    model,
    optimizer_lib.make_optimizer(config),
    class_sizes=data.train.class_sizes,
    mesh=mesh,
  )
  _, extract = train.load_backbone(config, model, state, data, digest, mesh)
  return extract(data.train)


def _heads(dim: int, classifier: np.ndarray | None) -> dict[str, Callable]:
  """Returns {title: function from features and labels to a projection}.

  Args:
    dim: dimension of the embeddings.
    classifier: as of `warm_start.make_head`.
  """

  def make(**kwargs):
    def fit(rows, labels):
      head = warm_start.make_head(rows, labels, dim, seed=0, **kwargs)
      return lambda new: (
        new @ head['embedding']['kernel'] + head['embedding']['bias']
      )

    return fit

  return {
    'features': lambda rows, labels: lambda new: new,
    'centered': lambda rows, labels: lambda new: new - rows.mean(axis=0),
    'pca': make(init='pca', classifier=classifier),
    **{
      f'lda {a}': make(init='lda', classifier=classifier, shrinkage=a)
      for a in _SHRINKAGES
    },
    'lda, random': make(init='lda'),
  }


def _choose(labels, classes, num_images: int) -> np.ndarray:
  """Returns the first images of each class."""
  return np.concatenate(
    [np.flatnonzero(labels == label)[:num_images] for label in classes]
  )


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  data = train.load_data(config)
  rows, labels = _extract(config, data), data.train.labels
  heads = _heads(config.model.embedding_dim, weights.classifier(config))
  os.makedirs(workdir, exist_ok=True)
  table = []
  for num_classes in (n for n in _CLASSES if n <= data.train.num_classes):
    for num_images in _IMAGES:
      scores = {}
      for seed in range(runs.NUM_SEEDS.value):
        rng = np.random.default_rng(seed)
        classes = rng.permutation(data.train.num_classes)[:num_classes]
        halves = np.split(classes, [num_classes // 2])
        known, new = (_choose(labels, half, num_images) for half in halves)
        _, known_labels = np.unique(labels[known], return_inverse=True)
        for title, fit in heads.items():
          result = evaluate.score(
            fit(rows[known], known_labels)(rows[new]),
            labels[new],
            kmeans_iterations=0,
          )
          scores.setdefault(title, []).append(
            (result['recall@1'], result['map@r'])
          )
      for title, values in scores.items():
        recall, precision = 100 * np.mean(values, axis=0)
        table.append((num_classes, num_images, title, recall, precision))
        print(
          f'{num_classes:3} classes of {num_images:2}  {title:12}'
          f'{recall:7.1f}{precision:7.1f}',
          flush=True,
        )
  with files.write_atomically(os.path.join(workdir, 'heads.csv')) as file:
    writer = csv.writer(file)
    writer.writerow(['classes', 'images', 'head', 'recall@1', 'map@r'])
    writer.writerows(table)


if __name__ == '__main__':
  runs.start(main)
