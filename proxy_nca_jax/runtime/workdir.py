"""The folder of a run: locked, logged to, and true to one configuration."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from proxy_nca_jax.runtime import lock, processes, remote

_logger = logging.getLogger(__name__)


class Folder(NamedTuple):
  """Where a run works.

  Attributes:
    path: a local folder: the workdir, or the copy of a remote one.
    publish: begins to upload what has changed, where the workdir is remote.
      Raises ValueError if another run has taken it over.
    note: from whom the workdir was taken over, for the log.
  """

  path: str
  publish: Callable[[], None]
  note: str = ''


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[Folder]:
  """Makes and locks a workdir, and logs and caches compilations in it.

  Process 0 holds the lock and writes the log for all processes of a run. A URL,
  such as gs://bucket/run, is held by a lease and worked on in a local copy.

  Raises:
    ValueError: if another run holds it, or several processes would share a URL.
  """
  if '://' in workdir and jax.process_count() > 1:
    raise ValueError(
      f'{jax.process_count()} processes cannot share {workdir!r}: each would '
      'work on a copy of its own. Use a workdir in a folder that all of them '
      'see.'
    )
  with contextlib.ExitStack() as stack:
    folders = []
    processes.of_first(lambda: folders.append(_take(workdir, stack)))
    folder = folders[0] if folders else Folder(workdir, publish=lambda: None)
    stack.enter_context(
      _compilations_cached(os.path.join(folder.path, 'compilation_cache'))
    )
    if processes.is_first():
      handler = logging.FileHandler(os.path.join(folder.path, 'log.txt'))
      handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
      package = logging.getLogger('proxy_nca_jax')
      package.addHandler(handler)
      stack.callback(handler.close)
      stack.callback(package.removeHandler, handler)
    if folder.note:
      _logger.warning(folder.note)
    yield folder


def _take(workdir: str, stack: contextlib.ExitStack) -> Folder:
  """Holds a workdir until the stack ends.

  Raises:
    ValueError: if another run holds it.
  """
  try:
    return stack.enter_context(
      _mirrored(workdir) if '://' in workdir else _locked(workdir)
    )
  except BlockingIOError as error:
    # Of a lease it is known whose it is, and how long to wait.
    holder = '' if error.errno else f' ({error})'
    raise ValueError(
      f'Another run is at work in {workdir!r}{holder}: wait for it, or use '
      'another workdir.'
    ) from None


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[Folder]:
  os.makedirs(workdir, exist_ok=True)
  with lock.hold(os.path.join(workdir, 'lock'), wait=False):
    yield Folder(workdir, publish=lambda: None)


@contextlib.contextmanager
def _mirrored(url: str) -> Iterator[Folder]:
  with remote.hold(url, lease_seconds=remote.LEASE_SECONDS) as mirrored:
    yield Folder(*mirrored)


@contextlib.contextmanager
def _compilations_cached(folder: str) -> Iterator[None]:
  """Keeps compiled programs in a folder; then leaves JAX as it was.

  Where JAX has been given a folder already, that one is used.
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
    # JAX looks at the folder once, at its first compilation.
    compilation_cache.reset_cache()

  configure(wanted)
  try:
    yield
  finally:
    configure(before)


def read_json(path: str) -> dict | None:
  """Reads a file that `write_json` wrote; None if there is none."""
  if not os.path.exists(path):
    return None
  with open(path) as file:
    return json.load(file)


def write_json(path: str, content: Mapping) -> None:
  """Writes a file as a whole or not at all; process 0 does."""
  if not processes.is_first():
    return
  with open(path + '.tmp', 'w') as file:
    json.dump(content, file, indent=2)
    file.write('\n')
    file.flush()
    os.fsync(file.fileno())
  os.replace(path + '.tmp', path)
