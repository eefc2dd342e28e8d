"""Resumable, verified downloads of published files.

A file arrives under a name that ends in `.part` and is renamed once it is
complete and verified. Servers are untrusted. Callers must ensure that no two
processes download to the same path.
"""

import dataclasses
import errno
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request

from tqdm import auto as tqdm

from proxy_nca_jax.runtime import errors, signals

_CHUNK = 2**20
_MAX_IDLE_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0
_HEADERS = {'Accept-Encoding': 'identity', 'User-Agent': 'proxy_nca_jax'}

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DROPPED = (
  http.client.IncompleteRead,
  ConnectionError,
  TimeoutError,
  urllib.error.URLError,
)


@dataclasses.dataclass(frozen=True)
class RemoteFile:
  """A published file.

  Attributes:
    name: the name to store it under.
    urls: URLs to try in order; empty if it can only be downloaded by hand.
    size: size in bytes; None if unknown.
    checksum: 'sha256:HEX' or 'md5:HEX'; '' if unknown.
  """

  name: str
  urls: tuple[str, ...] = ()
  size: int | None = None
  checksum: str = ''


def fetch(file: RemoteFile, folder: str, *, timeout: float = 60.0) -> str:
  """Downloads a file, resuming an earlier partial download.

  Args:
    file: the file; its size and checksum are verified if they are known.
    folder: the folder to store it in, created if missing. An existing file is
      returned without another verification.
    timeout: seconds to wait for a server to send anything.

  Returns:
    The path of the file.

  Raises:
    ValueError: if no URL provides the file, with one line per URL that says
      why.
    OSError: if the disk is full; the partial download is kept.
  """
  path = os.path.join(folder, file.name)
  if os.path.exists(path):
    return path
  if not file.urls:
    raise ValueError(f'{file.name}: has no URL; put it into {folder!r}')
  os.makedirs(folder, exist_ok=True)
  reasons = []
  for url in file.urls:
    try:
      _fetch_from(url, file, path + '.part', timeout)
      os.replace(path + '.part', path)
      return path
    except (OSError, ValueError, http.client.HTTPException) as error:
      if getattr(error, 'errno', None) in _DISK_FULL:
        raise
      reasons.append(f'{url}: {_reason(error)}')
  raise ValueError('\n'.join(reasons))


def _reason(error: Exception) -> str:
  """Describes an error in one line that is safe to print."""
  if isinstance(error, urllib.error.HTTPError):
    return f'{error.code} {http.client.responses.get(error.code, "?")}'
  if isinstance(error, urllib.error.URLError):
    error = error.reason
  return errors.one_line(getattr(error, 'strerror', None) or error)


def _fetch_from(url: str, file: RemoteFile, part: str, timeout: float) -> None:
  resumed = os.path.exists(part)
  _download(url, file, part, timeout)
  try:
    _verify(file, part)
  except ValueError:
    os.remove(part)
    if not resumed:
      raise
    # The earlier partial download may have been of another file.
    _fetch_from(url, file, part, timeout)


def _verify(file: RemoteFile, part: str) -> None:
  algorithm, _, expected = file.checksum.partition(':')
  with open(part, 'rb+') as stream:
    # Without this, a power cut could leave a renamed file of zeros.
    os.fsync(stream.fileno())
    if not expected:
      return
    digest = hashlib.file_digest(stream, algorithm).hexdigest()
  if digest != expected.lower():
    raise ValueError(f'{algorithm} is {digest}, expected {expected}')


def _download(url: str, file: RemoteFile, part: str, timeout: float) -> None:
  """Connects until `part` is complete, or several attempts add nothing."""
  largest, num_idle = _size(part), 0
  while True:
    try:
      return _connect(url, file, part, timeout)
    except _DROPPED as error:
      if getattr(error, 'code', None) == 416 and _size(part):
        # The partial download is not a prefix of the server's file.
        os.remove(part)
      elif isinstance(error, urllib.error.HTTPError):
        raise
      num_idle = 0 if _size(part) > largest else num_idle + 1
      if num_idle == _MAX_IDLE_ATTEMPTS:
        raise
    largest = max(largest, _size(part))
    time.sleep(_PAUSE_SECONDS * (num_idle + 1))


def _connect(url: str, file: RemoteFile, part: str, timeout: float) -> None:
  """Appends to `part` over one connection; raises if it stops early."""
  start = _size(part)
  if start and start == file.size:
    return
  if file.size is not None and start > file.size:
    start = 0
  headers = _HEADERS | ({'Range': f'bytes={start}-'} if start else {})
  request = urllib.request.Request(url, headers=headers)
  with urllib.request.urlopen(request, timeout=timeout) as response:
    start, size = _parse_headers(response, start)
    if file.size is not None:
      if size not in (None, file.size):
        raise ValueError(f'sends {size} bytes, expected {file.size}')
      size = file.size
    with (
      open(part, 'ab' if start else 'wb') as stream,
      tqdm.tqdm(
        desc=file.name,
        initial=start,
        total=size,
        unit='B',
        unit_scale=True,
        disable=None,  # Only on a terminal.
      ) as progress,
    ):
      # read1 returns what has arrived, so that it is kept if the rest times
      # out.
      while chunk := response.read1(_CHUNK):
        signals.check()
        start += len(chunk)
        if size is not None and start > size:
          raise ValueError(f'sends more than the expected {size} bytes')
        stream.write(chunk)
        progress.update(len(chunk))
  if size not in (None, start):
    raise ConnectionError(f'stops after {start} of {size} bytes')


def _parse_headers(response, start: int) -> tuple[int, int | None]:
  """Returns (offset of the body in the file, size of the file or None)."""
  if response.status == 206:
    text = response.headers.get('Content-Range', '')
    match = re.fullmatch(r'bytes (\d+)-\d+/(\d+|\*)', text.strip())
    if not match or int(match[1]) != start:
      raise ValueError(f'sends the range {text!r}, expected bytes {start}-')
    if match[2] != '*':
      return start, int(match[2])
  else:
    start = 0
  text = response.headers.get('Content-Length')
  if text is None:
    return start, None
  if not text.strip().isdecimal():
    raise ValueError(f'sends the Content-Length {text!r}')
  return start, start + int(text)


def _size(path: str) -> int:
  return os.path.getsize(path) if os.path.exists(path) else 0
