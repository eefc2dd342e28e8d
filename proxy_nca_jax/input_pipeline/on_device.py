"""Training images in device memory: crops are cut out there.

Images are rows of one array, uint8 [rows, height * width * 3], divided among
the devices of the mesh. The host sends only the position of each crop. Each
device gathers the positions of the whole batch, cuts the crops of its own
images, and contributes zeros for the others. A reduce-scatter adds the
contributions, of which at most one is not zero, and leaves each crop on the
device that trains on it. No device holds more than its part of the images, and
pixels are exact.
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
  """Puts a split's images on the devices, and returns how to cut batches.

  Args:
    split: the records to train on.
    mesh: the devices.
    image_size: side of the crop, in pixels.
    padding: black pixels added on each side before cropping.

  Returns:
    A function from this process's rows of a batch {'top', 'left', 'flip', 'id',
    ...} of `input_pipeline.train_batches` to the global batch, which has
    'image' instead of the first three.

  Raises:
    ValueError: if the images differ in size, or do not fit into memory.
  """
  images = put_images(split, mesh)
  height, width, _ = split.image(0).shape
  cut = make_cut(
    mesh, height=height, width=width, image_size=image_size, padding=padding
  )

  def prepare(batch):
    batch = mesh_lib.shard_batch(batch, mesh)
    crops = {name: batch.pop(name) for name in ('top', 'left', 'flip')}
    return batch | {'image': cut(images, crops | {'id': batch['id']})}

  return prepare


def put_images(split: Split, mesh: jax.sharding.Mesh) -> jax.Array:
  """Puts images on the devices, divided by rows.

  Each process reads the images of its own devices.

  Returns:
    uint8 [rows, height * width * 3], padded with rows of 0.

  Raises:
    ValueError: if the images differ in size, or do not fit into memory.
  """
  shape = split.image(0).shape
  size = math.prod(shape)
  rows = -(-len(split) // mesh.size)
  check_memory(rows * size, mesh.local_devices)
  _logger.info(
    'Putting %d images on the devices, %.0f MiB on each',
    len(split),
    rows * size / 2**20,
  )

  def read(index):
    start, stop, _ = index[0].indices(rows * mesh.size)
    part = np.zeros((stop - start, size), np.uint8)

    def fill(position):
      image = split.image(position)
      _check_shape(image.shape, shape, position)
      part[position - start] = image.reshape(-1)

    with futures.ThreadPoolExecutor() as pool:
      list(pool.map(fill, range(start, min(stop, len(split)))))
    return part

  return jax.make_array_from_callback(
    (rows * mesh.size, size), mesh_lib.by_row(mesh), read
  )


def _check_shape(shape, expected, position):
  if shape != expected:
    raise ValueError(
      'config.dataset.on_device=True needs images of one size, but image '
      f'{position} has {shape[1]} x {shape[0]} pixels and the first has '
      f'{expected[1]} x {expected[0]}: set config.dataset.resize_mode=square, '
      'or on_device=False.'
    )


def check_memory(num_bytes: int, devices: Sequence[jax.Device]) -> None:
  """Raises ValueError if a device that reports its memory has too little."""
  for device in devices:
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
      left = stats['bytes_limit'] - stats.get('bytes_in_use', 0)
      if num_bytes > left:
        raise ValueError(
          f'The images need {num_bytes / 2**20:,.0f} MiB on each device '
          f'(config.dataset.on_device), and {device} has {left / 2**20:,.0f} '
          'MiB left: use more devices, smaller images '
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
  """Returns the jitted function from images and crop positions to crops.

  Its arguments are the images, uint8 [rows, height * width * 3], and {'top',
  'left', 'id': int32 [batch], 'flip': bool [batch]}; its result is uint8
  [batch, image_size, image_size, 3]. All are divided by rows.
  """

  def cut(part, crops):
    """Runs on each device, with its images and its rows of the batch."""
    crops = jax.lax.all_gather(crops, mesh_lib.AXIS, tiled=True)
    num_images = part.shape[0]
    first = jax.lax.axis_index(mesh_lib.AXIS) * num_images

    def cut_one(crop):
      local = crop['id'] - first
      is_here = (local >= 0) & (local < num_images)
      image = jax.lax.dynamic_index_in_dim(
        part, jnp.clip(local, 0, num_images - 1), keepdims=False
      )
      image = jnp.pad(
        image.reshape(height, width, 3),
        ((padding,) * 2, (padding,) * 2, (0, 0)),
      )
      image = jax.lax.dynamic_slice(
        image, (crop['top'], crop['left'], 0), (image_size, image_size, 3)
      )
      image = jnp.where(crop['flip'], image[:, ::-1], image)
      return jnp.where(is_here, image, 0)

    # One at a time: for a gather of rows this long, TPUs copy all images.
    images = jax.lax.map(cut_one, crops)
    return jax.lax.psum_scatter(images, mesh_lib.AXIS, tiled=True)

  by_row = PartitionSpec(mesh_lib.AXIS)
  return jax.jit(
    jax.shard_map(cut, mesh=mesh, in_specs=(by_row, by_row), out_specs=by_row)
  )
