"""From records to batches: sampling, augmentation, normalisation.

A batch is {'image': uint8 [batch, height, width, 3], 'label': int32 [batch],
'mask': bool [batch], 'id': int32 [batch]}, `id` the record's index in its
split. The order of the records and each record's augmentation are functions of
the seed and the position in training: a step is all that a resumed run needs to
know. Each process reads its own rows of every global batch.

With `config.dataset.on_device` a training batch holds, instead of images, where
to cut them out of the pictures that lie on the devices: see `device_data`.
"""

import functools
from collections.abc import Generator, Iterator

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from PIL import Image

from proxy_nca_jax import images
from proxy_nca_jax.datasets import Split
from proxy_nca_jax.input_pipeline import sampling, workers

Batch = dict[str, np.ndarray]


def train_batches(
  split: Split,
  config: ml_collections.ConfigDict,
  *,
  first_step: int = 0,
  process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator | Generator[Batch, None, None]:
  """Yields this process's rows of the batches from `first_step` on, endlessly.

  Close it in the end: it may hold worker processes.

  Args:
    split: the records. Each is seen once an epoch in an order of its own, or as
      `balanced_position` draws them with `config.dataset.images_per_class`.
    config: of the run.
    first_step: steps that came before.
    process: this process's index and their number.
  """
  index, count = process
  if config.dataset.on_device:
    height, width = split.image(0).shape[:2]
    read = functools.partial(_read_place, split, height, width, config.dataset)
  else:
    read = functools.partial(_read_train, split, config.dataset)
  records = sampling.positions(split, config).random_map(read)
  batches = records.batch(config.batch_size // count)
  # Batch s of process p is the piece s * count + p of the record stream.
  batches = batches[first_step * count + index :: count]
  dataset = batches.to_iter_dataset(
    grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  )
  if not config.dataset.num_workers:
    return iter(dataset)
  dataset = dataset.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=config.dataset.num_workers),
    worker_init_fn=workers.end_with_run,
  )
  return workers.read_in_processes(iter(dataset))


def check_train_batches(
  split: Split, config: ml_collections.ConfigDict
) -> None:
  """Raises ValueError if the batches cannot be drawn or augmented so."""
  fields = config.dataset
  each = fields.images_per_class
  if each < 0 or (each and config.batch_size % each):
    raise ValueError(
      f'config.batch_size ({config.batch_size}) must be divisible by '
      f'config.dataset.images_per_class ({each}); 0 draws from any class.'
    )
  if each and config.batch_size // each > split.num_classes:
    raise ValueError(
      f'A batch of {config.batch_size} with {each} images of a class needs '
      f'{config.batch_size // each} classes, and {split.num_classes} are '
      'trained on: lower config.batch_size, or raise '
      'config.dataset.images_per_class.'
    )
  jitter = fields.color_jitter
  if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
    raise ValueError(
      f'config.dataset.color_jitter ({jitter}) must be four numbers, of '
      'brightness, contrast, saturation and hue, not negative; hue at most 0.5.'
    )
  if not 0 <= fields.erasing <= 1:
    raise ValueError(
      f'config.dataset.erasing ({fields.erasing}) must be in [0, 1].'
    )
  if fields.on_device and (
    fields.crop != 'random' or any(jitter) or fields.erasing
  ):
    raise ValueError(
      'config.dataset.on_device=True crops, pads and flips on the device, and '
      f'nothing else; crop={fields.crop}, color_jitter={jitter} and '
      f'erasing={fields.erasing} were given. Set crop=random, color_jitter to '
      'zeros and erasing=0, or on_device=False.'
    )


