"""Head and proxies from the features of the train images, before step 1.

Fine-tuning with a random head destroys many of the pretrained features. Here
the head is computed from the features, and each proxy is the mean embedding of
its class. Both can then be trained on the stored features for some steps, with
a frozen backbone: linear probing before fine-tuning (Kumar et al., ICLR 2022,
https://arxiv.org/abs/2202.10054).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from proxy_nca_jax import blocked, datasets, input_pipeline, losses
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.runtime import signals

# Fraction of the covariance within classes that is replaced by its mean
# variance; experiments/heads.py compares others.
SHRINKAGE = 0.7

# k-means within classes: iterations, and the offsets of initial centers as a
# fraction of their norm.
_NUM_ITERATIONS, _SMALL_OFFSET = 10, 0.01

# Images by which the batch statistics of random weights are measured.
_NUM_MEASURED = 2048

# Rows of features in memory at a time: 100 MB in float64 at a width of 768.
_BLOCK = 2**14

_Group = dict[str, jax.Array]


def is_configured(config: ml_collections.ConfigDict) -> bool:
  """Whether a run begins with the features of its train images."""
  return (
    config.model.head_init != 'random'
    or config.proxies.init == 'class_means'
    or config.head_steps > 0
  )


def measure_statistics(
  config: ml_collections.ConfigDict,
  model,
  state: state_lib.TrainState,
  split: datasets.Split,
  mesh: jax.sharding.Mesh,
) -> state_lib.TrainState:
  """Returns a state of random weights with the batch statistics of images.

  A network starts with running means of 0 and variances of 1, which are not
  those of its layers. Evaluated with them, it gives other features than in
  training, in which every batch is normalized by its own statistics.

  Args:
    config: the run's config: `evaluation.batch_size`, `seed`.
    model: the network.
    state: the initial state.
    split: the images; about `_NUM_MEASURED` of them are drawn.
    mesh: the devices.
  """
  size = blocked.round_up(config.evaluation.batch_size, jax.device_count())
  momentum = config.model.batch_norm_momentum
  num_batches = max(min(len(split), _NUM_MEASURED) // size, 1)
  # No batch is padded, since padding would count.
  rows = np.random.default_rng(config.seed).permutation(len(split))
  split = split.subset(np.resize(rows, num_batches * size))

  @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(mesh))
  def measure(params, running, images):
    params = {name: params[name] for name in ('backbone', 'head')}
    _, new = model.apply(
      {'params': params, **running}, images, train=True, mutable=list(running)
    )
    # A step moves the running statistics toward those of its batch.
    return jax.tree.map(
      lambda new, old: old + (new - old) / (1 - momentum), new, running
    )

  measured = [
    measure(
      state.params,
      state.model_state,
      mesh_lib.shard_batch(batch, mesh)['image'],
    )
    for batch in input_pipeline.evaluation_batches(
      split,
      image_size=config.dataset.image_size,
      batch_size=size,
      process=(jax.process_index(), jax.process_count()),
    )
  ]
  mean = jax.tree.map(lambda *arrays: sum(arrays) / len(arrays), *measured)
  return dataclasses.replace(state, model_state=mean)


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
    features: float32 [num_images, width], of the train images. It is sliced,
      and may be read only then.
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
  elif config.proxies.init == 'class_means':
    # Features of a random network are all alike: so would be the means.
    head = center_head(params['head'], features)
    params['head'] = _put(head, params['head'])
  if config.proxies.init == 'class_means' and loss.proxies:
    if loss.proxies == losses.MULTI_CENTER:
      proxies = class_centers(
        functools.partial(_project_blocks, model, params['head'], features),
        labels,
        config.loss.num_centers,
        seed=config.seed,
      )
    else:
      proxies = class_means(model, params['head'], features, labels)
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
  (1989), as a projection. 'identity' keeps the features, not centered.

  The features are read twice, in blocks. Memory holds the means of the classes
  and a few matrices [width, width] in float64.

  Few images span fewer than `dim` dimensions. The others keep what these images
  do not show and new classes may need: first the principal components of a
  classifier's weights, in which the classes of pretraining differ, then random
  directions.

  Args:
    features: float32 [num_images, width]; it is sliced, and may be read only
      then.
    labels: int32 [num_images], in [0, num_classes).
    dim: dimension of the embeddings.
    init: 'pca', 'lda' or 'identity'.
    classifier: float [num_pretraining_classes, width], the weights of the
      classifier that the backbone was trained with; None if there is none.
    seed: of the random directions.
    shrinkage: for 'lda', the fraction of the covariance within classes that is
      replaced by its mean variance, in (0, 1].

  Returns:
    {'embedding': {'kernel': float32 [width, dim], 'bias': float32 [dim]}}.

  Raises:
    ValueError: if an identity has other dimensions than the features.
  """
  width = features.shape[1]
  if init == 'identity':
    check_identity(width, dim)
    return _linear(np.eye(width), np.zeros(width))
  sizes = np.bincount(labels)[:, None]
  means = _class_means(_blocks(features), labels, width)
  mean = np.sum(sizes * means, axis=0) / len(labels)
  # Rows whose products are those of all features, with fewer of them.
  between = np.sqrt(sizes) * (means - mean)
  values, vectors = np.linalg.eigh(
    _within_class_scatter(features, labels, means)
  )
  # Smaller ones are rounding errors.
  values = np.where(values > 1e-12 * values[-1], values, 0)
  within = np.sqrt(values)[:, None] * vectors.T
  others = [np.random.default_rng(seed).normal(size=(width, width))]
  if classifier is not None:
    others.insert(0, classifier - classifier.mean(axis=0))
  if init == 'pca':
    centered = np.concatenate([between, within])
    kernel = _orthonormal_columns([centered, *others], dim)
  else:
    # Directions between the classes first, then those within.
    freedom = max(len(labels) - len(sizes), 1)
    variances = _shrink(values / freedom, shrinkage)
    whitening = vectors / np.sqrt(variances) @ vectors.T
    rows = (between, np.concatenate([between, within]), *others)
    kernel = whitening @ _orthonormal_columns(
      [x @ whitening for x in rows], dim
    )
  # Unit norm on average, as that of principal components.
  kernel /= np.mean(np.linalg.norm(kernel, axis=0))
  # Outputs beyond the width of the features are 0.
  kernel = np.pad(kernel, ((0, 0), (0, dim - kernel.shape[1])))
  return _linear(kernel, -mean @ kernel)


def center_head(head: _Group, features: np.ndarray) -> _Group:
  """Returns a head with the bias that gives its outputs a mean of 0.

  Args:
    head: the parameters of the head.
    features: float32 [num_images, width]; it is sliced, and may be read only
      then.
  """
  head = jax.tree.map(np.asarray, head)
  total = 0
  for block in _blocks(features):
    if hidden := head.get('hidden'):
      block = np.maximum(block @ hidden['kernel'] + hidden['bias'], 0)
    total += np.sum(block, axis=0, dtype=np.float64)
  kernel = head['embedding']['kernel']
  bias = -(total / len(features)) @ kernel
  return head | {
    'embedding': {'kernel': kernel, 'bias': bias.astype(np.float32)}
  }


def check_identity(width: int, dim: int) -> None:
  """Raises ValueError if embeddings cannot be the features themselves.

  Args:
    width: dimension of the features.
    dim: dimension of the embeddings.
  """
  if width != dim:
    raise ValueError(
      f'config.model.head_init=identity keeps the {width} dimensions of the '
      f'features, and config.model.embedding_dim is {dim}: set it to {width}.'
    )


def _linear(kernel: np.ndarray, bias: np.ndarray):
  return {
    'embedding': {
      'kernel': kernel.astype(np.float32),
      'bias': bias.astype(np.float32),
    }
  }


def _blocks(features) -> Iterator[np.ndarray]:
  """Yields the features in blocks of rows, in order."""
  for begin in range(0, len(features), _BLOCK):
    yield features[begin : begin + _BLOCK]


def _within_class_scatter(
  features, labels: np.ndarray, means: np.ndarray
) -> np.ndarray:
  """Returns the products of the features' differences from their class's mean.

  Returns:
    float64 [width, width].
  """
  scatter, begin = 0, 0
  for block in _blocks(features):
    residuals = block - means[labels[begin : begin + len(block)]]
    scatter += residuals.T @ residuals
    begin += len(block)
  return scatter


def _shrink(variances: np.ndarray, shrinkage: float) -> np.ndarray:
  """Replaces a fraction of each variance by the mean of all."""
  mean = np.mean(variances)
  if mean < 1e-30:  # No class has two different images.
    return np.ones_like(variances)
  return (1 - shrinkage) * variances + shrinkage * mean


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


