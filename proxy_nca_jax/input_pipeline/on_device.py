"""Training pictures in device memory: batches are cut out of them there.

Pictures are rows of one array, uint8 [rows, height * width * 3], divided among
the devices of the mesh. What travels from the host is where to cut: a few bytes
an image. Each device looks for the rows of the whole batch among its own and
cuts what it finds; a sum over the devices, of which one has the row and the
others zeros, brings each image to the device that trains on it. No device ever
holds more than its part of the pictures, and the pixels are exact.
"""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.datasets import Split

_logger = logging.getLogger(__name__)


def make_prepare(
  split: Split, mesh: jax.sharding.Mesh, *, image_size: int, padding: int
) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
  """Puts a split's pictures on the devices, and returns how to use them.

  Args:
    split: the records to train on.
    mesh: of the devices.
    image_size: side of the square that is cut out.
    padding: black pixels around the picture before it.

  Returns:
    A function from this process's rows of a batch {'top', 'left', 'flip', 'id',
    ...} of `input_pipeline.train_batches` to the global {'image', 'id', ...}:
    in place of the first three the image is there.

  Raises:
    ValueError: if the pictures differ in size, or do not fit the devices.
  """
  pictures = put_pictures(split, mesh)
  height, width, _ = split.image(0).shape
  cut = make_cut(
    mesh, height=height, width=width, image_size=image_size, padding=padding
  )

  def prepare(batch):
    batch = mesh_lib.shard_batch(batch, mesh)
    place = {name: batch.pop(name) for name in ('top', 'left', 'flip')}
    return batch | {'image': cut(pictures, place | {'id': batch['id']})}

  return prepare


def put_pictures(split: Split, mesh: jax.sharding.Mesh) -> jax.Array:
  """Places pictures on the devices, as rows that they share.

  Each process reads those of its own devices.

  Returns:
    uint8 [rows, height * width * 3], with zeros after the last picture.

  Raises:
    ValueError: if the pictures differ in size, or do not fit the devices.
  """
  shape = split.image(0).shape
  size = math.prod(shape)
  rows = -(-len(split) // mesh.size)
  check_memory(rows * size, mesh.local_devices)
  _logger.info(
    'Placing %d pictures on the devices, %.0f MiB on each',
    len(split),
    rows * size / 2**20,
  )

  def read(index):
    start, stop, _ = index[0].indices(rows * mesh.size)
    part = np.zeros((stop - start, size), np.uint8)

    def fill(position):
      picture = split.image(position)
      _check_shape(picture.shape, shape, position)
      part[position - start] = picture.reshape(-1)

    with futures.ThreadPoolExecutor() as pool:
      list(pool.map(fill, range(start, min(stop, len(split)))))
    return part

  return jax.make_array_from_callback(
    (rows * mesh.size, size), mesh_lib.by_row(mesh), read
  )


def _check_shape(shape, expected, position):
  if shape != expected:
    raise ValueError(
      'config.dataset.on_device=True needs pictures of one size, and picture '
      f'{position} has {shape[1]} x {shape[0]} pixels where the first has '
      f'{expected[1]} x {expected[0]}: set config.dataset.resize_mode=square, '
      'or on_device=False.'
    )


def check_memory(num_bytes: int, devices: Sequence[jax.Device]) -> None:
  """Raises ValueError if a device has less left; some tell nothing."""
  for device in devices:
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
      left = stats['bytes_limit'] - stats.get('bytes_in_use', 0)
      if num_bytes > left:
        raise ValueError(
          f'The pictures need {num_bytes / 2**20:,.0f} MiB on each device '
          f'(config.dataset.on_device), and {device} has {left / 2**20:,.0f} '
          'MiB left: use more devices, smaller pictures '
          '(config.dataset.resize), or on_device=False.'
        )


def make_cut(
  mesh: jax.sharding.Mesh,
  *,
  height: int,
  width: int,
  image_size: int,
  padding: int,
) -> Callable[[jax.Array, dict[str, jax.Array]], jax.Array]:
  """Returns the jitted map from pictures and places to images.

  Its arguments are the pictures, uint8 [rows, height * width * 3], and
  {'top', 'left', 'id': int32 [batch], 'flip': bool [batch]}, all divided by
  rows; its result is uint8 [batch, image_size, image_size, 3], so as well.
  """

  def cut(part, place):
    """On one device: its pictures, and its rows of the batch."""
    place = jax.lax.all_gather(place, mesh_lib.AXIS, tiled=True)
    local = place['id'] - jax.lax.axis_index(mesh_lib.AXIS) * part.shape[0]
    # Rows of other devices are zeros, as the padding is.
    found = part.at[local].get(
      mode='fill', fill_value=0, wrap_negative_indices=False
    )
    found = found.reshape(-1, height, width, 3)
    sides = (padding, padding)
    found = jnp.pad(found, ((0, 0), sides, sides, (0, 0)))
    images = jax.vmap(
      lambda picture, top, left: jax.lax.dynamic_slice(
        picture, (top, left, 0), (image_size, image_size, 3)
      )
    )(found, place['top'], place['left'])
    flip = place['flip'][:, None, None, None]
    images = jnp.where(flip, images[:, :, ::-1], images)
    return jax.lax.psum_scatter(images, mesh_lib.AXIS, tiled=True)

  by_row = PartitionSpec(mesh_lib.AXIS)
  return jax.jit(
    jax.shard_map(cut, mesh=mesh, in_specs=(by_row, by_row), out_specs=by_row)
  )
