"""Pictures after a recipe's first resize, decoded, in one file on disk.

Decoding and resizing a photo takes milliseconds, each epoch anew. Done once,
the pixels are read from a file that all runs and reading processes share
through the operating system's cache.
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


class ResizedPictures(Sequence):
  """uint8 [height, width, 3] pictures in a folder that `prepare` made.

  The file is opened when the first picture is read, in each process for itself.
  It is not mapped: a mapped file that is cut short kills the process.
  """

  def __init__(self, folder: str):
    self._folder = folder
    self._shapes = np.load(os.path.join(folder, 'shapes.npy'))
    sizes = np.prod(self._shapes, axis=1, dtype=np.int64) * 3
    self._starts = np.concatenate([[0], np.cumsum(sizes)])

  def __reduce__(self):
    return ResizedPictures, (self._folder,)

  @functools.cached_property
  def _file(self) -> BinaryIO:
    return open(os.path.join(self._folder, 'pixels.bin'), 'rb')

  def __len__(self) -> int:
    return len(self._shapes)

  def __getitem__(self, index: int) -> np.ndarray:
    start, end = map(int, self._starts[index : index + 2])
    try:
      # With no position that threads would share.
      pixels = os.pread(self._file.fileno(), end - start, start)
      reason = 'it is cut short'
    except OSError as error:
      pixels, reason = b'', error.strerror
    if len(pixels) != end - start:
      raise ValueError(
        f'The resized picture {index} cannot be read from {self._folder!r} '
        f'({reason}). Delete that folder, so that it is prepared again; then '
        'start the same command: the run goes on from its last checkpoint.'
      )
    return np.frombuffer(pixels, np.uint8).reshape(*self._shapes[index], 3)


def prepare(
  folder: str,
  inputs: dict[str, str | int],
  read: Callable[[int], np.ndarray],
  num_pictures: int,
) -> ResizedPictures:
  """Writes the pictures of one data set and resize, unless they are there.

  They appear by a rename when they are whole; one process writes, and others
  that need the same wait for it.

  Args:
    folder: gets a folder for each `inputs`.
    inputs: all that the pixels depend on, besides the version of Pillow.
    read: maps an index to uint8 [height, width, 3].
    num_pictures: indices are in [0, num_pictures).
  """
  inputs = json.dumps(inputs | {'pillow': PIL.__version__}, sort_keys=True)
  key = hashlib.sha256(inputs.encode()).hexdigest()[:16]
  path = os.path.join(folder, key)
  os.makedirs(folder, exist_ok=True)
  with lock.locked(os.path.join(folder, 'lock')):
    if not os.path.exists(path):
      _logger.info('Writing resized pictures to %s', path)
      with files.create_folder_atomically(path) as part:
        _write(part, inputs, read, num_pictures)
  return ResizedPictures(path)


def _write(folder, inputs, read, num_pictures) -> None:
  shapes = np.empty((num_pictures, 2), np.int32)
  with (
    files.write_atomically(os.path.join(folder, 'pixels.bin'), 'wb') as file,
    tqdm.tqdm(
      total=num_pictures, unit=' images', desc='resizing', disable=None
    ) as progress,
    futures.ThreadPoolExecutor() as pool,
  ):
    for start in range(0, num_pictures, 64):
      signals.check()
      indices = range(start, min(start + 64, num_pictures))
      for index, picture in zip(indices, pool.map(read, indices)):
        shapes[index] = picture.shape[:2]
        file.write(np.ascontiguousarray(picture))
      progress.update(len(indices))
  with files.write_atomically(os.path.join(folder, 'shapes.npy'), 'wb') as file:
    np.save(file, shapes)
  with files.write_atomically(os.path.join(folder, 'inputs.json')) as file:
    file.write(inputs + '\n')