def evaluation_batches(
  split: Split,
  *,
  image_size: int,
  batch_size: int,
  process: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
  """Yields this process's rows of every batch of the split, once, in order.

  The last batch is filled up with rows whose mask is False.

  Args:
    split: the records.
    image_size: side of the central crop, in pixels.
    batch_size: of all processes together.
    process: this process's index and their number.
  """
  index, count = process
  rows = batch_size // count

  def read(position):
    is_record = position < len(split)
    index = position if is_record else len(split) - 1
    image = images.center_crop(split.image(index), image_size)
    return _row(image, split.labels[index], position, is_record)

  num_batches = -(-len(split) // batch_size)
  records = grain.MapDataset.range(num_batches * batch_size).map(read)
  batches = records.batch(rows)[index::count]
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  return iter(batches.to_iter_dataset(options))


def _read_train(split, config, position, rng) -> Batch:
  image = split.image(position)
  if config.crop == 'random':
    top, left, is_flipped = _draw_place(*image.shape[:2], config, rng)
    image = images.crop(image, top, left, config.image_size, config.padding)
  elif config.crop == 'random_resized':
    image = images.random_resized_crop(
      image,
      config.image_size,
      scale=config.crop_scale,
      ratio=config.crop_ratio,
      interpolation=config.interpolation,
      rng=rng,
    )
    is_flipped = _draw_flip(config, rng)
  else:
    raise ValueError(f'Unknown crop {config.crop!r}.')
  if is_flipped:
    # Twice as fast as a copy of a view with negative strides.
    image = image.take(np.arange(image.shape[1])[::-1], axis=1)
  if any(config.color_jitter):
    image = images.color_jitter(image, config.color_jitter, rng)
  if config.erasing and rng.random() < config.erasing:
    image = images.random_erasing(image, rng)
  return _row(image, split.labels[position], position, True)


def _read_place(split, height, width, config, position, rng) -> Batch:
  """The row of `_read_train`, with what it draws instead of the image."""
  top, left, is_flipped = _draw_place(height, width, config, rng)
  return {
    'top': np.int32(top),
    'left': np.int32(left),
    'flip': np.bool_(is_flipped),
    'label': np.int32(split.labels[position]),
    'mask': np.bool_(True),
    'id': np.int32(position),
  }


def _draw_place(height, width, config, rng) -> tuple[int, int, bool]:
  """Draws a square of a padded picture, and whether to mirror it.

  Host and device share these draws, so that their batches are the same.
  """
  height, width = height + 2 * config.padding, width + 2 * config.padding
  top = rng.integers(height - config.image_size + 1)
  left = rng.integers(width - config.image_size + 1)
  return top, left, _draw_flip(config, rng)


def _draw_flip(config, rng) -> bool:
  return config.flip and rng.random() < 0.5


def _row(image, label, position, mask) -> Batch:
  return {
    'image': np.ascontiguousarray(image),
    'label': np.int32(label),
    'mask': np.bool_(mask),
    'id': np.int32(position),
  }


def check_image_size(split: Split, config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if the crop is larger than the stored pictures."""
  height, width = split.image(0).shape[:2]
  if not 1 <= config.image_size <= min(width, height):
    raise ValueError(
      f'config.dataset.image_size ({config.image_size}) must be in [1, '
      f'{min(width, height)}]: pictures of {width} x {height} pixels are '
      'cropped.'
    )
  if config.padding < 0:
    raise ValueError(
      f'config.dataset.padding ({config.padding}) must not be negative.'
    )


def normalize(
  images_: jax.Array,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  is_bgr: bool = False,
) -> jax.Array:
  """Maps RGB uint8 [..., 3] to float32 (x - mean) / std, on the device.

  With `is_bgr` blue comes first in the result, and in `mean` and `std`.
  """
  if is_bgr:
    images_ = images_[..., ::-1]
  mean, std = jnp.asarray(mean), jnp.asarray(std)
  shape = (1,) * (images_.ndim - 1) + (3,)
  return (images_ - mean.reshape(shape)) / std.reshape(shape)


def raw_pixels(split: Split, *, size: int = 32) -> np.ndarray:
  """Returns each image at 32 x 32 x 3 as a vector of unit norm.

  Reads and shrinks one image at a time: no full-size matrix is held. An image
  that is all black stays 0.

  Returns:
    float32 [num_records, size * size * 3].
  """
  pixels = np.empty((len(split), size * size * 3), np.float32)
  for position in tqdm.trange(
    len(split), desc='raw pixels', disable=None, leave=False, delay=1
  ):
    image = Image.fromarray(split.image(position))
    if image.size != (size, size):
      image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels[position] = np.asarray(image, np.float32).reshape(-1)
  norms = np.linalg.norm(pixels, axis=1, keepdims=True)
  return pixels / np.maximum(norms, 1)
