"""From records to batches: decoding, cropping, flipping, normalising.

A batch is {'image': uint8 [batch, height, width, 3], 'label': int32 [batch],
'mask': bool [batch], 'id': int32 [batch]}, `id` the record's index in its
split. The order of the records and each record's augmentation are functions of
the seed and the position in training: a step is all that a resumed run needs to
know. Each process reads its own rows of every global batch.
"""

import functools
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from proxy_nca_jax.datasets import Split

Batch = dict[str, np.ndarray]


def train_batches(
    split: Split,
    config: ml_collections.ConfigDict,
    *,
    first_step: int = 0,
    process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
  """Yields this process's rows of the batches from `first_step` on, endlessly.

  Close it in the end: it may hold worker processes.

  Args:
    split: the records, each seen once an epoch in an order of its own.
    config: of the run.
    first_step: steps that came before.
    process: this process's index and their number.
  """
  index, count = process
  read = functools.partial(_read_train, split, config.dataset)
  records = grain.MapDataset.range(len(split)).seed(config.seed)
  # As good as endless, and no index of a slice of it overflows.
  records = records.shuffle().repeat(2**40 // len(split)).random_map(read)
  batches = records.batch(config.batch_size // count)
  # Batch s of process p is the piece s * count + p of the record stream.
  batches = batches[first_step * count + index :: count]
  dataset = batches.to_iter_dataset(
    grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  )
  if config.dataset.num_workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=config.dataset.num_workers)
    )
  return iter(dataset)


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
    image = center_crop(split.picture(index), image_size)
    return _row(image, split.labels[index], position, is_record)

  num_batches = -(-len(split) // batch_size)
  records = grain.MapDataset.range(num_batches * batch_size).map(read)
  batches = records.batch(rows)[index::count]
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  return iter(batches.to_iter_dataset(options))


def _read_train(split, config, position, rng) -> Batch:
  image = split.picture(position)
  if config.crop == 'random':
    image = random_crop(image, config.image_size, config.padding, rng)
  elif config.crop == 'random_resized':
    image = random_resized_crop(
      image,
      config.image_size,
      scale=config.crop_scale,
      ratio=config.crop_ratio,
      rng=rng,
    )
  else:
    raise ValueError(f'Unknown crop {config.crop!r}.')
  if config.flip and rng.random() < 0.5:
    # Twice as fast as a copy of a view with negative strides.
    image = image.take(np.arange(image.shape[1])[::-1], axis=1)
  return _row(image, split.labels[position], position, True)


def _row(image, label, position, mask) -> Batch:
  return {
    'image': np.ascontiguousarray(image),
    'label': np.int32(label),
    'mask': np.bool_(mask),
    'id': np.int32(position),
  }


def random_crop(
    image: np.ndarray, size: int, padding: int, rng: np.random.Generator
) -> np.ndarray:
  """Crops a random square out of an image padded with black.

  Args:
    image: uint8 [height, width, 3], at least `size` with the padding.
    size: side of the square.
    padding: pixels added on each side.
    rng: of the place.

  Returns:
    uint8 [size, size, 3].
  """
  if padding:
    margin = ((padding, padding), (padding, padding), (0, 0))
    image = np.pad(image, margin)
  top = rng.integers(image.shape[0] - size + 1)
  left = rng.integers(image.shape[1] - size + 1)
  return image[top : top + size, left : left + size]


def random_resized_crop(
    image: np.ndarray,
    size: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
  """Crops a random rectangle and resizes it to a square.

  The area is uniform and the aspect log-uniform. A rectangle that does not fit
  is drawn again, up to ten times; then the largest central one of an allowed
  aspect is taken, as in torchvision's RandomResizedCrop.

  Args:
    image: uint8 [height, width, 3].
    size: side of the square.
    scale: least and largest area, as shares of the image's.
    ratio: least and largest width / height.
    rng: of the rectangle.

  Returns:
    uint8 [size, size, 3].
  """
  height, width = image.shape[:2]
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = np.exp(rng.uniform(*np.log(ratio)))
    crop_width = round(np.sqrt(area * aspect))
    crop_height = round(np.sqrt(area / aspect))
    if 1 <= crop_width <= width and 1 <= crop_height <= height:
      left = rng.integers(width - crop_width + 1)
      top = rng.integers(height - crop_height + 1)
      break
  else:
    crop_width = min(width, max(round(height * ratio[1]), 1))
    crop_height = min(height, max(round(width / ratio[0]), 1))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
  box = (left, top, left + crop_width, top + crop_height)
  picture = Image.fromarray(image).crop(box)
  return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
  """Crops the central square, uint8 [size, size, 3]."""
  top, left = ((side - size) // 2 for side in image.shape[:2])
  return image[top : top + size, left : left + size]


def check_image_size(split: Split, config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if the crop is larger than the stored pictures."""
  height, width = split.picture(0).shape[:2]
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
  for position in range(len(split)):
    image = Image.fromarray(split.picture(position))
    if image.size != (size, size):
      image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels[position] = np.asarray(image, np.float32).reshape(-1)
  norms = np.linalg.norm(pixels, axis=1, keepdims=True)
  return pixels / np.maximum(norms, 1)
