"""A cache of decoded and resized images, in one file on disk.

Decoding and resizing a photo takes milliseconds, in every epoch. With the
cache, the pixels are read from a file that all runs and data workers share
through the operating system's page cache.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import BinaryIO

import numpy as np
import PIL
import tqdm

from proxy_nca_jax.runtime import files, lock, signals

_logger = logging.getLogger(__name__)


class ResizedImages(Sequence):
  """Random access to the cached images, each uint8 [height, width, 3].

  Each process opens the file when it first reads an image. The file is not
  memory-mapped: access to a truncated mapped file kills the process.
  """

  def __init__(self, folder: str):
    self._folder = folder
    self._shapes = np.load(os.path.join(folder, 'shapes.npy'))
    sizes = np.prod(self._shapes, axis=1, dtype=np.int64) * 3
    self._starts = np.concatenate([[0], np.cumsum(sizes)])

  def __reduce__(self):
    return ResizedImages, (self._folder,)

  @functools.cached_property
  def _file(self) -> BinaryIO:
    return open(os.path.join(self._folder, 'pixels.bin'), 'rb')

  def __len__(self) -> int:
    return len(self._shapes)

  def __getitem__(self, index: int) -> np.ndarray:
    start, end = map(int, self._starts[index : index + 2])
    try:
      # Unlike read(), pread() has no file position for threads to share.
      pixels = os.pread(self._file.fileno(), end - start, start)
      reason = 'the file is truncated'
    except OSError as error:
      pixels, reason = b'', error.strerror
    if len(pixels) != end - start:
      raise ValueError(
        f'Resized image {index} cannot be read from {self._folder!r} '
        f'({reason}). Delete that folder to write it again; then start the '
        'same command to resume from the last checkpoint.'
      )
    return np.frombuffer(pixels, np.uint8).reshape(*self._shapes[index], 3)


def load_or_write(
  folder: str,
  inputs: dict[str, str | int],
  read: Callable[[int], np.ndarray],
  num_images: int,
) -> ResizedImages:
  """Returns the cached images of a dataset, written on the first call.

  One process writes, while others that need the same images wait.

  Args:
    folder: holds one cache folder per `inputs`.
    inputs: everything that the pixels depend on, except the version of Pillow.
    read: maps an index in [0, num_images) to uint8 [height, width, 3].
    num_images: number of images.
  """
  inputs = json.dumps(inputs | {'pillow': PIL.__version__}, sort_keys=True)
  key = hashlib.sha256(inputs.encode()).hexdigest()[:16]
  path = os.path.join(folder, key)
  os.makedirs(folder, exist_ok=True)
  with lock.locked(os.path.join(folder, 'lock')):
    if not os.path.exists(path):
      _logger.info('Writing resized images to %s', path)
      with files.create_folder_atomically(path) as part:
        _write(part, inputs, read, num_images)
  return ResizedImages(path)


def _write(folder, inputs, read, num_images) -> None:
  shapes = np.empty((num_images, 2), np.int32)
  with (
    files.write_atomically(os.path.join(folder, 'pixels.bin'), 'wb') as file,
    tqdm.tqdm(
      total=num_images, unit=' images', desc='resizing', disable=None
    ) as progress,
    futures.ThreadPoolExecutor() as pool,
  ):
    for start in range(0, num_images, 64):
      signals.check()
      indices = range(start, min(start + 64, num_images))
      for index, image in zip(indices, pool.map(read, indices)):
        shapes[index] = image.shape[:2]
        file.write(np.ascontiguousarray(image))
      progress.update(len(indices))
  with files.write_atomically(os.path.join(folder, 'shapes.npy'), 'wb') as file:
    np.save(file, shapes)
  with files.write_atomically(os.path.join(folder, 'inputs.json')) as file:
    file.write(inputs + '\n')
