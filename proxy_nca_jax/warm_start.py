"""Head and proxies from the features of the train images, before step 1.

Fine-tuning with a random head destroys many of the pretrained features. Here
the head is computed from the features, and each proxy is the mean embedding of
its class. Both can then be trained on the stored features for some steps, with
a frozen backbone: linear probing before fine-tuning (Kumar et al., ICLR 2022,
https://arxiv.org/abs/2202.10054).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib

# Fraction of the covariance within classes that is replaced by its mean
# variance; experiments/heads.py compares others.
SHRINKAGE = 0.7

_Group = dict[str, jax.Array]


def is_configured(config: ml_collections.ConfigDict) -> bool:
  """Whether a run begins with the features of its train images."""
  return (
    config.model.head_init != 'random'
    or config.proxies.init == 'class_means'
    or config.head_steps > 0
  )


def apply(
  config: ml_collections.ConfigDict,
  model,
  loss,
  state: state_lib.TrainState,
  features: np.ndarray,
  labels: np.ndarray,
  mesh: jax.sharding.Mesh,
  *,
  classifier: np.ndarray | None = None,
) -> state_lib.TrainState:
  """Returns the state with head and proxies made from features.

  Args:
    config: the run's config: `model.head_init`, `proxies.init`, `head_steps`.
    model: its method `project` maps features to embeddings.
    loss: the run's loss.
    state: the state with the backbone's weights.
    features: float32 [num_images, width], of the train images.
    labels: int32 [num_images].
    mesh: the devices.
    classifier: of the pretrained weights, as of `make_head`.
  """
  params = dict(state.params)
  if config.model.head_init != 'random':
    head = make_head(
      features,
      labels,
      config.model.embedding_dim,
      init=config.model.head_init,
      classifier=classifier,
      seed=config.seed,
    )
    params['head'] = _put(params['head'] | head, params['head'])
  if config.proxies.init == 'class_means':
    proxies = class_means(project(model, params['head'], features), labels)
    if config.proxies.sharded:
      proxies = jax.jit(functools.partial(mesh_lib.pad_rows, mesh=mesh))(
        proxies
      )
    params['proxies'] = jax.device_put(
      config.proxies.init_norm * proxies, params['proxies'].sharding
    )
  if config.head_steps:
    trained = _train(config, model, loss, state, params, features, labels)
    params |= _put(trained, {name: params[name] for name in trained})
  return dataclasses.replace(state, params=params)


def make_head(
  features: np.ndarray,
  labels: np.ndarray,
  dim: int,
  *,
  init: str,
  classifier: np.ndarray | None = None,
  seed: int,
  shrinkage: float = SHRINKAGE,
) -> dict[str, dict[str, np.ndarray]]:
  """Returns a head of centered features that needs no training.

  'pca' projects to the principal components. 'lda' first whitens the features
  by their covariance within classes, which shrinks the directions in which
  images of one class differ: the regularized discriminant analysis of Friedman
  (1989), as a projection.

  Few images span fewer than `dim` dimensions. The others keep what these images
  do not show and new classes may need: first the principal components of a
  classifier's weights, in which the classes of pretraining differ, then random
  directions.

  Args:
    features: float32 [num_images, width].
    labels: int32 [num_images], in [0, num_classes).
    dim: dimension of the embeddings.
    init: 'pca' or 'lda'.
    classifier: float [num_pretraining_classes, width], the weights of the
      classifier that the backbone was trained with; None if there is none.
    seed: of the random directions.
    shrinkage: for 'lda', the fraction of the covariance within classes that is
      replaced by its mean variance, in (0, 1].

  Returns:
    {'embedding': {'kernel': float32 [width, dim], 'bias': float32 [dim]}}.
  """
  features = features.astype(np.float64)
  mean = features.mean(axis=0)
  centered = features - mean
  width = len(mean)
  others = [np.random.default_rng(seed).normal(size=(width, width))]
  if classifier is not None:
    others.insert(0, classifier - classifier.mean(axis=0))
  if init == 'pca':
    kernel = _orthonormal_columns([centered, *others], dim)
  else:
    # Directions between the classes first, then those within.
    whitening = _within_class_whitening(features, labels, shrinkage)
    means = (_class_means(features, labels) - mean)[labels]
    rows = (means, centered, *others)
    kernel = whitening @ _orthonormal_columns(
      [x @ whitening for x in rows], dim
    )
  # Unit norm on average, as that of principal components.
  kernel /= np.mean(np.linalg.norm(kernel, axis=0))
  # Outputs beyond the width of the features are 0.
  kernel = np.pad(kernel, ((0, 0), (0, dim - kernel.shape[1])))
  return {
    'embedding': {
      'kernel': kernel.astype(np.float32),
      'bias': (-mean @ kernel).astype(np.float32),
    }
  }


def _within_class_whitening(
  features: np.ndarray, labels: np.ndarray, shrinkage: float
) -> np.ndarray:
  """Returns the inverse root of the shrunk covariance within classes."""
  residuals = features - _class_means(features, labels)[labels]
  freedom = max(len(labels) - (labels.max() + 1), 1)
  covariance = residuals.T @ residuals / freedom
  width = len(covariance)
  variance = np.trace(covariance) / width
  if variance < 1e-30:  # No class has two different images.
    return np.eye(width)
  covariance *= 1 - shrinkage
  covariance[np.diag_indices(width)] += shrinkage * variance
  values, vectors = np.linalg.eigh(covariance)
  return vectors / np.sqrt(values) @ vectors.T


def _orthonormal_columns(
  matrices: Sequence[np.ndarray], dim: int
) -> np.ndarray:
  """Returns the principal components of matrices, those of the first one first.

  Args:
    matrices: float64 [num_rows, width], with rows around 0.
    dim: number of components.

  Returns:
    float64 [width, min(dim, width)], orthonormal.
  """
  width = matrices[0].shape[1]
  columns = np.zeros((width, 0))
  for matrix in matrices:
    if columns.shape[1] == min(dim, width):
      break
    rest = matrix - (matrix @ columns) @ columns.T
    if len(rest) > width:
      rest = np.linalg.qr(rest, mode='r')  # Has the same components.
    _, lengths, components = np.linalg.svd(rest, full_matrices=False)
    # Components beyond the rank are rounding errors.
    scale = max(np.linalg.norm(matrix), 1e-30)
    rank = int(np.sum(lengths > 1e-6 * scale))
    columns = np.concatenate([columns, components[:rank].T], axis=1)[:, :dim]
  return columns


def _class_means(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
  sums = np.zeros((labels.max() + 1, rows.shape[1]))
  np.add.at(sums, labels, rows)
  return sums / np.bincount(labels)[:, None]


def class_means(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns the mean embedding of each class, scaled to unit norm.

  Args:
    embeddings: float32 [num_images, dim].
    labels: int32 [num_images], each of [0, num_classes) at least once.

  Returns:
    float32 [num_classes, dim].
  """
  means = _class_means(embeddings, labels)
  norms = np.linalg.norm(means, axis=1, keepdims=True)
  return (means / np.maximum(norms, 1e-12)).astype(np.float32)


