"""Lists and reads the user's files, which may be anything and named anyhow.

Only regular files are opened, since reading a pipe or a device may never end.
Names are as `os` gives them: bytes that are not in the encoding of the file
system are surrogates, which no text file or database takes; see `escape`.
"""

import contextlib
import errno
import io
import itertools
import os
import re
import stat
import sys
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

# Files that operating systems leave in folders, in addition to hidden ones.
_LITTER = ('thumbs.db', 'desktop.ini')
_MAX_NAMED = 5
# Bytes of the largest file that is read. An image at `images.MAX_PIXELS` takes
# as many uncompressed.
MAX_BYTES = 2**28
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_LFS_POINTER = b'version https://git-lfs.github.com/spec/'
_SPECIAL = {
  stat.S_IFIFO: 'a named pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
  stat.S_IFDIR: 'a folder',
}


class Listing(NamedTuple):
  """The files below a folder; all paths are relative to it.

  Attributes:
    files: {path: status} of the regular files, in ascending order.
    skipped: {path: reason} of special files, and of links to a folder that
      contains them or is listed elsewhere.
    unlisted: {folder: reason} of folders that cannot be listed.
    unreachable: {path: reason} of entries that are neither known to be files
      nor folders, such as links to a disk that is not mounted.
  """

  files: dict[str, os.stat_result]
  skipped: dict[str, str]
  unlisted: dict[str, str]
  unreachable: dict[str, str]


def list_files(root: str) -> Listing:
  """Lists the files below a folder, without hidden files and folders.

  Links are followed. A folder of the first level lists each folder once, even
  if several links lead to it, so that no loop and no tree of links is endless.
  """
  listing = Listing({}, {}, {}, {})
  containing = {_identity(os.path.join(root, up)) for up in _parents(root)}
  for top in _list_folder(root, '', listing):
    seen, folders, links = set(containing), deque([top]), deque()
    while folders or links:
      # Folders first: their files are not listed under the name of a link.
      folder = (folders or links).popleft()
      identity = _identity(os.path.join(root, folder))
      if identity in seen:
        listing.skipped[folder] = 'a link to a folder that is listed already'
        continue
      seen.add(identity)
      for path in _list_folder(root, folder, listing):
        is_link = os.path.islink(os.path.join(root, path))
        (links if is_link else folders).append(path)
  return listing._replace(files=dict(sorted(listing.files.items())))


def _parents(root: str) -> list[str]:
  """Returns the folder and those that contain it, as absolute paths."""
  parents = [os.path.realpath(root)]
  while (parent := os.path.dirname(parents[-1])) != parents[-1]:
    parents.append(parent)
  return parents


def _identity(path: str) -> tuple[int, int] | str:
  """Returns what all paths of a folder share."""
  try:
    status = os.stat(path)
  except OSError:
    return path
  return status.st_dev, status.st_ino


def _list_folder(root: str, folder: str, listing: Listing) -> list[str]:
  """Adds the entries of a folder to a listing; returns its sub-folders."""
  try:
    with os.scandir(os.path.join(root, folder)) as scanned:
      entries = sorted(scanned, key=lambda entry: entry.name)
  except OSError as error:
    listing.unlisted[folder] = error.strerror or str(error)
    return []
  folders = []
  for entry in entries:
    if entry.name.startswith('.') or entry.name.lower() in _LITTER:
      continue
    path = os.path.join(folder, entry.name)
    try:
      status = os.stat(entry.path)
    except OSError as error:
      # Without a link, the entry has been removed since it was listed.
      if error.errno != errno.ENOENT:
        listing.unreachable[path] = error.strerror or str(error)
      elif entry.is_symlink():
        listing.unreachable[path] = 'a link to nothing'
      continue
    if stat.S_ISDIR(status.st_mode):
      folders.append(path)
    elif stat.S_ISREG(status.st_mode):
      listing.files[path] = status
    else:
      listing.skipped[path] = _describe(status)
  return folders


def _describe(status: os.stat_result) -> str:
  kind = _SPECIAL.get(stat.S_IFMT(status.st_mode), 'a special file')
  return f'{kind}, not a regular file'


def describe(reasons: Mapping[str, str]) -> str:
  """Returns the first few paths of a listing with their reasons."""
  first = ', '.join(
    f"'{escape(path or '.')}' ({reason})"
    for path, reason in itertools.islice(reasons.items(), _MAX_NAMED)
  )
  more = len(reasons) - _MAX_NAMED
  return f'{first} and {more} more' if more > 0 else first


def read_file(path: str | os.PathLike) -> bytes:
  """Reads a regular file.

  Raises:
    ValueError: if it is not a regular file, or larger than `MAX_BYTES`.
    OSError: if it cannot be read.
  """
  status = os.stat(path)
  if not stat.S_ISREG(status.st_mode):
    raise ValueError(_describe(status))
  if status.st_size > MAX_BYTES:
    raise ValueError(
      f'its {status.st_size:,} bytes exceed the limit of {MAX_BYTES:,}'
    )
  with open(path, 'rb') as file:
    # Some files of /proc have the size 0 and no end.
    return file.read(status.st_size)


def check_lfs(content: bytes) -> None:
  """Raises ValueError if a file starts as a Git LFS pointer does."""
  if content.startswith(_LFS_POINTER):
    raise ValueError('a Git LFS pointer, not the file: run `git lfs pull`')


def escape(path: str) -> str:
  r"""Returns a path as valid Unicode, the same in every locale.

  >>> escape(os.fsdecode(b'caf\xe9.png'))
  'caf\\xe9.png'

  Bytes that are not UTF-8 become \xHH, and a backslash becomes two.
  """
  text = os.fsencode(path).decode('utf-8', 'surrogateescape')
  return re.sub(
    '[\udc80-\udcff]',
    lambda match: f'\\x{ord(match[0]) - 0xDC00:02x}',
    text.replace('\\', r'\\'),
  )


def unescape(text: str) -> str:
  """Returns the path that `escape` was given."""
  path = re.sub(
    r'\\(\\|x[0-9a-f]{2})',
    lambda match: (
      '\\' if match[1] == '\\' else chr(0xDC00 + int(match[1][1:], 16))
    ),
    text,
  )
  return os.fsdecode(path.encode('utf-8', 'surrogateescape'))


def write_utf8_to_stdout() -> None:
  """Lets stdout take any escaped name, whatever the locale."""
  # A test, or a caller of the library, may have replaced it.
  if not isinstance(sys.stdout, io.TextIOWrapper):
    return
  # Some files do not support it, such as a pipe opened to read and write.
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.reconfigure(encoding='utf-8', errors='backslashreplace')


def check_utf8(path: str, name: str) -> None:
  """Raises ValueError if libraries cannot write below a path.

  Args:
    path: a path.
    name: what the path is, for the error message.
  """
  try:
    path.encode()
  except UnicodeEncodeError:
    raise ValueError(
      f'{name} is "{escape(path)}", which is not UTF-8, or not in the encoding '
      'of this locale: use another name, or set LC_ALL=C.UTF-8.'
    ) from None
