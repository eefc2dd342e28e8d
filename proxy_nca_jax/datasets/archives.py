"""Finds and safely extracts published archives, which are untrusted.

Callers must ensure that no two processes extract to the same folder.
"""

import errno
import gzip
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

from tqdm import auto as tqdm

from proxy_nca_jax.runtime import errors, files, folders, signals

# Limits against decompression bombs. The datasets have at most 120,053 files,
# and images hardly compress.
MAX_MEMBERS = 500_000
MAX_RATIO = 20
_ALLOWANCE = 2**28  # Bytes, for small archives of compressible annotations.
# The directory of a zip takes about 130 bytes per member.
_MAX_DIRECTORY = 2**26
# `os.makedirs` and `shutil.rmtree` recurse once per level.
_MAX_DEPTH = 64
_MAX_NAMED = 20
_CHUNK = 2**20

_BAD_PATH = (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)
# RuntimeError: endlessly nested headers, or a zip of an unknown version.
_DAMAGED = (
  EOFError,
  RuntimeError,
  UnicodeDecodeError,
  gzip.BadGzipFile,
  tarfile.TarError,
  zipfile.BadZipFile,
  zlib.error,
)


def find_file(folder: str, names: Sequence[str]) -> str | None:
  """Finds a file by name, ignoring case, down to two levels of sub-folders.

  Of several matches, returns the shallowest one, and of these the one in the
  alphabetically first folder; None without a match.
  """
  names = {name.lower() for name in names}
  for parent in _folders(folder, depth=2):
    for name in sorted(_list(parent)[1]):
      path = os.path.join(parent, name)
      if name.lower() in names and os.path.isfile(path):
        return path
  return None


def find_root(folder: str, markers: Sequence[str]) -> str | None:
  """Finds the shallowest folder that contains all markers.

  Args:
    folder: where the search starts; it descends three levels of sub-folders.
    markers: paths of files or folders, relative to the result.

  Returns:
    The folder, or None.
  """
  for parent in _folders(folder, depth=3):
    if all(os.path.exists(os.path.join(parent, name)) for name in markers):
      return parent
  return None


def _folders(folder: str, *, depth: int) -> Iterator[str]:
  """Yields a folder and its sub-folders by level; no hidden ones, no links."""
  level = [folder]
  yield folder
  for _ in range(depth):
    level = sorted(
      path
      for parent in level
      for name in _list(parent)[0]
      if not name.startswith('.')
      and not os.path.islink(path := os.path.join(parent, name))
    )
    yield from level


def _list(folder: str) -> tuple[list[str], list[str]]:
  """Returns the names of sub-folders and files; empty if unreadable."""
  _, folders, files = next(os.walk(folder), (folder, [], []))
  return folders, files


def extract(paths: Sequence[str], folder: str) -> None:
  """Extracts archives side by side into a new folder, all or nothing.

  Only plain files and folders inside the target folder are created, with the
  default permissions and the current time.

  Args:
    paths: zip, tar and tar.gz archives, recognized by content; other files
      named *.mat or *.txt are copied.
    folder: the target; it appears once everything is extracted.

  Raises:
    ValueError: if the folder exists, or if a file is not an archive, is
      damaged, exceeds the limits, or has members other than distinctly named
      files and folders inside the target. The error lists the offending
      members.
  """
  folder = os.path.abspath(folder)
  if os.path.lexists(folder):
    raise ValueError(f'{folder!r} already exists.')
  with files.create_folder_atomically(folder) as part:
    for path in paths:
      try:
        _extract_one(path, part)
      except OverflowError as error:
        raise ValueError(f'{path} exceeds a limit: {error}.') from error
      except _DAMAGED as error:
        reason = errors.one_line(error) if str(error) else 'it ends too early'
        raise ValueError(
          f'{path} is damaged: {reason}; download it again.'
        ) from error


def _extract_one(path: str, folder: str) -> None:
  limit = MAX_RATIO * os.path.getsize(path) + _ALLOWANCE
  offenders, num_members, num_bytes = [], 0, 0
  with tqdm.tqdm(
    desc=os.path.basename(path), unit='B', unit_scale=True, disable=None
  ) as progress:
    for name, fault, size, source in _members(path, limit):
      signals.check()
      num_members += 1
      num_bytes += size
      if num_members > MAX_MEMBERS:
        raise OverflowError(f'more than {MAX_MEMBERS} members')
      if num_bytes > limit:
        raise OverflowError(f'more than {limit} bytes')
      fault = fault or _write(folder, name, size, source)
      if fault:
        offenders.append(f'{name[:200]!r} ({fault})')
      progress.update(size)
  if not num_members:
    raise EOFError('it is empty')
  if offenders:
    more = ' and others' if len(offenders) > _MAX_NAMED else ''
    raise ValueError(
      f'{path} is unsafe to extract ({len(offenders)} unsafe members): '
      f'{", ".join(offenders[:_MAX_NAMED])}{more}.'
    )


