"""Atomic writes: a path holds its old content or all of the new, never a part.

The content grows beside its final path and is renamed once it is complete. Two
processes must not write the same path at the same time.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from typing import IO

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def write_atomically(path: str, mode: str = 'w', **options) -> Iterator[IO]:
  """Opens a file for writing that replaces `path` when the block succeeds.

  The content is flushed to disk before the rename, so that neither a full disk
  nor a power cut damages the old file. The new file keeps the old one's
  permissions; a symbolic link keeps pointing to the file that is replaced. A
  device or pipe, such as /dev/stdout, is written directly.

  Args:
    path: the file to write; its folder must exist.
    mode: 'w' for text, in UTF-8, or 'wb' for bytes.
    **options: further arguments of `open`, such as `newline`.

  Yields:
    The open temporary file, whose `name` a library may write to instead.

  Raises:
    OSError: if the file cannot be written, naming `path`. The old file is kept
      and the temporary file removed.
  """
  if 'b' not in mode:
    options = {'encoding': 'utf-8'} | options
  if os.path.exists(path) and not os.path.isfile(path):
    with open(path, mode, **options) as file:
      yield file
    return
  target = os.path.realpath(path)
  temporary = f'{target}.tmp'
  try:
    with open(temporary, mode, **options) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
      if os.path.exists(target):
        os.fchmod(file.fileno(), stat.S_IMODE(os.stat(target).st_mode))
    os.replace(temporary, target)
  except BaseException as error:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    is_forbidden = getattr(error, 'errno', None) in _FORBIDDEN
    if is_forbidden and os.access(path, os.W_OK):
      raise OSError(
        f'{path!r} is writable, but its folder is not, in which the new file '
        'is written before it replaces the old one: make the folder writable, '
        'or name a file in another one.'
      ) from error
    # An error without a number is a text that a file name would replace.
    if getattr(error, 'errno', None) and error.filename in (None, temporary):
      error.filename = path
    raise


@contextlib.contextmanager
def create_folder_atomically(path: str) -> Iterator[str]:
  """Creates a folder that appears when the block succeeds.

  The folder is filled under a name that ends in `.part`. Leftovers of a killed
  process under that name are removed first.

  Args:
    path: a folder that does not exist yet.

  Yields:
    The temporary folder to fill; it is removed if the block fails.
  """
  part = f'{path}.part'
  if os.path.lexists(part):
    shutil.rmtree(part)
  os.makedirs(part)
  try:
    yield part
    os.rename(part, path)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise
