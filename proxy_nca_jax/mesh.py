"""The device mesh and the shardings over it: no other file names its axis."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
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


def shard_batch(
    batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Places this process's rows of a global batch on its devices."""
  return {
    name: jax.make_array_from_process_local_data(by_row(mesh), rows)
    for name, rows in batch.items()
  }
