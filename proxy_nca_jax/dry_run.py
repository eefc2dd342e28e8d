"""A dry run: checks a run as far as possible without training.

Logs its steps, parameters, memory and disk space.
"""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from clu import parameter_overview

from proxy_nca_jax import blocked, datasets, warm_start, weights
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import state as state_lib

_logger = logging.getLogger(__name__)


def log_plan(
  config: ml_collections.ConfigDict,
  model,
  train: datasets.Split,
  state: state_lib.TrainState,
  train_step: Callable,
  mesh: jax.sharding.Mesh,
) -> None:
  """Logs what the run would do and need; loads its initial weights.

  Args:
    config: the run's config.
    model: the network.
    train: the records to train on.
    state: shapes and shardings of the state, from `state.abstract`.
    train_step: the step, from `train_step.make_train_step`. It is compiled: the
      compiler knows the memory.
    mesh: the devices.

  Raises:
    ValueError: if `config.model.init_from` is missing or does not fit, or the
      features do not fit `config.model.head_init`.
  """
  if config.model.head_init == 'identity':
    kernel = state.params['head']['embedding']['kernel']
    warm_start.check_identity(*kernel.shape)
  if config.model.init_from:
    weights.load(config, state, weights.digest(config, None))
  _logger.info('%s', _describe(config, model, train, state, train_step, mesh))
  _logger.info('A dry run (config.dry_run): nothing was trained.')


def _describe(config, model, train, state, train_step, mesh) -> str:
  size = config.batch_size
  memory = (
    train_step.lower(state, batch_shapes(config, model, mesh), 1.0)
    .compile()
    .memory_analysis()
  )
  arguments = memory.argument_size_in_bytes
  # Donated buffers serve as arguments and as outputs.
  temporary = (
    memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  saved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  epochs = config.num_steps * size / len(train)
  scored = f'every {config.eval_every:,}' if config.eval_every else 'at the end'
  table = parameter_overview.get_parameter_overview(
    state.params, include_stats=False
  )
  return '\n'.join(
    [
      table,
      f'{config.num_steps:,} steps of {size:,} {train.noun}, {epochs:,.1f} '
      f'epochs; scored {scored}, saved every {config.save_every:,} steps.',
      f'Memory on each of {mesh.size} devices: {_mebibytes(arguments)} for the '
      f'state and a batch, and {_mebibytes(temporary)} during a step.',
      f'Disk: {config.keep_checkpoints} checkpoints of {_mebibytes(saved)}.',
    ]
  )


def batch_shapes(
  config: ml_collections.ConfigDict, model, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes, dtypes and shardings of a training batch."""
  size = blocked.round_up(config.batch_size, mesh.size)
  images = model.example(size)
  shapes = {
    'image': (images.shape, images.dtype),
    'label': ((size,), jnp.int32),
    'id': ((size,), jnp.int32),
  }
  if size > config.batch_size:
    shapes['mask'] = ((size,), jnp.bool_)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.by_row(mesh))
    for name, (shape, dtype) in shapes.items()
  }


def _mebibytes(num_bytes: int) -> str:
  return f'{num_bytes / 2**20:,.1f} MiB'
