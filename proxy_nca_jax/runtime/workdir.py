"""The workdir of a run: its lock or lease, its log and its JSON files."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from proxy_nca_jax.runtime import (
  files,
  folders,
  lock,
  processes,
  remote,
)

_logger = logging.getLogger(__name__)


class Folder(NamedTuple):
  """An open workdir.

  Attributes:
    path: the local folder: the workdir, or the local copy of a remote one.
    publish: starts uploading changes to a remote workdir; does nothing for a
      local one. Raises ValueError if another run has taken over the workdir.
    note: a log message if this run took over the workdir, or ''.
  """

  path: str
  publish: Callable[[], None]
  note: str = ''


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[Folder]:
  """Creates and locks a workdir; logs and caches compiled programs in it.

  The primary process holds the lock and writes log.txt for all processes of a
  run. A URL, such as gs://bucket/run, is leased and mirrored to a local folder.

  Raises:
    ValueError: if another run uses the workdir, its name is not UTF-8, it is a
      URL and the run has several processes, or the processes do not share it.
  """
  folders.check_utf8(os.path.abspath(workdir), 'The workdir')
  if '://' in workdir and jax.process_count() > 1:
    raise ValueError(
      f'{jax.process_count()} processes cannot share {workdir!r}: each would '
      'have its own local copy. Use a workdir on a file system that all '
      'processes can access.'
    )
  workdir = os.path.expanduser(workdir)
  check_path(workdir)
  with contextlib.ExitStack() as stack:
    acquired = []
    processes.run_on_primary(lambda: acquired.append(_acquire(workdir, stack)))
    _check_shared(workdir)
    folder = acquired[0] if acquired else Folder(workdir, publish=lambda: None)
    stack.enter_context(
      _compilations_cached(os.path.join(folder.path, 'compilation_cache'))
    )
    if processes.is_primary():
      handler = logging.FileHandler(
        os.path.join(folder.path, 'log.txt'),
        encoding='utf-8',
        errors='backslashreplace',
      )
      handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
      package = logging.getLogger('proxy_nca_jax')
      package.addHandler(handler)
      stack.callback(handler.close)
      stack.callback(package.removeHandler, handler)
    if folder.note:
      _logger.warning('%s', folder.note)
    yield folder


def check_path(workdir: str) -> None:
  """Raises ValueError if a path has characters that Orbax takes for a pattern.

  Checkpoints written below such a path cannot be read.
  """
  if '://' not in workdir and set(os.path.abspath(workdir)) & set('*?['):
    raise ValueError(
      f'The path {os.path.abspath(workdir)!r} contains *, ? or [, with which '
      'checkpoints cannot be read: use a workdir without these characters.'
    )


def _check_shared(workdir: str) -> None:
  """Raises ValueError, on all processes, unless all see the same workdir."""
  if apart := processes.find_apart(workdir):
    raise ValueError(
      f'The processes of this run do not share the workdir {workdir!r}: files '
      f'of process 0 do not appear on {_name(apart)}. Use a workdir on a file '
      'system that all processes can access.'
    )


def _name(indices: Sequence[int]) -> str:
  plural = 'es' if len(indices) > 1 else ''
  return f'process{plural} {", ".join(map(str, indices))}'


def _acquire(workdir: str, stack: contextlib.ExitStack) -> Folder:
  """Locks or leases a workdir until the stack closes.

  Raises:
    ValueError: if another run uses it.
  """
  try:
    return stack.enter_context(
      _mirrored(workdir) if '://' in workdir else _locked(workdir)
    )
  except BlockingIOError as error:
    # A lease, unlike a lock, knows its holder and when it expires.
    holder = '' if error.errno else f' ({error})'
    raise ValueError(
      f'Another run is using {workdir!r}{holder}: wait for it to end, or use '
      'another workdir.'
    ) from None


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[Folder]:
  os.makedirs(workdir, exist_ok=True)
  with lock.locked(os.path.join(workdir, 'lock'), wait=False):
    yield Folder(workdir, publish=lambda: None)


@contextlib.contextmanager
def _mirrored(url: str) -> Iterator[Folder]:
  with remote.mirrored(url, lease_seconds=remote.LEASE_SECONDS) as mirrored:
    yield Folder(*mirrored)


@contextlib.contextmanager
def _compilations_cached(folder: str) -> Iterator[None]:
  """Caches compiled programs in a folder; restores JAX's settings on exit.

  If JAX already has a cache folder, that one is used.
  """
  folder = jax.config.jax_compilation_cache_dir or folder
  wanted = {
    'jax_compilation_cache_dir': os.path.abspath(folder),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: getattr(jax.config, name) for name in wanted}

  def configure(values):
    for name, value in values.items():
      jax.config.update(name, value)
    # JAX reads these settings only at its first compilation.
    compilation_cache.reset_cache()

  configure(wanted)
  try:
    yield
  finally:
    configure(before)


def write_json(path: str, content: Mapping) -> None:
  """Writes a JSON file atomically, on the primary process only.

  `saved_json.read` reads it.
  """
  if not processes.is_primary():
    return
  with files.write_atomically(path) as file:
    json.dump(content, file, indent=2)
    file.write('\n')
