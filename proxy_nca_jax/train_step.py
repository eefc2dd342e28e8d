"""The training step, from a batch of images to the next state."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from proxy_nca_jax import losses, proxies
from proxy_nca_jax import state as state_lib


class Loss(NamedTuple):
  """A loss with its arguments, and what it is given besides."""

  fn: Callable[..., jax.Array]
  needs: losses.Needs


def make_train_step(
    model,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    normalize: Callable[[jax.Array], jax.Array],
    *,
    share: Callable[..., tuple] = lambda *arrays: arrays,
) -> Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]:
  """Returns the jitted step: (state, batch, rate_scale) -> (state, metrics).

  `rate_scale` multiplies all learning rates; it is 1 by default. With
  `freeze_batch_norm=True` the stored statistics are used and kept. The mean of
  the loss, the batch statistics and the metrics are those of the global batch,
  however many devices share it. The given state is donated.

  Args:
    model: `apply` gives (embeddings, model state).
    optimizer: of all parameters.
    loss: of `make_loss`.
    normalize: of `make_normalize`.
    share: of `make_share`.
  """

  def train_step(state, batch, rate_scale=1.0, *, freeze_batch_norm=False):
    images = normalize(batch['image'])

    def mean_loss(params):
      params = dict(params)
      points = params.pop('proxies')
      embeddings, model_state = model.apply(
        {'params': params, **state.model_state},
        images,
        # Nothing but batch normalisation differs in training.
        train=not freeze_batch_norm,
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

    (value, (embeddings, metrics, model_state)), gradients = jax.value_and_grad(
      mean_loss, has_aux=True
    )(state.params)
    metrics = {
      'loss': value, 'gradient_norm': optax.tree.norm(gradients), **metrics
    }
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
    state = state_lib.TrainState(
      step=state.step + 1,
      params=optax.apply_updates(
        state.params, optax.tree.scale(rate_scale, updates)
      ),
      loss_state=loss_state,
      model_state=model_state,
      opt_state=opt_state,
    )
    return state, metrics

  return jax.jit(
    train_step, donate_argnums=0, static_argnames='freeze_batch_norm'
  )


def _proxy_metrics(
    form, embeddings, points, labels, mask
) -> dict[str, jax.Array]:
  """Compares the batch with the proxies, where labels index them.

  `proxy_error` is the paper's eps, of the batch instead of all points, and
  `ranking_bound` what follows from it.
  """
  if form not in ('one', 'several'):
    return {}
  embeddings, points = jax.lax.stop_gradient((embeddings, points))
  rows = points.reshape(-1, points.shape[-1])
  num_centers = rows.shape[0] // points.shape[0]
  nearest = proxies.nearest_proxies(embeddings, rows) // num_centers
  metrics = {'proxy_accuracy': jnp.mean(nearest == labels, where=mask)}
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
