"""The device mesh and the shardings over it: no other file names its axis."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

AXIS = 'data'


def make_mesh(
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Returns a 1-D mesh over the devices; None is all of all processes."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),),
    (AXIS,),
    (jax.sharding.AxisType.Auto,),
    devices=devices,
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """A whole copy of the array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The leading dimension divided among the devices."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def pad_rows(x: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
  """Adds rows of 0, so that the devices can share them alike; inside `jit`."""
  filling = ((0, -x.shape[0] % mesh.size),) + ((0, 0),) * (x.ndim - 1)
  x = jax.lax.with_sharding_constraint(x, by_row(mesh))
  return jax.lax.with_sharding_constraint(jnp.pad(x, filling), by_row(mesh))


def unpad_rows(
  x: jax.Array, num_rows: int, mesh: jax.sharding.Mesh
) -> jax.Array:
  """Takes what `pad_rows` added away; each device keeps its rows.

  Inside `jit`, the last devices may have fewer rows than the others.
  """
  return jax.lax.with_sharding_constraint(x[:num_rows], by_row(mesh))


def replicate(tree, mesh: jax.sharding.Mesh):
  """Gives every device the whole arrays; inside `jit`."""
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def fetch(x: jax.Array) -> np.ndarray:
  """Returns a whole array on the host of each process, however it lies."""
  if x.is_fully_addressable:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Places this process's rows of a global batch on its devices."""
  return {
    name: jax.make_array_from_process_local_data(by_row(mesh), rows)
    for name, rows in batch.items()
  }
