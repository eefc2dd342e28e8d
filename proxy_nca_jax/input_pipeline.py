"""From records to batches: sampling, augmentation, normalisation.

A batch is {'image': uint8 [batch, height, width, 3], 'label': int32 [batch],
'mask': bool [batch], 'id': int32 [batch]}, `id` the record's index in its
split. The order of the records and each record's augmentation are functions of
the seed and the position in training: a step is all that a resumed run needs to
know. Each process reads its own rows of every global batch.

With `config.dataset.on_device` a training batch holds, instead of images, where
to cut them out of the pictures that lie on the devices: see `device_data`.

Pictures are augmented as uint8 by Pillow. Crops and colours have the ranges and
distributions of torchvision's transforms of the same names, and its pixels.
"""

import functools
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from PIL import Image, ImageEnhance

from proxy_nca_jax.datasets import Split, images

Batch = dict[str, np.ndarray]

_ENHANCERS = (
  ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
)


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
    split: the records. Each is seen once an epoch in an order of its own, or as
      `balanced_position` draws them with `config.dataset.images_per_class`.
    config: of the run.
    first_step: steps that came before.
    process: this process's index and their number.
  """
  index, count = process
  if config.dataset.on_device:
    height, width = split.picture(0).shape[:2]
    read = functools.partial(_read_place, split, height, width, config.dataset)
  else:
    read = functools.partial(_read_train, split, config.dataset)
  records = _positions(split, config).random_map(read)
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


def _positions(split, config) -> grain.MapDataset:
  """Returns the stream of positions in the split, batch after batch."""
  # As good as endless, and no index of a slice of it overflows.
  length = 2**40
  if not config.dataset.images_per_class:
    positions = grain.MapDataset.range(len(split)).seed(config.seed)
    return positions.shuffle().repeat(length // len(split))
  sizes = np.bincount(split.labels, minlength=split.num_classes)
  members = np.split(
    np.argsort(split.labels, kind='stable'), np.cumsum(sizes)[:-1]
  )
  position = functools.partial(
    balanced_position,
    members=members,
    batch_size=config.batch_size,
    images_per_class=config.dataset.images_per_class,
    seed=config.seed,
  )
  return grain.MapDataset.range(length).seed(config.seed).map(position)


def balanced_position(
    index: int,
    *,
    members: list[np.ndarray],
    batch_size: int,
    images_per_class: int,
    seed: int,
) -> int:
  """Returns the record at a place of the stream of class-balanced batches.

  A batch has `batch_size / images_per_class` classes and `images_per_class`
  images of each, as ProxyNCA++ samples (https://arxiv.org/abs/2004.01113). All
  classes take their turn in a random order, and so do the images of a class; a
  rest of an order too small for a batch is left out, another each time. An
  image comes twice in a batch only if its class has too few.

  Args:
    index: of the record, in [step * batch_size, (step + 1) * batch_size).
    members: the records of each class, int [num_images].
    batch_size: divisible by `images_per_class`.
    images_per_class: K, positive.
    seed: of the orders.
  """
  step, slot = divmod(int(index), batch_size)
  num_classes = batch_size // images_per_class
  classes, turn = _draw(
    step, size=num_classes, total=len(members), key=(seed, 0)
  )
  label = int(classes[slot // images_per_class])
  # A class is drawn at most once in a turn of all classes.
  positions, _ = _draw(
    turn,
    size=images_per_class,
    total=len(members[label]),
    key=(seed, 1 + label),
  )
  return int(members[label][positions[slot % images_per_class]])


def _draw(number, *, size, total, key) -> tuple[np.ndarray, int]:
  """Returns the `number`-th draw of `size` out of `total`, and its turn.

  The draws of a turn are disjoint; with a small total they wrap around.
  """
  turn, place = divmod(number, max(total // size, 1))
  order = _permutation(*key, turn, total)
  chosen = np.arange(place * size, (place + 1) * size)
  return order.take(chosen, mode='wrap'), turn


@functools.lru_cache(maxsize=1024)
def _permutation(seed, stream, turn, total) -> np.ndarray:
  return np.random.default_rng((seed, stream, turn)).permutation(total)


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
    top, left, is_flipped = _draw_place(*image.shape[:2], config, rng)
    image = crop(image, top, left, config.image_size, config.padding)
  elif config.crop == 'random_resized':
    image = random_resized_crop(
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
    image = color_jitter(image, config.color_jitter, rng)
  if config.erasing and rng.random() < config.erasing:
    image = random_erasing(image, rng)
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


def crop(
    image: np.ndarray, top: int, left: int, size: int, padding: int
) -> np.ndarray:
  """Crops a square out of an image padded with black.

  Args:
    image: uint8 [height, width, 3], at least `size` with the padding.
    top: first row, of the padded image.
    left: first column, of the padded image.
    size: side of the square.
    padding: pixels added on each side.

  Returns:
    uint8 [size, size, 3].
  """
  if not padding:
    return image[top : top + size, left : left + size]
  # np.pad took eight times as long.
  square = np.zeros((size, size, 3), np.uint8)
  top, left = top - padding, left - padding
  seen = image[max(top, 0) : top + size, max(left, 0) : left + size]
  below, right = max(-top, 0), max(-left, 0)
  square[below : below + seen.shape[0], right : right + seen.shape[1]] = seen
  return square


def random_resized_crop(
    image: np.ndarray,
    size: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
    interpolation: str = 'bilinear',
) -> np.ndarray:
  """Crops a random rectangle and resizes it to a square.

  The area is uniform and the aspect log-uniform. If ten rectangles do not fit,
  the largest central one of an allowed aspect is taken, as in torchvision's
  RandomResizedCrop.

  Args:
    image: uint8 [height, width, 3].
    size: side of the square.
    scale: least and largest area, as shares of the image's.
    ratio: least and largest width / height.
    rng: of the rectangle.
    interpolation: 'bilinear' or 'bicubic', averaging when it shrinks.

  Returns:
    uint8 [size, size, 3].
  """
  height, width = image.shape[:2]
  box = _random_box(height, width, scale=scale, ratio=ratio, rng=rng)
  if box is None:
    crop_width = min(width, max(round(height * ratio[1]), 1))
    crop_height = min(height, max(round(width / ratio[0]), 1))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    box = (left, top, left + crop_width, top + crop_height)
  picture = Image.fromarray(image).crop(box)
  return np.asarray(picture.resize((size, size), images.FILTERS[interpolation]))


def _random_box(
    height, width, *, scale, ratio, rng
) -> tuple[int, int, int, int] | None:
  """Draws (left, top, right, bottom); None if ten boxes do not fit."""
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = np.exp(rng.uniform(*np.log(ratio)))
    box_width = round(np.sqrt(area * aspect))
    box_height = round(np.sqrt(area / aspect))
    if 1 <= box_width <= width and 1 <= box_height <= height:
      left = rng.integers(width - box_width + 1)
      top = rng.integers(height - box_height + 1)
      return left, top, left + box_width, top + box_height
  return None


def color_jitter(
    image: np.ndarray,
    strengths: tuple[float, float, float, float],
    rng: np.random.Generator,
) -> np.ndarray:
  """Changes brightness, contrast, saturation and hue, in a random order.

  As torchvision's ColorJitter on a Pillow image: the first three are multiplied
  by a factor from [max(0, 1 - strength), 1 + strength], and hue turns by a
  share of the circle from [-strength, strength].

  Args:
    image: uint8 [height, width, 3].
    strengths: of brightness, contrast, saturation and hue; 0 leaves one out.
    rng: of the order and the factors.

  Returns:
    uint8 [height, width, 3].
  """
  picture = Image.fromarray(image)
  for kind in rng.permutation(4):
    strength = strengths[kind]
    if not strength:
      continue
    if kind == 3:
      picture = _turn_hue(picture, rng.uniform(-strength, strength))
    else:
      factor = rng.uniform(max(0, 1 - strength), 1 + strength)
      picture = _ENHANCERS[kind](picture).enhance(factor)
  return np.asarray(picture)


def _turn_hue(picture: Image.Image, share: float) -> Image.Image:
  hue, saturation, value = picture.convert('HSV').split()
  # 256 hues are the circle, and torchvision turns by 255 times the share.
  hue = hue.point([(i + int(share * 255)) % 256 for i in range(256)])
  return Image.merge('HSV', (hue, saturation, value)).convert('RGB')


def random_erasing(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (1 / 3.3, 1 / 0.3),
) -> np.ndarray:
  """Fills a random rectangle with random pixels.

  Zhong et al., https://arxiv.org/abs/1708.04896: pixels are uniform in 0..255.
  The ranges are the defaults of torchvision's RandomErasing, whose ratio is of
  height to width. If ten rectangles do not fit, nothing is erased.

  Args:
    image: uint8 [height, width, 3].
    rng: of the rectangle and its pixels.
    scale: least and largest area, as shares of the image's.
    ratio: least and largest width / height.

  Returns:
    uint8 [height, width, 3], another array.
  """
  height, width = image.shape[:2]
  image = image.copy()
  box = _random_box(height, width, scale=scale, ratio=ratio, rng=rng)
  if box is not None:
    left, top, right, bottom = box
    image[top:bottom, left:right] = rng.integers(
      256, size=(bottom - top, right - left, 3), dtype=np.uint8
    )
  return image


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
  for position in tqdm.trange(
    len(split), desc='raw pixels', disable=None, leave=False, delay=1
  ):
    image = Image.fromarray(split.picture(position))
    if image.size != (size, size):
      image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels[position] = np.asarray(image, np.float32).reshape(-1)
  norms = np.linalg.norm(pixels, axis=1, keepdims=True)
  return pixels / np.maximum(norms, 1)
