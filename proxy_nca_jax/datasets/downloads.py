"""Downloads published files, none of them trusted; goes on where it stopped.

What is under its final name is whole: a file grows beside it, under a name that
ends in `.part`, and is renamed at the end. Callers see to it that no two
processes work on one name.
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
_PAUSE = 1.0  # Seconds.
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
  """A published file and how to know it.

  Attributes:
    name: the name it is stored under.
    urls: tried in order; empty if only people can fetch it.
    size: in bytes, None if nobody published it.
    checksum: 'sha256:HEX' or 'md5:HEX', '' if nobody published it.
  """

  name: str
  urls: tuple[str, ...] = ()
  size: int | None = None
  checksum: str = ''


def fetch(file: RemoteFile, folder: str, *, timeout: float = 60.0) -> str:
  """Downloads a file, going on where an earlier call stopped.

  Args:
    file: its size and checksum are verified as far as they are known.
    folder: where it is stored; made if missing. A file that is there already
      was verified when it got its name.
    timeout: seconds to wait for a server to send anything.

  Returns:
    The path of the file.

  Raises:
    ValueError: if no URL gives the file; a line for each URL says why.
    OSError: if the disk is full. What has arrived is kept.
  """
  path = os.path.join(folder, file.name)
  if os.path.exists(path):
    return path
  if not file.urls:
    raise ValueError(f'{file.name}: no URL is known; put it into {folder!r}.')
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
  """Says in one line what happened, in words safe to print."""
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
    # What was there may have been the beginning of another file.
    _fetch_from(url, file, part, timeout)


def _verify(file: RemoteFile, part: str) -> None:
  algorithm, _, expected = file.checksum.partition(':')
  with open(part, 'rb+') as stream:
    # On disk before it is renamed, or a power cut could leave a name of zeros.
    os.fsync(stream.fileno())
    if not expected:
      return
    digest = hashlib.file_digest(stream, algorithm).hexdigest()
  if digest != expected.lower():
    raise ValueError(f'{algorithm} is {digest}, expected {expected}')


def _download(url: str, file: RemoteFile, part: str, timeout: float) -> None:
  """Connects until `part` is whole, as long as this brings it forward."""
  most, idle = _size(part), 0
  while True:
    try:
      return _connect(url, file, part, timeout)
    except _DROPPED as error:
      if getattr(error, 'code', None) == 416 and _size(part):
        # What is there is not the beginning of what is offered.
        os.remove(part)
      elif isinstance(error, urllib.error.HTTPError):
        raise
      idle = 0 if _size(part) > most else idle + 1
      if idle == _MAX_IDLE_ATTEMPTS:
        raise
    most = max(most, _size(part))
    time.sleep(_PAUSE * (idle + 1))


def _connect(url: str, file: RemoteFile, part: str, timeout: float) -> None:
  """Adds to `part` what one connection brings; raises if that is not all."""
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
        disable=None,  # Silent unless someone watches.
      ) as progress,
    ):
      # read1: what has arrived is kept even if the rest is late.
      while chunk := response.read1(_CHUNK):
        signals.check()
        start += len(chunk)
        if size is not None and start > size:
          raise ValueError(f'sends more bytes than the expected {size}')
        stream.write(chunk)
        progress.update(len(chunk))
  if size not in (None, start):
    raise ConnectionError(f'stops after {start} of {size} bytes')


def _parse_headers(response, start: int) -> tuple[int, int | None]:
  """Returns where in the file the body starts, and the size of the file."""
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
