"""Rows of a matrix in blocks, sharded over devices, and their products.

`Layout` says how rows are sharded and has the collective operations of kernels
over them. Blocks have a multiple of 64 rows: on CPUs, XLA rounds all products
of at least 64 rows identically, wherever a row lies in the matrix. Products of
fewer rows may differ from these in the last digit, but agree with each other.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

ROWS = 64
REPLICATED = PartitionSpec()


def round_up(number: int, multiple: int = ROWS) -> int:
  return -(-number // multiple) * multiple


class Layout(NamedTuple):
  """A sharding of rows over a 1-D mesh, and the size of their blocks.

  Each device has the same number of consecutive rows. The methods from
  `device_index` on are for functions that `on_each` maps over the devices.

  Attributes:
    mesh: the devices; None for a single one.
    axis_name: of the mesh.
    block_size: rows per block.
    num_rows: rows without padding; of the larger matrix where two share the
      layout.
  """

  mesh: jax.sharding.Mesh | None
  axis_name: str | None
  block_size: int
  num_rows: int

  @property
  def num_devices(self) -> int:
    return 1 if self.mesh is None else self.mesh.shape[self.axis_name]

  @property
  def sharded(self) -> PartitionSpec:
    return PartitionSpec(self.axis_name)

  def deal(self, rows: np.ndarray) -> np.ndarray:
    """Reorders rows so that block b is on device b % num_devices.

    Blocks of neighboring rows take about as long as each other: dealt in turn,
    every device has its part of the long ones.
    """
    blocks = rows.reshape(-1, self.num_devices, self.block_size)
    return blocks.swapaxes(0, 1).reshape(-1)

  def put(self, rows: chex.Array) -> jax.Array:
    """Shards rows, which every process has, over the devices."""
    if self.mesh is None:
      return jax.device_put(rows)
    rows = np.asarray(rows)
    return jax.make_array_from_callback(
      rows.shape,
      NamedSharding(self.mesh, self.sharded),
      lambda index: rows[index],
    )

  def take(self, rows: chex.Array, order: np.ndarray) -> jax.Array:
    """Shards rows in this order; indices past the last row give rows of NaN.

    No comparison with NaN holds, so that padding reaches no threshold.
    """
    if isinstance(rows, jax.Array):
      return self.put(take(rows, order))
    taken = np.empty((len(order), *rows.shape[1:]), rows.dtype)
    np.take(rows, order, axis=0, mode='clip', out=taken)
    taken[order >= len(rows)] = np.nan
    return self.put(taken)

  def on_each(self, fn, in_specs, out_specs):
    """Maps a function over the devices' shards; see `jax.shard_map`."""
    if self.mesh is None:
      return fn
    return jax.shard_map(
      fn,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )

  def device_index(self) -> int | jax.Array:
    return 0 if self.mesh is None else jax.lax.axis_index(self.axis_name)

  def first_index(self, rows: jax.Array) -> int | jax.Array:
    """Returns the index of this device's first row."""
    return self.device_index() * rows.shape[0]

  def sum(self, values):
    return values if self.mesh is None else jax.lax.psum(values, self.axis_name)

  def max(self, values):
    return values if self.mesh is None else jax.lax.pmax(values, self.axis_name)

  def all_gather(self, values, *, axis: int = 0):
    """Concatenates the values of all devices along an axis, in order."""
    if self.mesh is None:
      return values
    return jax.lax.all_gather(values, self.axis_name, axis=axis, tiled=True)

  def gather(self, values: jax.Array) -> jax.Array:
    """Returns the values of all rows, without those of the padding."""
    return self.all_gather(values)[: self.num_rows]

  def shift(self, values, steps: int):
    """Receives the values of the device `steps` ahead in the ring."""
    if self.mesh is None:
      return values
    n = self.num_devices
    ring = [(i, (i - steps) % n) for i in range(n)]
    return jax.lax.ppermute(values, self.axis_name, ring)

  def look_up(self, rows: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns the rows of these indices, whichever devices have them."""
    indices -= self.first_index(rows)
    is_here = (indices >= 0) & (indices < rows.shape[0])
    found = rows.at[indices].get(mode='clip')
    return self.sum(jnp.where(is_here[:, None], found, 0))


def make_layout(
  mesh: jax.sharding.Mesh | None,
  axis_name: str | None,
  block_size: int,
  num_rows: int,
) -> Layout:
  """Returns a layout with blocks no larger than a device's rows require."""
  num_devices = 1 if mesh is None else mesh.shape[axis_name]
  per_device = -(-num_rows // num_devices)
  block_size = round_up(min(block_size, per_device))
  return Layout(mesh, axis_name, block_size, num_rows)


def as_float32(rows: chex.Array) -> jax.Array | np.ndarray:
  """Casts rows without moving them between host and device, to save memory."""
  if isinstance(rows, jax.Array):
    return rows.astype(jnp.float32)
  return np.asarray(rows, np.float32)


@jax.jit
def take(rows: chex.Array, order: chex.Array) -> jax.Array:
  """Returns rows in this order; indices past the last row give rows of NaN."""
  return rows.at[order].get(mode='fill', fill_value=jnp.nan)


def get_block(rows: jax.Array, index: chex.Numeric, size: int) -> jax.Array:
  """Returns rows [index * size, (index + 1) * size)."""
  return jax.lax.dynamic_slice_in_dim(rows, index * size, size)


def similarities(queries: chex.Array, items: chex.Array) -> jax.Array:
  """Returns the inner products of all pairs, float32 [queries, items]."""
  return jnp.dot(queries, items.T, precision=jax.lax.Precision.HIGHEST)
