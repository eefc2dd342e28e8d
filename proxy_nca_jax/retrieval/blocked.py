"""Rows in blocks, on one device or several, and their products.

Blocks have a multiple of 64 rows: on CPUs all products of so many are rounded
alike, wherever their rows lie; one of fewer may differ from them in the last
digit, but not within itself.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

ROWS = 64


def round_up(number: int, multiple: int = ROWS) -> int:
  return -(-number // multiple) * multiple


class Layout(NamedTuple):
  """How rows lie on devices: block b is the (b // n)-th of device b % n."""

  mesh: jax.sharding.Mesh | None
  axis_name: str | None
  block_size: int

  @property
  def num_devices(self) -> int:
    return 1 if self.mesh is None else self.mesh.shape[self.axis_name]

  def deal(self, rows: np.ndarray) -> np.ndarray:
    """Brings sorted rows into the order of the devices."""
    blocks = rows.reshape(-1, self.num_devices, self.block_size)
    return blocks.swapaxes(0, 1).reshape(-1)

  def place(self, rows: np.ndarray) -> jax.Array:
    """Divides rows among the devices."""
    if self.mesh is None:
      return jax.device_put(rows)
    sharding = NamedSharding(self.mesh, PartitionSpec(self.axis_name))
    rows = np.asarray(rows)
    return jax.make_array_from_callback(
      rows.shape, sharding, lambda index: rows[index]
    )

  def take(self, rows: jax.Array | np.ndarray, order: np.ndarray) -> jax.Array:
    """Places the rows in this order; an order beyond them is a filling of NaN.

    A similarity to NaN reaches no threshold.
    """
    if isinstance(rows, jax.Array):
      return self.place(take(rows, order))
    taken = np.empty((len(order), *rows.shape[1:]), rows.dtype)
    np.take(rows, order, axis=0, mode='clip', out=taken)
    taken[order >= len(rows)] = np.nan
    return self.place(taken)

  def on_each(self, fn, *, is_shared: bool = False):
    """Maps (rows of a device, what all share) to rows, or to what all share."""
    if self.mesh is None:
      return fn
    rows = PartitionSpec(self.axis_name)
    return jax.shard_map(
      fn,
      mesh=self.mesh,
      in_specs=(rows, PartitionSpec()),
      out_specs=PartitionSpec() if is_shared else rows,
      check_vma=False,
    )


def make_layout(
  mesh: jax.sharding.Mesh | None,
  axis_name: str | None,
  block_size: int,
  num_rows: int,
) -> Layout:
  """Returns a layout whose blocks are no larger than so many rows need."""
  num_devices = 1 if mesh is None else mesh.shape[axis_name]
  share = -(-num_rows // num_devices)
  return Layout(mesh, axis_name, round_up(min(block_size, share)))


def as_float32(rows: chex.Array) -> jax.Array | np.ndarray:
  """Leaves rows where they are: another copy of all of them is memory."""
  if isinstance(rows, jax.Array):
    return rows.astype(jnp.float32)
  return np.asarray(rows, np.float32)


@jax.jit
def take(rows, order):
  return rows.at[order].get(mode='fill', fill_value=jnp.nan)


def block(rows, index, size):
  return jax.lax.dynamic_slice_in_dim(rows, index * size, size)


def similarities(queries, items):
  return jnp.dot(queries, items.T, precision=jax.lax.Precision.HIGHEST)
