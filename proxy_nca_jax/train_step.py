"""The training step: from a batch of images to the next state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from proxy_nca_jax import fine_tuning, losses, models, proxies
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib

if TYPE_CHECKING:
  # benchmarks/train_step.py runs without ml_collections.
  import ml_collections


_Step = Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]


def make_loss(config: ml_collections.ConfigDict) -> losses.Loss:
  """Returns the loss that `config.loss` names, with its arguments bound."""
  loss = losses.LOSSES[config.loss.name]
  fn = functools.partial(loss.fn, **config.loss[config.loss.name])
  if config.loss.pairs != 'all':
    fn = _with_miner(fn, losses.MINERS[config.loss.pairs])

  def with_precision(**arrays):
    with jax.default_matmul_precision(config.loss.precision):
      return fn(**arrays)

  return loss._replace(fn=with_precision)


def _with_miner(fn, miner):
  """Returns a loss that compares the pairs that a miner selects."""

  def mined(*, embeddings, labels, **others):
    pairs = miner(embeddings, labels, **others)
    return fn(embeddings, labels, pairs=pairs, **others)

  return mined


def correct_for_frequency(
  loss: losses.Loss, config: ml_collections.ConfigDict, class_sizes: np.ndarray
) -> losses.Loss:
  """Weights and adjusts a loss for classes of different sizes, if configured.

  Args:
    loss: the loss, from `make_loss`.
    config: the run's config.
    class_sizes: int [num_classes], training examples of each class.
  """
  fn = loss.fn
  if power := config.loss.logit_adjustment:
    priors = losses.log_priors(class_sizes, power=power)
    fn = functools.partial(fn, log_priors=priors)
  if not (power := config.loss.class_weighting):
    return loss._replace(fn=fn)
  weights = losses.class_weights(class_sizes, power=power)

  def weighted(*, labels, **arrays):
    return weights[labels] * fn(labels=labels, **arrays)

  return loss._replace(fn=weighted)


def make_reshard(
  config: ml_collections.ConfigDict, num_classes: int, mesh: jax.sharding.Mesh
) -> Callable[..., tuple]:
  """Returns (embeddings, proxies, *rows) -> the same, placed for the loss.

  `rows` are further arrays of the batch, such as labels, or None. To be called
  inside `jit`. By default each device compares its rows of the
  batch with its copy of the proxies. With `config.proxies.sharded` each device
  holds some of the proxies, and the whole batch is sent to each of them: only
  embeddings are communicated, and no device holds a [batch, num_classes]
  matrix.
  """
  if not config.proxies.sharded:
    return lambda *arrays: arrays

  def reshard(embeddings, points, *rows):
    embeddings, *rows = mesh_lib.replicate((embeddings, *rows), mesh)
    return embeddings, mesh_lib.unpad_rows(points, num_classes, mesh), *rows

  return reshard


def make_update_memory(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Callable[..., losses.Memory]:
  """Returns (memory, step, embeddings, labels, mask) -> the memory after it.

  To be called inside `jit`. Every device holds the whole memory, and each batch
  that enters is the global one.
  """

  def update(memory, step, embeddings, labels, mask):
    where = jnp.full(labels.shape, step >= config.loss.memory_start)
    if mask is not None:
      where &= mask
    memory = losses.update_memory(memory, embeddings, labels, where=where)
    return mesh_lib.replicate(memory, mesh)

  return update


def make_train_step(
  model,
  optimizer: optax.GradientTransformation,
  loss: losses.Loss,
  *,
  reshard: Callable[..., tuple] = lambda *arrays: arrays,
  learning_rates: Callable[[jax.Array], dict] = lambda num_updates: {},
  is_logged: Callable[[jax.Array], jax.Array] | None = None,
  skip_nonfinite: bool = False,
  stop_frozen: Callable[[dict], dict] = lambda params: params,
  ema_decay: float = 0.0,
  update_memory: Callable[..., losses.Memory] | None = None,
) -> _Step:
  """Returns the jitted step: (state, batch, lr_scale) -> (state, metrics).

  `lr_scale` multiplies all learning rates; it is 1 by default. With
  `freeze_batch_norm=True` the running statistics are used and not updated. The
  mean of the loss, the batch statistics and the metrics are those of the global
  batch, on any number of devices; rows whose 'mask' is False, if the batch has
  one, count nowhere. The state is donated.

  Args:
    model: `apply` maps uint8 images to embeddings.
    optimizer: the optimizer of all parameter groups.
    loss: the loss, from `make_loss`.
    reshard: the placement of the loss's arrays, from `make_reshard`.
    learning_rates: the learning rate of each group by the number of updates,
      for the metrics.
    is_logged: whether the metrics of the proxies are computed in a step, which
      multiplies the batch by all proxies twice more than the loss; otherwise
      they are NaN. By default they are in every step.
    skip_nonfinite: whether a step whose loss or gradient norm is not finite
      changes nothing but the step and the counters of skipped steps.
    stop_frozen: maps the parameters to the same without gradients of frozen
      ones.
    ema_decay: the fraction of the averages that a step keeps, if the state has
      averages.
    update_memory: from `make_update_memory`; needed if the state has a memory.
  """
  loss_and_gradients = jax.value_and_grad(
    _make_mean_loss(model, loss, reshard, stop_frozen, is_logged), has_aux=True
  )

  def train_step(state, batch, lr_scale=1.0, *, freeze_batch_norm=False):
    # `train` changes nothing but batch normalization.
    (value, (embeddings, metrics, model_state)), gradients = loss_and_gradients(
      state.params, state, batch, train=not freeze_batch_norm
    )
    norm = optax.tree.norm(gradients)
    rates = learning_rates(state.step - state.skipped_steps)
    metrics = {
      'loss': value,
      'gradient_norm': norm,
      **_group_metrics(state.params, gradients, rates, lr_scale),
      **metrics,
    }
    loss_state = state.loss_state
    if loss.centers:
      centers = losses.update_centers(
        loss_state['centers'],
        embeddings,
        batch['label'],
        where=batch.get('mask'),
      )
      loss_state = {'centers': centers}
    if 'memory' in loss_state:
      memory = update_memory(
        loss_state['memory'],
        state.step,
        embeddings,
        batch['label'],
        batch.get('mask'),
      )
      loss_state = {'memory': memory}
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(
      state.params, optax.tree.scale(lr_scale, updates)
    )
    averages = state.averages
    if averages:
      averages = optax.incremental_update(
        {'params': params, 'model_state': model_state}, averages, 1 - ema_decay
      )
    new = state_lib.TrainState(
      step=state.step + 1,
      params=params,
      loss_state=loss_state,
      model_state=model_state,
      averages=averages,
      opt_state=opt_state,
      skipped_steps=state.skipped_steps,
      skipped_in_row=jnp.int32(0),
    )
    if not skip_nonfinite:
      return new, metrics
    new = jax.tree.map(
      functools.partial(jnp.where, jnp.isfinite(value) & jnp.isfinite(norm)),
      new,
      state.skip_step(),
    )
    counts = {
      'skipped_steps': new.skipped_steps,
      'skipped_in_row': new.skipped_in_row,
    }
    return new, metrics | counts

  return jax.jit(
    train_step, donate_argnums=0, static_argnames='freeze_batch_norm'
  )


def _make_mean_loss(
  model, loss, reshard, stop_frozen, is_logged
) -> Callable[..., tuple]:
  """Returns the function that a step differentiates: a batch's mean loss.

  It maps (params, state, batch, train) to (loss, (embeddings, metrics, model
  state)); `params` stand in for those of the state.
  """

  def mean_loss(params, state, batch, *, train):
    params = fine_tuning.merge(stop_frozen(params))
    points = params.pop('proxies')
    where = batch.get('mask')
    with models.masked_statistics(where):
      embeddings, model_state = model.apply(
        {'params': params, **state.model_state},
        batch['image'],
        train=train,
        mutable=list(state.model_state),
      )
    embeddings, points, labels, where = reshard(
      embeddings, points, batch['label'], where
    )
    value = loss.fn(
      embeddings=embeddings,
      labels=labels,
      where=where,
      **({'proxies': points} if loss.proxies else {}),
      **state.loss_state,
    )
    metrics = _if_logged(
      is_logged and is_logged(state.step + 1),
      functools.partial(_proxy_metrics, loss.proxies),
      *jax.lax.stop_gradient((embeddings, points)),
      labels,
      where,
    )
    if value.ndim:  # Otherwise it is a loss of the batch as a whole.
      value = jnp.mean(value, where=where)
    return value, (embeddings, metrics, model_state)

  return mean_loss


def make_train_steps(train_step: _Step) -> _Step:
  """Returns (state, batches, lr_scale) -> (state, metrics) of several steps.

  One call to the device runs them all: where a step is short, dispatching it
  would take the host longer. Metrics are [len(batches)], or [] for one batch.

  Args:
    train_step: the step, from `make_train_step`.
  """

  @functools.partial(
    jax.jit, donate_argnums=0, static_argnames='freeze_batch_norm'
  )
  def scan(state, batches, lr_scale, *, freeze_batch_norm):
    def step(state, batch):
      return train_step(
        state, batch, lr_scale, freeze_batch_norm=freeze_batch_norm
      )

    batches = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
    # Inside a loop XLA's convolutions on CPUs are ten times slower.
    is_cpu = jax.default_backend() == 'cpu'
    return jax.lax.scan(step, state, batches, unroll=is_cpu)

  def train_steps(state, batches, lr_scale=1.0, *, freeze_batch_norm=False):
    if len(batches) == 1:
      return train_step(
        state, *batches, lr_scale, freeze_batch_norm=freeze_batch_norm
      )
    return scan(state, batches, lr_scale, freeze_batch_norm=freeze_batch_norm)

  return train_steps


def _group_metrics(params, gradients, rates, lr_scale) -> dict[str, jax.Array]:
  """The gradient norm and the learning rate of each group, before the step."""
  metrics = {}
  for group in optimizer_lib.GROUPS:
    if not jax.tree.leaves(params[group]):  # The loss has no proxies.
      continue
    parts = [gradients[group]]
    if group == 'backbone':
      parts.append(gradients.get('adapters', {}))
    metrics[f'gradient_norm.{group}'] = optax.tree.norm(parts)
    if group in rates:
      metrics[f'learning_rate.{group}'] = lr_scale * rates[group]
  return metrics


def _if_logged(
  is_logged: jax.Array | None, fn: Callable[..., dict], *arrays
) -> dict[str, jax.Array]:
  """Returns fn(*arrays), computed only in steps that are logged, or NaN."""
  if is_logged is None:
    return fn(*arrays)
  shapes = jax.eval_shape(fn, *arrays)

  def skip(*unused):
    return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)

  return jax.lax.cond(is_logged, fn, skip, *arrays)


def _proxy_metrics(
  form, embeddings, points, labels, where=None
) -> dict[str, jax.Array]:
  """Metrics of the proxies, and of the batch beside them if labels index them.

  `proxy_norm` is the mean norm: where a loss depends only on directions, an
  update turns a proxy by an angle inverse to its norm, so long proxies learn
  slowly. `proxy_error` is the paper's eps, over the batch instead of all
  points, and `ranking_bound` the bound that follows from it.
  """
  if form is None:
    return {}
  norm = jnp.mean(jnp.linalg.norm(points, axis=-1))
  if form == losses.UNASSIGNED:
    return {'proxy_norm': norm}
  rows = points.reshape(-1, points.shape[-1])
  num_centers = rows.shape[0] // points.shape[0]
  nearest = proxies.nearest_proxies(embeddings, rows) // num_centers
  metrics = {
    'proxy_norm': norm,
    'proxy_accuracy': jnp.mean(nearest == labels, where=where),
  }
  if form == losses.PER_CLASS:
    error = proxies.proxy_approximation_error(
      embeddings, points, labels, where=where
    )
    metrics |= {
      'proxy_error': error,
      'ranking_bound': proxies.ranking_bound(
        embeddings, points, labels, error, where=where
      ),
    }
  return metrics
