"""From records to batches of images, augmented for training.

A training batch is {'image': uint8 [batch, height, width, 3], 'label': int32
[batch], 'id': int32 [batch]}, `id` the index of the record in its split. An
evaluation batch has 'mask': bool [batch] too, False for padding, and so has a
training batch that the devices cannot divide evenly. Of a split of
vectors, 'image' is float32 [batch, dim]: they are neither cropped nor flipped,
and gathered for a whole batch at a time.

The order of the records and the augmentation of each are functions of the seed
and the position in training: a resumed run needs only its step. Each process
reads its own rows of every global batch.

With `config.dataset.on_device` a training batch holds the position of each crop
instead of the image: see `on_device`.
"""

import functools
from collections.abc import Generator, Iterator

import grain
import ml_collections
import numpy as np
import tqdm
from PIL import Image

from proxy_nca_jax import blocked, images
from proxy_nca_jax.datasets import Split
from proxy_nca_jax.input_pipeline import sampling, workers

Batch = dict[str, np.ndarray]


def train_batches(
  split: Split,
  config: ml_collections.ConfigDict,
  *,
  first_step: int = 0,
  process: tuple[int, int] = (0, 1),
  num_devices: int = 1,
) -> grain.DatasetIterator | Generator[Batch, None, None]:
  """Yields this process's rows of the batches from `first_step` on, endlessly.

  The records of a step do not depend on processes and devices: a batch that
  these cannot divide evenly is padded at its end. Close the iterator: it may
  hold worker processes.

  Args:
    split: the records. Each epoch visits every record once, in a new random
      order; with `config.dataset.images_per_class` records are drawn as in
      `sampling.balanced_position`.
    config: the run's config.
    first_step: number of steps already taken.
    process: the index of this process, and the number of processes.
    num_devices: of all processes.
  """
  index, count = process
  rows = blocked.round_up(config.batch_size, max(num_devices, count)) // count
  slots = np.arange(index * rows, (index + 1) * rows)
  is_record = slots < config.batch_size
  # Padding repeats the last record: its pixels and its label are valid.
  slots = np.minimum(slots, config.batch_size - 1)
  if split.vectors is not None:
    batches = sampling.batch_positions(split, config, slots).map(
      functools.partial(_read_vectors, split)
    )
  else:
    batches = sampling.batches(_read_records(split, config), config, slots)
  if rows * count > config.batch_size:
    batches = batches.map(lambda batch: batch | {'mask': is_record})
  dataset = batches[first_step:].to_iter_dataset(
    grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  )
  if not config.dataset.num_workers:
    return iter(dataset)
  dataset = dataset.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=config.dataset.num_workers),
    worker_init_fn=workers.end_with_run,
  )
  return workers.read_in_processes(iter(dataset))


def _read_records(split, config) -> grain.MapDataset:
  """Returns the endless stream of training rows with images."""
  if config.dataset.on_device:
    height, width = split.image(0).shape[:2]
    read = functools.partial(_read_crop, split, height, width, config.dataset)
  else:
    read = functools.partial(_read_train, split, config.dataset)
  return sampling.positions(split, config).random_map(read)


