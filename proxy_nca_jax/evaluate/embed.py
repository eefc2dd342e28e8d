"""Embeds a split with a trained state, and scores its embeddings."""

import functools
from collections.abc import Callable, Iterable

import jax
import ml_collections
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from proxy_nca_jax import blocked, datasets, fine_tuning, input_pipeline
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.evaluate import scores as scores_lib
from proxy_nca_jax.runtime import signals

Batch = dict[str, np.ndarray]


def make_embed_fn(
  model, mesh: jax.sharding.Mesh, *, method: str | None = None
) -> Callable[[state_lib.TrainState, Batch], dict[str, jax.Array]]:
  """Returns (state, batch) -> the batch with embeddings in place of images.

  The batch holds this process's rows; the result holds the rows of all
  processes, sharded by row, 'embedding' float32 [batch, dim] among them. The
  order of a mesh's devices need not be that of the processes, so every array of
  the batch passes through the mesh together.

  Args:
    model: the network.
    mesh: the devices that share the work.
    method: of the model, such as 'features'; by default its embeddings.
  """

  forward = make_forward(model, mesh, method=method)

  def embed_fn(state, batch):
    batch = mesh_lib.shard_batch(batch, mesh)
    return forward(**state.evaluated, batch=batch)

  return embed_fn


def make_forward(
  model, mesh: jax.sharding.Mesh, *, method: str | None = None
) -> Callable[..., dict[str, jax.Array]]:
  """Returns the jitted part of `make_embed_fn`.

  It maps (params, model_state, batch), a global batch, to its result.
  """
  # Any model has `apply`; only one with other methods takes their name.
  kwargs = {'method': method} if method else {}

  @functools.partial(jax.jit, out_shardings=mesh_lib.by_row(mesh))
  def forward(params, model_state, batch):
    batch, params = dict(batch), fine_tuning.merge(params)
    params = {name: params[name] for name in ('backbone', 'head')}
    embeddings = model.apply(
      {'params': params, **model_state},
      batch.pop('image'),
      train=False,
      **kwargs,
    )
    return batch | {'embedding': embeddings}

  return forward


def embed_batches(
  embed_fn: Callable[[Batch], dict[str, jax.Array]], batches: Iterable[Batch]
) -> np.ndarray:
  """Embeds all batches; rows whose mask is False are dropped.

  The host fetches a batch while the devices compute the next one. Processes
  exchange their rows once, at the end.

  Args:
    embed_fn: maps this process's rows of a batch to the rows of all processes,
      {'embedding': float [batch, dim], 'mask': bool [batch], 'id': int32
      [batch]}.
    batches: this process's rows of each batch.

  Returns:
    float32 [num_records, dim], ordered by id.
  """
  fetched, computing = [], None
  for batch in tqdm.tqdm(
    batches, desc='embedding', unit='batch', disable=None, leave=False, delay=1
  ):
    signals.check_on_all()
    computing, done = embed_fn(batch), computing
    if done is not None:
      fetched.append(_fetch(done))
  fetched.append(_fetch(computing))
  rows = jax.tree.map(lambda *parts: np.concatenate(parts), *fetched)
  if jax.process_count() > 1:
    rows = multihost_utils.process_allgather(rows, tiled=True)
  rows = {name: x[rows['mask']] for name, x in rows.items()}
  return rows['embedding'][np.argsort(rows['id'])].astype(np.float32)


def _fetch(outputs: dict[str, jax.Array]) -> Batch:
  """Returns this process's rows."""
  return {
    name: mesh_lib.local_rows(outputs[name])
    for name in ('embedding', 'mask', 'id')
  }


def embed_split(
  embed_fn: Callable[..., dict[str, jax.Array]],
  config: ml_collections.ConfigDict,
  state: state_lib.TrainState,
  split: datasets.Split,
) -> np.ndarray:
  """Returns a state's embeddings of a split, float32 [len(split), dim]."""
  batches = input_pipeline.evaluation_batches(
    split,
    image_size=config.dataset.image_size,
    # Padding costs nothing but time: only the last batch is short of records.
    batch_size=blocked.round_up(
      config.evaluation.batch_size, jax.device_count()
    ),
    process=(jax.process_index(), jax.process_count()),
  )
  return embed_batches(functools.partial(embed_fn, state), batches)


def score_split(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  embeddings: np.ndarray,
  split: datasets.Split,
  *,
  num_resamples: int = 0,
) -> dict[str, float]:
  """Scores embeddings of a split as configured: see `scores.score`.

  Args:
    config: the run's config.
    mesh: the devices that share the work.
    embeddings: float32 [len(split), dim].
    split: the records.
    num_resamples: bootstrap resamples of the classes, for confidence intervals.
  """
  return scores_lib.score(
    embeddings,
    split.labels,
    is_query=split.is_query,
    cameras=split.cameras,
    seed=config.seed,
    mesh=mesh,
    num_resamples=num_resamples,
    **{name: config.evaluation[name] for name in scores_lib.SETTINGS},
  )
