"""Operations on one image: decode, resize, crop, augment.

Crops and color jitter have the ranges and distributions of torchvision's
transforms of the same names, and its pixels.
"""

import io

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from proxy_nca_jax.runtime import errors

FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
}
_ENHANCERS = (
  ImageEnhance.Brightness,
  ImageEnhance.Contrast,
  ImageEnhance.Color,
)


def decode(encoded: bytes, *, upright: bool = True) -> Image.Image:
  """Decodes a picture as a person would see it: upright, RGB, 8 bits.

  Transparency is laid on white, 16-bit gray is scaled to 8 bits, and of an
  animation the first frame is taken.

  Args:
    encoded: the bytes of a file, in any format that Pillow reads.
    upright: whether to apply EXIF rotation.

  Returns:
    A Pillow image of mode RGB.

  Raises:
    ValueError: if the bytes are no picture, or not a whole one.
  """
  if not encoded:
    raise ValueError('the file is empty')
  try:
    with Image.open(io.BytesIO(encoded)) as image:
      image.load()
      return as_rgb(image, upright=upright)
  # Pillow's decoders raise these, and SyntaxError (PNG), for broken files.
  except (
    OSError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    Image.DecompressionBombError,
  ) as error:
    if isinstance(error, Image.UnidentifiedImageError):
      raise ValueError('not a picture') from error
    raise ValueError(errors.one_line(error)) from error


def as_rgb(image: Image.Image, *, upright: bool = True) -> Image.Image:
  """Returns a Pillow image of any mode as `decode` returns it.

  Raises:
    ValueError: if its pixels have no known range.
  """
  if upright:
    image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I') or image.mode == 'F':
    return _deep_gray_to_rgb(image)
  if 'A' in image.getbands() or 'transparency' in image.info:
    image = image.convert('RGBA')
    background = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(background, image).convert('RGB')
  return image.convert('RGB')


def _deep_gray_to_rgb(image: Image.Image) -> Image.Image:
  """Scales 16-bit gray to 8; Pillow's own conversion clips at 255."""
  pixels = np.asarray(image)
  if image.mode == 'F' or pixels.min() < 0 or pixels.max() > 65535:
    raise ValueError(f'pixels of mode {image.mode} have no known range')
  return Image.fromarray((pixels // 257).astype(np.uint8)).convert('RGB')


def resize(
  image: Image.Image, *, side: int, mode: str, interpolation: str = 'bilinear'
) -> Image.Image:
  """Resizes with a filter of Pillow's, which averages when it shrinks.

  Args:
    image: a Pillow image.
    side: in pixels; 0 leaves the image as it is.
    mode: 'square', which changes the aspect, or 'shorter' for the shorter
      side, which keeps it (the longer is rounded down, as in torchvision).
    interpolation: 'bilinear' or 'bicubic'.

  Returns:
    A Pillow image.

  Raises:
    ValueError: if the mode or the interpolation is unknown.
  """
  if interpolation not in FILTERS:
    raise ValueError(
      f'Unknown config.dataset.interpolation {interpolation!r}: choose '
      f'{" or ".join(FILTERS)}.'
    )
  if mode == 'square':
    size = (side, side)
  elif mode == 'shorter':
    shorter = min(image.size)
    size = tuple(side * length // shorter for length in image.size)
  else:
    raise ValueError(
      f'Unknown config.dataset.resize_mode {mode!r}: choose square or shorter.'
    )
  if not side or size == image.size:
    return image
  return image.resize(size, FILTERS[interpolation])


def encode_png(image: Image.Image) -> bytes:
  """Encodes without loss; level 1 is quick, and records are small already."""
  buffer = io.BytesIO()
  image.save(buffer, 'PNG', compress_level=1)
  return buffer.getvalue()


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
  return np.asarray(picture.resize((size, size), FILTERS[interpolation]))


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