def evaluation_batches(
  split: Split,
  *,
  image_size: int,
  batch_size: int,
  process: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
  """Yields this process's rows of the batches of a split, once, in order.

  The last batch is padded with rows whose mask is False.

  Args:
    split: the records.
    image_size: side of the central crop, in pixels.
    batch_size: rows of a batch over all processes.
    process: the index of this process, and the number of processes.
  """
  index, count = process
  rows = batch_size // count

  def read(position):
    is_record = position < len(split)
    index = position if is_record else len(split) - 1
    image = images.center_crop(split.image(index), image_size)
    row = _row(image, split.labels[index], position)
    return row | {'mask': np.bool_(is_record)}

  def read_vectors(piece):
    positions = np.arange(piece * rows, (piece + 1) * rows)
    is_record = positions < len(split)
    batch = _read_vectors(split, np.minimum(positions, len(split) - 1))
    return batch | {'id': np.int32(positions), 'mask': is_record}

  num_batches = -(-len(split) // batch_size)
  if split.vectors is not None:
    batches = grain.MapDataset.range(num_batches * count).map(read_vectors)
  else:
    records = grain.MapDataset.range(num_batches * batch_size).map(read)
    batches = records.batch(rows)
  batches = batches[index::count]
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  return iter(batches.to_iter_dataset(options))


def _read_vectors(split, positions) -> Batch:
  return {
    'image': split.vectors[positions],
    'label': split.labels[positions],
    'id': positions.astype(np.int32),
  }


def _read_train(split, config, position, rng) -> Batch:
  image = split.image(position)
  if config.crop == 'random':
    top, left, is_flipped = _draw_crop(*image.shape[:2], config, rng)
    image = images.crop(image, top, left, config.image_size, config.padding)
  else:
    image = images.random_resized_crop(
      image,
      config.image_size,
      scale=config.crop_scale,
      ratio=config.crop_ratio,
      interpolation=config.interpolation,
      rng=rng,
    )
    is_flipped = _draw_flip(config, rng)
  if is_flipped:
    # Twice as fast as copying a view with a negative stride.
    image = image.take(np.arange(image.shape[1])[::-1], axis=1)
  if any(config.color_jitter):
    image = images.color_jitter(image, config.color_jitter, rng)
  if config.erasing and rng.random() < config.erasing:
    image = images.random_erasing(image, rng)
  return _row(image, split.labels[position], position)


def _read_crop(split, height, width, config, position, rng) -> Batch:
  """The row of `_read_train` with the position of the crop, not its pixels."""
  top, left, is_flipped = _draw_crop(height, width, config, rng)
  return {
    'top': np.int32(top),
    'left': np.int32(left),
    'flip': np.bool_(is_flipped),
    'label': np.int32(split.labels[position]),
    'id': np.int32(position),
  }


def _draw_crop(height, width, config, rng) -> tuple[int, int, bool]:
  """Draws the top left corner of a crop of the padded image, and a flip.

  Both kinds of batches take these draws, so that their pixels are equal.
  """
  height, width = height + 2 * config.padding, width + 2 * config.padding
  top = rng.integers(height - config.image_size + 1)
  left = rng.integers(width - config.image_size + 1)
  return top, left, _draw_flip(config, rng)


def _draw_flip(config, rng) -> bool:
  return config.flip and rng.random() < 0.5


def _row(image, label, position) -> Batch:
  return {
    'image': np.ascontiguousarray(image),
    'label': np.int32(label),
    'id': np.int32(position),
  }


def check_splits(
  config: ml_collections.ConfigDict, train: Split, test: Split
) -> None:
  """Raises ValueError if batches cannot be drawn from the splits.

  Args:
    config: the run's config.
    train: the records to train on.
    test: the records to score.
  """
  if test.vectors is None:
    _check_size(config.dataset.image_size, test.image(0).shape)
  per_class = config.dataset.images_per_class
  if per_class and config.batch_size // per_class > train.num_classes:
    raise ValueError(
      f'A batch of {config.batch_size} with {per_class} images per class needs '
      f'{config.batch_size // per_class} classes, but there are '
      f'{train.num_classes} to train on: lower config.batch_size, or raise '
      'config.dataset.images_per_class.'
    )


def _check_size(size: int, shape: tuple[int, ...]) -> None:
  height, width = shape[:2]
  if size > min(width, height):
    raise ValueError(
      f'config.dataset.image_size ({size}) must be in [1, '
      f'{min(width, height)}]: it crops images of {width} x {height} pixels.'
    )


def raw_pixels(split: Split, *, size: int = 32) -> np.ndarray:
  """Returns each image, shrunk to size x size, as a vector of unit norm.

  Images are read one at a time: memory holds only the result. A black image
  gives a vector of 0.

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