def _class_means(
  blocks: Iterable[np.ndarray], labels: np.ndarray, width: int
) -> np.ndarray:
  """Returns the mean row of each class, float64 [num_classes, width]."""
  sums, begin = np.zeros((labels.max() + 1, width)), 0
  for block in blocks:
    np.add.at(sums, labels[begin : begin + len(block)], block)
    begin += len(block)
  return sums / np.bincount(labels)[:, None]


def class_means(
  model, head: _Group, features: np.ndarray, labels: np.ndarray
) -> np.ndarray:
  """Returns the mean embedding of each class, scaled to unit norm.

  Args:
    model: its method `project` maps features to embeddings.
    head: the parameters of the head.
    features: float32 [num_images, width].
    labels: int32 [num_images], each of [0, num_classes) at least once.

  Returns:
    float32 [num_classes, dim].
  """
  blocks = _project_blocks(model, head, features)
  dim = head['embedding']['kernel'].shape[1]
  return _unit_norm(_class_means(blocks, labels, dim))


def class_centers(
  make_blocks: Callable[[], Iterable[np.ndarray]],
  labels: np.ndarray,
  num_centers: int,
  *,
  seed: int,
) -> np.ndarray:
  """Returns several centers of each class by k-means of its embeddings.

  The centers start at embeddings of random images. A class with fewer images
  than centers repeats them. Small random offsets keep equal centers apart,
  which otherwise would stay equal in training.

  Args:
    make_blocks: returns the embeddings, float32 [num_images, dim], in blocks of
      rows; called for each pass over them.
    labels: int32 [num_images], each of [0, num_classes) at least once.
    num_centers: of each class.
    seed: of the images and the offsets.

  Returns:
    float32 [num_classes, num_centers, dim], of unit norm.
  """
  rng = np.random.default_rng(seed)
  shuffled = rng.permutation(len(labels))
  shuffled = shuffled[np.argsort(labels[shuffled], kind='stable')]
  sizes = np.bincount(labels)[:, None]
  picks = np.arange(num_centers)[None, :] % sizes
  rows = shuffled[np.cumsum(sizes)[:, None] - sizes + picks]
  centers = None
  for begin, block in _numbered(make_blocks()):
    if centers is None:
      centers = np.zeros((*rows.shape, block.shape[1]))
    is_inside = (rows >= begin) & (rows < begin + len(block))
    centers[is_inside] = block[rows[is_inside] - begin]
  lengths = np.linalg.norm(centers, axis=2, keepdims=True)
  offsets = rng.normal(size=centers.shape) / np.sqrt(centers.shape[2])
  centers += _SMALL_OFFSET * lengths * offsets
  for _ in range(_NUM_ITERATIONS):
    sums, counts = np.zeros_like(centers), np.zeros(rows.shape)
    for begin, block in _numbered(make_blocks()):
      classes = labels[begin : begin + len(block)]
      distances = [
        np.sum((block - centers[classes, k]) ** 2, axis=1)
        for k in range(num_centers)
      ]
      index = classes, np.argmin(distances, axis=0)
      np.add.at(sums, index, block)
      np.add.at(counts, index, 1)
    counts = counts[:, :, None]
    centers = np.where(counts > 0, sums / np.maximum(counts, 1), centers)
  return _unit_norm(centers)


def _numbered(blocks: Iterable[np.ndarray]) -> Iterator[tuple]:
  """Yields (index of the first row, block)."""
  begin = 0
  for block in blocks:
    yield begin, block
    begin += len(block)


def _unit_norm(x: np.ndarray) -> np.ndarray:
  norms = np.linalg.norm(x, axis=-1, keepdims=True)
  return (x / np.maximum(norms, 1e-12)).astype(np.float32)


def project(model, head: _Group, features: np.ndarray) -> np.ndarray:
  """Returns the embeddings of features, float32 [num_images, dim]."""
  return np.concatenate(list(_project_blocks(model, head, features)))


def _project_blocks(model, head, features) -> Iterator[np.ndarray]:
  project_block = jax.jit(functools.partial(_project, model))
  for block in _blocks(features):
    signals.check()
    yield np.asarray(project_block(head, block))


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