def project(model, head: _Group, features: np.ndarray) -> np.ndarray:
  """Returns the embeddings of features, float32 [num_images, dim]."""
  return np.asarray(jax.jit(functools.partial(_project, model))(head, features))


def _project(model, head, features):
  return model.apply({'params': {'head': head}}, features, method='project')


def _put(tree, like):
  """Places arrays as those of another tree are placed."""
  return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, like)


def _train(config, model, loss, state, params, features, labels) -> dict:
  """Trains head and proxies on features for `config.head_steps` steps.

  Returns:
    {'head', 'proxies'}.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.num_steps = config.head_steps
    for group in optimizer_lib.GROUPS:
      config.optimizer[group].freeze_steps = 0
  optimizer = optimizer_lib.make_optimizer(config)
  num_rows = min(config.batch_size, len(labels))

  def mean_loss(trained, features, labels):
    proxies = {'proxies': trained['proxies']} if loss.proxies else {}
    values = loss.fn(
      embeddings=_project(model, trained['head'], features),
      labels=labels,
      **proxies,
      **state.loss_state,
    )
    return jnp.mean(values)

  def step(features, labels, carry, key):
    params, opt_state = carry
    rows = jax.random.choice(key, len(labels), (num_rows,), replace=False)
    gradients = jax.grad(mean_loss)(params, features[rows], labels[rows])
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  @jax.jit
  def train(trained, features, labels):
    params = {'backbone': {}, **trained}
    keys = jax.random.split(
      jax.random.fold_in(jax.random.key(config.seed), 1), config.head_steps
    )
    (params, _), _ = jax.lax.scan(
      functools.partial(step, features, labels),
      (params, optimizer.init(params)),
      keys,
    )
    return {name: params[name] for name in trained}

  trained = {name: params[name] for name in ('head', 'proxies')}
  return train(trained, features, labels)
