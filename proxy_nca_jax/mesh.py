"""The device mesh and its shardings; no other file names its axis."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from proxy_nca_jax.runtime import processes

AXIS = 'data'


def make_mesh(
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Returns a 1-D mesh over the devices, by default all of all processes."""
  devices = processes.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),),
    (AXIS,),
    (jax.sharding.AxisType.Auto,),
    devices=devices,
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding with a full copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of the leading dimension over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def pad_rows(x: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
  """Pads with rows of 0 to a multiple of the devices; for use inside `jit`."""
  padding = ((0, -x.shape[0] % mesh.size),) + ((0, 0),) * (x.ndim - 1)
  x = jax.lax.with_sharding_constraint(x, by_row(mesh))
  return jax.lax.with_sharding_constraint(jnp.pad(x, padding), by_row(mesh))


def unpad_rows(
  x: jax.Array, num_rows: int, mesh: jax.sharding.Mesh
) -> jax.Array:
  """Removes the rows that `pad_rows` added; for use inside `jit`.

  No row moves to another device: the last devices may have fewer rows.
  """
  return jax.lax.with_sharding_constraint(x[:num_rows], by_row(mesh))


def replicate(tree, mesh: jax.sharding.Mesh):
  """Replicates the arrays of a tree on every device; for use inside `jit`."""
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def fetch(x: jax.Array) -> np.ndarray:
  """Returns a global array as NumPy in every process, whatever its sharding."""
  if x.is_fully_addressable:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


def local_rows(x: jax.Array) -> np.ndarray:
  """Returns this process's rows of an array that is sharded by row.

  Arrays with the same sharding give the same rows in the same order.
  """
  if x.is_fully_addressable:
    return np.asarray(x)
  return np.concatenate(
    [
      np.asarray(shard.data)
      for shard in sorted(x.addressable_shards, key=lambda x: x.index[0].start)
    ]
  )


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Assembles a global batch from the rows of each process."""
  return {
    name: jax.make_array_from_process_local_data(by_row(mesh), rows)
    for name, rows in batch.items()
  }