def _write(folder: str, name: str, size: int, source: IO[bytes] | None) -> str:
  """Writes a file, or a folder if `source` is None.

  Duplicate names are detected by the file system, by its own rules on case and
  without keeping names in memory.

  Returns:
    Why the member is not safe to write, or ''.
  """
  flat = name.replace('\\', '/')
  parts = [part for part in flat.split('/') if part not in ('', '.')]
  if not name or '\0' in name:
    return 'not a name'
  if flat.startswith('/') or re.match('[A-Za-z]:', flat):
    return 'absolute'
  if '..' in parts:
    return 'leads outside'
  if len(parts) > _MAX_DEPTH:
    return 'too deep'
  path = os.path.join(folder, *parts)
  parent = path if source is None else os.path.dirname(path)
  try:
    os.makedirs(parent, exist_ok=True)
    if source is None:
      return ''
    output = open(path, 'xb')
  except OSError as error:
    if error.errno not in _BAD_PATH:
      raise
    return error.strerror
  with output:
    # Never write more than the declared size, which was counted.
    while chunk := source.read(_CHUNK):
      size -= len(chunk)
      if size < 0:
        break
      output.write(chunk)
  if size:
    raise EOFError(f'{name[:200]!r} does not have its declared size')
  return ''


def _members(
  path: str, limit: int
) -> Iterator[tuple[str, str, int, IO[bytes] | None]]:
  """Yields (name, fault or '', size, open file, or None for a folder)."""
  with open(path, 'rb') as file:
    head = file.read(100)
    file.seek(0)
    try:
      folders.check_lfs(head)
    except ValueError as error:
      raise ValueError(f'{path} is {error}.') from error
    # `zipfile.is_zipfile` accepts a tar that ends in a zip, and rejects a
    # truncated zip.
    if head.startswith((b'PK\3\4', b'PK\5\6')):
      yield from _zip_members(_Meter(file, _MAX_DIRECTORY, limit))
      return
    is_gzip = head.startswith(b'\x1f\x8b')
    stream = gzip.GzipFile(fileobj=file) if is_gzip else file
    try:
      tar = tarfile.TarFile(fileobj=_Meter(stream, _CHUNK, limit))
    except (tarfile.ReadError, ValueError):
      if not path.lower().endswith(('.mat', '.txt')):
        raise ValueError(f'{path} is not a zip or tar archive.') from None
      file.seek(0)
      yield os.path.basename(path), '', os.path.getsize(path), file
    else:
      yield from _tar_members(tar)


class _Meter:
  """An open file that limits what zipfile and tarfile read from it.

  Both read headers into memory as a whole, whatever size a header declares.
  """

  def __init__(self, file: IO[bytes], max_read: int, max_total: int):
    """Wraps a file.

    Args:
      file: an open file.
      max_read: the most bytes in one call of `read`.
      max_total: the largest position from which to read.
    """
    self._file = file
    self._max_read = max_read
    self._max_total = max_total

  def __getattr__(self, name: str):
    return getattr(self._file, name)

  def read(self, size: int = -1) -> bytes:
    if size > self._max_read:
      raise OverflowError(f'a header of {size} bytes')
    if self._file.tell() > self._max_total:
      raise OverflowError(f'more than {self._max_total} bytes')
    return self._file.read(size)

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    if offset < 0 and whence == os.SEEK_SET:
      raise EOFError('it refers to bytes before its start')
    return self._file.seek(offset, whence)


def _zip_members(file: _Meter) -> Iterator[tuple]:
  with zipfile.ZipFile(file) as archive:
    for member in archive.infolist():
      kind = stat.S_IFMT(member.external_attr >> 16)
      method = member.compress_type
      fault, source = '', None
      if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        fault = 'a link or special file'
      elif member.flag_bits & 1:
        fault = 'encrypted'
      elif method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        fault = f'compressed by method {method}'
      elif not member.orig_filename.endswith(('/', '\\')):
        source = archive.open(member)
      # `filename`, unlike `orig_filename`, is cut at the first NUL.
      yield member.orig_filename, fault, member.file_size, source


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple]:
  """Reads headers one by one: TarFile keeps all, and stops at a broken one."""
  file = tar.fileobj
  member = tar.next()
  while member is not None:
    # Python releases before 2025-08 loop forever on negative sizes.
    if member.size < 0 or tar.offset < file.tell():
      raise tarfile.ReadError('a negative size')
    fault, source = '', None
    if member.isreg() and not member.issparse():
      source = tar.extractfile(member)
    elif not member.isdir():
      fault = 'a link or special file'
    yield member.name, fault, member.size, source
    file.seek(tar.offset)
    try:
      member = tarfile.TarInfo.fromtarfile(tar)
    except tarfile.EOFHeaderError:
      member = None
    except ValueError as error:  # Malformed numbers in extended headers.
      raise tarfile.ReadError(str(error)) from error
  # Reads to the end, where gzip verifies its checksum.
  while file.read(_CHUNK):
    pass
