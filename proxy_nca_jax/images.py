"""Operations on one image: decode, resize, crop, augment.

Crops and color jitter match the torchvision transforms of the same
names: in their distributions and, for the same random values, in their pixels.
"""

import contextlib
import functools
import io
import math
import threading
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageEnhance

from proxy_nca_jax.runtime import errors, folders

FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
}
# Formats that Pillow decodes within the process. For EPS and WMF it would start
# Ghostscript or Windows on the content of an untrusted file.
FORMATS = (
  'AVIF',
  'BMP',
  'DDS',
  'DIB',
  'GIF',
  'ICNS',
  'ICO',
  'JPEG',
  'JPEG2000',
  'MPO',
  'PCX',
  'PNG',
  'PPM',
  'QOI',
  'SGI',
  'TGA',
  'TIFF',
  'WEBP',
)
# Pixels of the largest image that is decoded: 256 MiB in RGB, and the size from
# which Pillow warns of decompression bombs. Resized images are limited as well.
MAX_PIXELS = 2**28 // 3
# Images of more pixels than this are decoded one at a time, since conversions
# of an image at `MAX_PIXELS` take more than a gigabyte.
_LARGE_PIXELS = 2**24
_one_large_image = threading.Lock()
# Largest ratio of the sides of an image that 'shorter' resizes. At 64 and 256
# pixels, that is an image of 4 million pixels.
_MAX_ASPECT_RATIO = 64
# https://exiftool.org/TagNames/EXIF.html
_ORIENTATIONS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# Attempts to sample a rectangle inside the image, as in torchvision.
_MAX_ATTEMPTS = 10
_ENHANCERS = (
  ImageEnhance.Brightness,
  ImageEnhance.Contrast,
  ImageEnhance.Color,
)


def decode(encoded: bytes, *, upright: bool = True) -> Image.Image:
  """Decodes an image as a viewer shows it: upright, in 8-bit RGB.

  Transparency is composited on white, 16-bit grayscale is scaled to 8 bits, and
  animations are reduced to their first frame.

  Args:
    encoded: the bytes of a file, in one of `FORMATS`.
    upright: whether to apply the EXIF rotation.

  Returns:
    A Pillow image of mode RGB.

  Raises:
    ValueError: if the bytes are not an image, are damaged or truncated, or have
      more than `MAX_PIXELS` pixels, which is checked before they are decoded.
  """
  if not encoded:
    raise ValueError('the file is empty')
  folders.check_lfs(encoded)
  with _decoder_errors():
    with Image.open(io.BytesIO(encoded), formats=_formats()) as image:
      num_pixels = math.prod(image.size)
      if num_pixels > MAX_PIXELS:
        raise ValueError(
          f'{image.width} x {image.height} pixels exceed the limit of '
          f'{MAX_PIXELS:,}'
        )
      is_large = num_pixels > _LARGE_PIXELS
      with _one_large_image if is_large else contextlib.nullcontext():
        return as_rgb(image, upright=upright)


@contextlib.contextmanager
def _decoder_errors() -> Iterator[None]:
  """Turns whatever Pillow raises for a broken file into ValueError."""
  try:
    yield
  except Image.UnidentifiedImageError as error:
    raise ValueError('not an image in a supported format') from error
  # From AttributeError and struct.error to MemoryError.
  except Exception as error:
    raise ValueError(errors.one_line(error)) from error


@functools.cache
def _formats() -> tuple[str, ...]:
  """Returns the `FORMATS` that the installed Pillow has."""
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


def as_rgb(image: Image.Image, *, upright: bool = True) -> Image.Image:
  """Converts a Pillow image of any mode as `decode` does.

  Raises:
    ValueError: if it cannot be decoded, or the range of its pixels is unknown.
  """
  with _decoder_errors():
    image.load()
    if upright:
      image = _rotate_upright(image)
    if image.mode.startswith('I') or image.mode == 'F':
      return _deep_gray_to_rgb(image)
    if 'A' in image.getbands() or 'transparency' in image.info:
      image = image.convert('RGBA')
      background = Image.new('RGBA', image.size, 'white')
      return Image.alpha_composite(background, image).convert('RGB')
    return image.convert('RGB')


def _rotate_upright(image: Image.Image) -> Image.Image:
  """Applies the EXIF rotation; ignores EXIF data that cannot be read.

  ImageOps.exif_transpose also rewrites the EXIF data, and so fails for an image
  with whole pixels and another broken tag.
  """
  try:
    method = _ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation))
  except Exception:  # Pillow's parser raises all kinds of errors.
    method = None
  return image if method is None else image.transpose(method)


