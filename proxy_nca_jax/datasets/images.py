"""From the bytes of any picture to 8-bit RGB of the size that a recipe asks."""

import io

import numpy as np
from PIL import Image, ImageOps

FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
}


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
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise ValueError(reason) from error


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
