"""A state's scores: a split through its network, then ranked and clustered."""

import functools
from collections.abc import Callable, Iterable

import jax
import ml_collections
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from proxy_nca_jax import datasets, evaluate, input_pipeline, models
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.runtime import signals


def embed(
  embed_fn: Callable[[dict[str, np.ndarray]], jax.Array],
  batches: Iterable[dict[str, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
  """Embeds all batches; rows whose mask is False are left out.

  Args:
    embed_fn: maps a process's rows of a batch to float [batch, dim] of all.
    batches: with 'label' int32, 'mask' bool and 'id' int32, all [batch / number
      of processes].

  Returns:
    float32 [num_records, dim] and int32 [num_records], the embeddings and the
    labels in the order of the ids.
  """
  rows, labels, ids = [], [], []
  # Quiet where nobody looks.
  for batch in tqdm.tqdm(
    batches, desc='embedding', unit='batch', disable=None, leave=False, delay=1
  ):
    signals.check()
    embeddings = np.asarray(embed_fn(batch), np.float32)
    mask, label, number = multihost_utils.process_allgather(
      (batch['mask'], batch['label'], batch['id']), tiled=True
    )
    rows.append(embeddings[mask])
    labels.append(label[mask])
    ids.append(number[mask])
  order = np.argsort(np.concatenate(ids))
  return np.concatenate(rows)[order], np.concatenate(labels)[order]


def make_normalize(
  config: ml_collections.ConfigDict,
) -> Callable[[jax.Array], jax.Array]:
  """Returns the map from uint8 images to what the backbone's weights expect."""
  backbone = models.BACKBONES[config.model.name]
  return functools.partial(
    input_pipeline.normalize,
    mean=backbone.mean,
    std=backbone.std,
    is_bgr=backbone.is_bgr,
  )


def make_embed_fn(
  model,
  normalize: Callable[[jax.Array], jax.Array],
  mesh: jax.sharding.Mesh,
) -> Callable[..., jax.Array]:
  """Returns (state, batch) -> embeddings float32 [batch, dim]."""

  @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(mesh))
  def forward(params, model_state, images):
    params = {name: params[name] for name in ('backbone', 'head')}
    variables = {'params': params, **model_state}
    return model.apply(variables, normalize(images), train=False)

  def embed_fn(state, batch):
    images = mesh_lib.shard_batch({'image': batch['image']}, mesh)['image']
    return forward(state.params, state.model_state, images)

  return embed_fn


def embed_split(
  embed_fn: Callable[..., jax.Array],
  config: ml_collections.ConfigDict,
  state: state_lib.TrainState,
  split: datasets.Split,
) -> np.ndarray:
  """Returns a state's embeddings of a split, float32 [len(split), dim]."""
  batches = input_pipeline.evaluation_batches(
    split,
    image_size=config.dataset.image_size,
    batch_size=config.evaluation.batch_size,
    process=(jax.process_index(), jax.process_count()),
  )
  embeddings, _ = embed(functools.partial(embed_fn, state), batches)
  return embeddings


def score_split(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  embeddings: np.ndarray,
  split: datasets.Split,
  *,
  num_resamples: int = 0,
) -> dict[str, float]:
  """Scores embeddings of a split as the config says: see `score`.

  Args:
    config: of the run.
    mesh: of the devices.
    embeddings: float32 [len(split), dim].
    split: of the data set.
    num_resamples: of the classes, for confidence intervals.
  """
  names = (
    'recall_at',
    'nearest_only',
    'kmeans_iterations',
    'kmeans_start',
    'kmeans_num_starts',
  )
  return evaluate.score(
    embeddings,
    split.labels,
    is_query=split.is_query,
    cameras=split.cameras,
    seed=config.seed,
    mesh=mesh,
    num_resamples=num_resamples,
    **{name: config.evaluation[name] for name in names},
  )