def _deep_gray_to_rgb(image: Image.Image) -> Image.Image:
  """Scales 16-bit grayscale to 8 bits; Pillow's conversion clips at 255."""
  pixels = np.asarray(image)
  if image.mode == 'F' or pixels.min() < 0 or pixels.max() > 65535:
    raise ValueError(
      f'the range of its pixels, of mode {image.mode}, is unknown'
    )
  return Image.fromarray((pixels // 257).astype(np.uint8)).convert('RGB')


def resize(
  image: Image.Image, *, side: int, mode: str, interpolation: str = 'bilinear'
) -> Image.Image:
  """Resizes with a Pillow filter, antialiased when it shrinks.

  Args:
    image: a Pillow image.
    side: target side in pixels; 0 returns the image unchanged.
    mode: 'square' resizes both sides to `side`, which changes the aspect ratio;
      'shorter' resizes the shorter side and keeps the aspect ratio, rounding
      the longer side down, as in torchvision.
    interpolation: 'bilinear' or 'bicubic'.

  Returns:
    A Pillow image.

  Raises:
    ValueError: if the mode or the interpolation is unknown, or if the result
      would have a side 64 times as long as the other one, or more than
      `MAX_PIXELS` pixels.
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
    if max(size) > _MAX_ASPECT_RATIO * side or math.prod(size) > MAX_PIXELS:
      raise ValueError(
        f'{image.width} x {image.height} pixels would be resized to '
        f'{size[0]} x {size[1]}, which exceeds the limits of 1:'
        f'{_MAX_ASPECT_RATIO} and of {MAX_PIXELS:,} pixels'
      )
  else:
    raise ValueError(
      f'Unknown config.dataset.resize_mode {mode!r}: choose square or shorter.'
    )
  if not side or size == image.size:
    return image
  return image.resize(size, FILTERS[interpolation])


def encode_png(image: Image.Image) -> bytes:
  """Encodes losslessly, at compression level 1 for speed."""
  buffer = io.BytesIO()
  image.save(buffer, 'PNG', compress_level=1)
  return buffer.getvalue()


def crop(
  image: np.ndarray, top: int, left: int, size: int, padding: int
) -> np.ndarray:
  """Crops a square from an image padded with black.

  Args:
    image: uint8 [height, width, 3], with padding at least `size` on each side.
    top: first row of the crop in the padded image.
    left: first column of the crop in the padded image.
    size: side of the crop in pixels.
    padding: pixels of padding on each side.

  Returns:
    uint8 [size, size, 3].
  """
  if not padding:
    return image[top : top + size, left : left + size]
  # np.pad of the whole image takes eight times as long.
  square = np.zeros((size, size, 3), np.uint8)
  top, left = top - padding, left - padding
  inside = image[max(top, 0) : top + size, max(left, 0) : left + size]
  height, width = inside.shape[:2]
  top, left = max(-top, 0), max(-left, 0)
  square[top : top + height, left : left + width] = inside
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

  As torchvision's RandomResizedCrop: the area is uniform and the aspect ratio
  log-uniform; if ten random rectangles do not fit into the image, the largest
  central one with an allowed aspect ratio is used.

  Args:
    image: uint8 [height, width, 3].
    size: side of the result in pixels.
    scale: smallest and largest area, as fractions of the image's area.
    ratio: smallest and largest aspect ratio, width / height.
    rng: random number generator.
    interpolation: 'bilinear' or 'bicubic', antialiased when it shrinks.

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
  cropped = Image.fromarray(image).crop(box)
  return np.asarray(cropped.resize((size, size), FILTERS[interpolation]))


def _random_box(
  height, width, *, scale, ratio, rng
) -> tuple[int, int, int, int] | None:
  """Samples (left, top, right, bottom); None if ten samples do not fit."""
  for _ in range(_MAX_ATTEMPTS):
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
  """Changes brightness, contrast, saturation and hue in a random order.

  As torchvision's ColorJitter on a Pillow image: the first three are multiplied
  by a uniform factor in [max(0, 1 - strength), 1 + strength]; the hue is
  rotated by a uniform fraction of the color circle in [-strength, strength].

  Args:
    image: uint8 [height, width, 3].
    strengths: strengths for brightness, contrast, saturation and hue; 0 leaves
      a property unchanged.
    rng: random number generator.

  Returns:
    uint8 [height, width, 3].
  """
  jittered = Image.fromarray(image)
  for kind in rng.permutation(4):
    strength = strengths[kind]
    if not strength:
      continue
    if kind == 3:
      jittered = _rotate_hue(jittered, rng.uniform(-strength, strength))
    else:
      factor = rng.uniform(max(0, 1 - strength), 1 + strength)
      jittered = _ENHANCERS[kind](jittered).enhance(factor)
  return np.asarray(jittered)


def _rotate_hue(image: Image.Image, fraction: float) -> Image.Image:
  hue, saturation, value = image.convert('HSV').split()
  # The circle has 256 hues, but torchvision rotates by 255 times the fraction.
  hue = hue.point([(i + int(fraction * 255)) % 256 for i in range(256)])
  return Image.merge('HSV', (hue, saturation, value)).convert('RGB')


def random_erasing(
  image: np.ndarray,
  rng: np.random.Generator,
  *,
  scale: tuple[float, float] = (0.02, 0.33),
  ratio: tuple[float, float] = (1 / 3.3, 1 / 0.3),
) -> np.ndarray:
  """Fills a random rectangle with random pixels, uniform in 0..255.

  Zhong et al., https://arxiv.org/abs/1708.04896. The default ranges are those
  of torchvision's RandomErasing, whose ratio is height / width. If ten random
  rectangles do not fit into the image, nothing is erased.

  Args:
    image: uint8 [height, width, 3].
    rng: random number generator.
    scale: smallest and largest area, as fractions of the image's area.
    ratio: smallest and largest aspect ratio, width / height.

  Returns:
    uint8 [height, width, 3], a new array.
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
  """Returns the central square, uint8 [size, size, 3]."""
  top, left = ((side - size) // 2 for side in image.shape[:2])
  return image[top : top + size, left : left + size]
