"""What a run is going to do and to need, before it does it."""

import jax
import jax.numpy as jnp
import ml_collections
from clu import parameter_overview

from proxy_nca_jax import datasets
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import state as state_lib


def describe(
  config: ml_collections.ConfigDict,
  train: datasets.Split,
  train_step,
  state: state_lib.TrainState,
  mesh: jax.sharding.Mesh,
) -> str:
  """Tells of steps, parameters, memory and disk; compiles the step to know.

  Args:
    config: of the run.
    train: the records to learn from.
    train_step: of `train_step.make_train_step`.
    state: of `state.abstract`.
    mesh: of the devices.
  """
  rows = mesh_lib.by_row(mesh)
  side, size = config.dataset.image_size, config.batch_size

  def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

  batch = {
    'image': struct((size, side, side, 3), jnp.uint8),
    'label': struct((size,), jnp.int32),
    'mask': struct((size,), bool),
    'id': struct((size,), jnp.int32),
  }
  memory = train_step.lower(state, batch, 1.0).compile().memory_analysis()
  held = memory.argument_size_in_bytes
  # What is donated is not needed twice.
  besides = (
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
      f'{config.num_steps:,} steps of {size:,} images, {epochs:,.1f} epochs; '
      f'scored {scored}, saved every {config.save_every:,} steps.',
      f'Memory on each device ({mesh.size} in all): {_mebibytes(held)} for the '
      f'state and a batch, {_mebibytes(besides)} for a step besides.',
      f'Disk: {config.keep_checkpoints} checkpoints of {_mebibytes(saved)}.',
    ]
  )


def _mebibytes(number: int) -> str:
  return f'{number / 2**20:,.1f} MiB'
