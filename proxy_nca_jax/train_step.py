"""The training step, from a batch of images to the next state."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from proxy_nca_jax import losses, proxies
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib

if TYPE_CHECKING:
  # Who trains without a config does without the library.
  import ml_collections


_Step = Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]


class Loss(NamedTuple):
  """A loss with its arguments, and what it is given besides."""

  fn: Callable[..., jax.Array]
  needs: losses.Needs


def make_loss(config: ml_collections.ConfigDict) -> Loss:
  """Returns the loss that `config.loss` names, with its arguments.

  Raises:
    ValueError: if the name is unknown, or the arguments do not fit.
  """
  name = config.loss.name
  if name not in losses.LOSSES:
    raise ValueError(
      f'Unknown loss {name!r} (config.loss.name): choose one of '
      f'{", ".join(sorted(losses.LOSSES))}.'
    )
  fn = functools.partial(losses.LOSSES[name], **config.loss[name])
  loss = Loss(fn, losses.NEEDS[name])

  def call():
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = state_lib.create_loss_arrays(
      config, keys, class_sizes=np.ones(2, int)
    )
    embeddings = jnp.zeros((2, config.model.embedding_dim))
    return loss.fn(embeddings=embeddings, labels=jnp.arange(2), **arrays)

  if config.proxies.by_size and not loss.needs.assignment:
    raise ValueError(
      f'The loss {name!r} assigns no classes to proxies: '
      'config.proxies.by_size is for fractional_proxy_nca.'
    )
  if config.proxies.sharded and (
    not loss.needs.has_labelled_proxies or config.loss[name].get('proxy_chunk')
  ):
    raise ValueError(
      'config.proxies.sharded is for losses whose classes have proxies of '
      f'their own, without proxy_chunk; config.loss.name is {name!r}.'
    )
  is_of_batch = not jax.eval_shape(call).shape
  if config.loss.class_weighting and is_of_batch:
    raise ValueError(
      f'The loss {name!r} is one of a batch as a whole: its examples cannot be '
      'weighted (config.loss.class_weighting).'
    )
  if config.loss.logit_adjustment and 'log_priors' not in (
    inspect.signature(fn).parameters
  ):
    raise ValueError(
      f'The loss {name!r} takes no log_priors: config.loss.logit_adjustment is '
      'for proxy_nca and proxy_nca_pp.'
    )
  return loss


def correct_for_frequency(
  loss: Loss, config: ml_collections.ConfigDict, class_sizes: np.ndarray
) -> Loss:
  """Weights and adjusts a loss for classes of different sizes, if configured.

  Args:
    loss: of `make_loss`.
    config: of the run.
    class_sizes: int [num_classes], the training examples of each.
  """
  fn = loss.fn
  if power := config.loss.logit_adjustment:
    priors = losses.log_priors(class_sizes, power=power)
    fn = functools.partial(fn, log_priors=priors)
  if not (power := config.loss.class_weighting):
    return Loss(fn, loss.needs)
  weights = losses.class_weights(class_sizes, power=power)

  def weighted(*, labels, **arrays):
    return weights[labels] * fn(labels=labels, **arrays)

  return Loss(weighted, loss.needs)


def make_share(
  config: ml_collections.ConfigDict, num_classes: int, mesh
) -> Callable[..., tuple]:
  """Returns (embeddings, points, labels, mask) -> the same, where they meet.

  Inside `jit`. By default each device compares its part of the batch with its
  copy of the proxies. With `config.proxies.sharded` it has the rows of some of
  them, and the batch comes to them: of all devices together no more than the
  embeddings travels, and no device has a [batch, num_classes] matrix.
  """
  if not config.proxies.sharded:
    return lambda *arrays: arrays

  def share(embeddings, points, labels, mask):
    embeddings, labels, mask = mesh_lib.replicate(
      (embeddings, labels, mask), mesh
    )
    points = mesh_lib.unpad_rows(points, num_classes, mesh)
    return embeddings, points, labels, mask

  return share


def make_train_step(
  model,
  optimizer: optax.GradientTransformation,
  loss: Loss,
  normalize: Callable[[jax.Array], jax.Array],
  *,
  share: Callable[..., tuple] = lambda *arrays: arrays,
  learning_rates: Callable[[jax.Array], dict] = lambda num_updates: {},
) -> _Step:
  """Returns the jitted step: (state, batch, rate_scale) -> (state, metrics).

  `rate_scale` multiplies all learning rates; it is 1 by default. With
  `freeze_batch_norm=True` the stored statistics are used and kept. The mean of
  the loss, the batch statistics and the metrics are those of the global batch,
  however many devices share it. The given state is donated.

  Where the optimiser skips what is not finite, a step whose loss or gradient
  norm is not changes nothing but `step` and the counts of what is skipped.

  Args:
    model: `apply` gives (embeddings, model state).
    optimizer: of the groups of parameters.
    loss: of `make_loss`.
    normalize: of `make_normalize`.
    share: of `make_share`.
    learning_rates: (updates done) -> {group: rate}, for the metrics.
  """

  loss_and_gradients = jax.value_and_grad(
    _make_mean_loss(model, loss, normalize, share), has_aux=True
  )

  def train_step(state, batch, rate_scale=1.0, *, freeze_batch_norm=False):
    # Nothing but batch normalisation differs in training.
    (value, (embeddings, metrics, model_state)), gradients = loss_and_gradients(
      state.params, state, batch, train=not freeze_batch_norm
    )
    skipped = optimizer_lib.skip_counts(state.opt_state)
    num_updates = state.step - skipped.get('skipped_steps', 0)
    metrics = {
      'loss': value,
      'gradient_norm': optax.tree.norm(gradients),
      **_group_metrics(
        state.params, gradients, learning_rates(num_updates), rate_scale
      ),
      **metrics,
    }
    is_finite = jnp.isfinite(value) & jnp.isfinite(metrics['gradient_norm'])
    if skipped:
      # A loss that is not finite can have a gradient that is.
      gradients = jax.tree.map(
        lambda x: jnp.where(is_finite, x, jnp.nan), gradients
      )
    loss_state = state.loss_state
    if loss.needs.centers:
      loss_state = {
        'centers': losses.update_centers(
          loss_state['centers'],
          embeddings,
          batch['label'],
          where=batch['mask'],
        )
      }
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(
      state.params, optax.tree.scale(rate_scale, updates)
    )
    if skipped:
      params, loss_state, model_state = jax.tree.map(
        functools.partial(jnp.where, is_finite),
        (params, loss_state, model_state),
        (state.params, state.loss_state, state.model_state),
      )
    state = state_lib.TrainState(
      step=state.step + 1,
      params=params,
      loss_state=loss_state,
      model_state=model_state,
      opt_state=opt_state,
    )
    return state, metrics | optimizer_lib.skip_counts(opt_state)

  return jax.jit(
    train_step, donate_argnums=0, static_argnames='freeze_batch_norm'
  )


def _make_mean_loss(model, loss, normalize, share) -> Callable[..., tuple]:
  """Returns what a step differentiates: the mean loss of a batch.

  (params, state, batch, train) -> (loss, (embeddings, metrics, model state)),
  where the parameters of the state are not looked at.
  """

  def mean_loss(params, state, batch, *, train):
    params = dict(params)
    points = params.pop('proxies')
    embeddings, model_state = model.apply(
      {'params': params, **state.model_state},
      normalize(batch['image']),
      train=train,
      mutable=list(state.model_state),
    )
    embeddings, points, labels, mask = share(
      embeddings, points, batch['label'], batch['mask']
    )
    value = loss.fn(
      embeddings=embeddings,
      labels=labels,
      where=mask,
      **({'proxies': points} if loss.needs.proxies else {}),
      **state.loss_state,
    )
    # A loss of the batch as a whole is a scalar already.
    if value.ndim:
      value = jnp.sum(value) / jnp.maximum(jnp.sum(mask), 1)
    metrics = _proxy_metrics(
      loss.needs.proxies, embeddings, points, labels, mask
    )
    return value, (embeddings, metrics, model_state)

  return mean_loss


def make_train_steps(train_step: _Step) -> _Step:
  """Returns (state, batches, rate_scale) -> (state, metrics) of several steps.

  They are one call to the device: where a step is short, the host would take
  longer to begin it. Metrics are [len(batches)], or [] of a single batch.

  Args:
    train_step: of `make_train_step`.
  """

  @functools.partial(
    jax.jit, donate_argnums=0, static_argnames='freeze_batch_norm'
  )
  def scan(state, batches, rate_scale, *, freeze_batch_norm):
    def step(state, batch):
      return train_step(
        state, batch, rate_scale, freeze_batch_norm=freeze_batch_norm
      )

    batches = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
    # In a loop, XLA's convolutions on CPUs are slower by an order of magnitude.
    is_cpu = jax.default_backend() == 'cpu'
    return jax.lax.scan(step, state, batches, unroll=is_cpu)

  def train_steps(state, batches, rate_scale=1.0, *, freeze_batch_norm=False):
    if len(batches) == 1:
      return train_step(
        state, *batches, rate_scale, freeze_batch_norm=freeze_batch_norm
      )
    return scan(state, batches, rate_scale, freeze_batch_norm=freeze_batch_norm)

  return train_steps


def _group_metrics(
  params, gradients, rates, rate_scale
) -> dict[str, jax.Array]:
  """The gradient norm and the learning rate of each group, before the step."""
  metrics = {}
  for group in optimizer_lib.GROUPS:
    if not jax.tree.leaves(params[group]):  # No proxies in this loss.
      continue
    metrics[f'gradient_norm.{group}'] = optax.tree.norm(gradients[group])
    if group in rates:
      metrics[f'learning_rate.{group}'] = rate_scale * rates[group]
  return metrics


def _proxy_metrics(
  form, embeddings, points, labels, mask
) -> dict[str, jax.Array]:
  """Looks at the proxies, and compares the batch with them if labels do.

  `proxy_norm` is the mean of their norms: where a loss sees directions alone,
  an update turns a proxy by its share of the norm: long ones learn slowly.
  `proxy_error` is the paper's eps, of the batch instead of all points, and
  `ranking_bound` what follows from it.
  """
  if form is None:
    return {}
  embeddings, points = jax.lax.stop_gradient((embeddings, points))
  norm = jnp.mean(jnp.linalg.norm(points, axis=-1))
  if form == 'free':
    return {'proxy_norm': norm}
  rows = points.reshape(-1, points.shape[-1])
  num_centers = rows.shape[0] // points.shape[0]
  nearest = proxies.nearest_proxies(embeddings, rows) // num_centers
  metrics = {
    'proxy_norm': norm,
    'proxy_accuracy': jnp.mean(nearest == labels, where=mask),
  }
  if form == 'one':
    error = proxies.proxy_approximation_error(
      embeddings, points, labels, where=mask
    )
    metrics |= {
      'proxy_error': error,
      'ranking_bound': proxies.ranking_bound(
        embeddings, points, labels, error, where=mask
      ),
    }
  return metrics
