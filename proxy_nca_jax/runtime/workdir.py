"""The workdir of a run: its lock or lease, its log and its JSON files."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import ml_collections
from jax.experimental.compilation_cache import compilation_cache

from proxy_nca_jax.configs import default
from proxy_nca_jax.runtime import files, lock, processes, remote

_logger = logging.getLogger(__name__)

# Fields that do not change the mathematics: a resumed run may change them.
_FREE_FIELDS = (
  'dataset.data_dir',
  'dataset.fonts_dir',
  'dataset.manual_dir',
  'dataset.num_workers',
  'dataset.on_device',
  'dataset.root',
  'dry_run',
  'evaluation.baselines',
  'keep_checkpoints',
  'log_every',
  'optimizer.max_skipped_steps',
  'profile_steps',
  'proxies.sharded',
  'report',
  'save_every',
  'stall_seconds',
)


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
    ValueError: if another run uses the workdir, or it is a URL and the run has
      several processes.
  """
  if '://' in workdir and jax.process_count() > 1:
    raise ValueError(
      f'{jax.process_count()} processes cannot share {workdir!r}: each would '
      'have its own local copy. Use a workdir on a file system that all '
      'processes can access.'
    )
  with contextlib.ExitStack() as stack:
    folders = []
    processes.run_on_primary(lambda: folders.append(_acquire(workdir, stack)))
    folder = folders[0] if folders else Folder(workdir, publish=lambda: None)
    stack.enter_context(
      _compilations_cached(os.path.join(folder.path, 'compilation_cache'))
    )
    if processes.is_primary():
      handler = logging.FileHandler(os.path.join(folder.path, 'log.txt'))
      handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
      package = logging.getLogger('proxy_nca_jax')
      package.addHandler(handler)
      stack.callback(handler.close)
      stack.callback(package.removeHandler, handler)
    if folder.note:
      _logger.warning('%s', folder.note)
    yield folder


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


def check_same_run(
  config: ml_collections.ConfigDict,
  saved: Mapping,
  *,
  may_add_steps: bool,
) -> None:
  """Raises ValueError if a config would change the mathematics of a saved run.

  Args:
    config: of the new start.
    saved: the config that the run began with, as nested dicts of JSON.
    may_add_steps: whether more steps leave those before as they were.
  """
  new = flatten(as_json(config))
  # What is younger than the run had no other value than its default.
  old = flatten(as_json(default.get_config())) | flatten(saved)
  absent = object()

  def differs(field):
    is_same = new.get(field, absent) == old.get(field, absent)
    if is_same or field in _FREE_FIELDS:
      return False
    is_longer = field == 'num_steps' and new[field] > old[field]
    return not (is_longer and may_add_steps)

  different = [
    f'{field} was {old.get(field, "absent")!r} and is '
    f'{new.get(field, "absent")!r}'
    for field in sorted(new.keys() | old.keys())
    if differs(field)
  ]
  if different:
    raise ValueError(
      'This workdir holds a run with another configuration: '
      f'{"; ".join(different)}. Set these back, or use another workdir.'
    )


def overrides(config: ml_collections.ConfigDict) -> dict:
  """Returns {'group.field': value} of what differs from configs/default.py."""
  defaults = flatten(as_json(default.get_config()))
  return {
    name: value
    for name, value in flatten(as_json(config)).items()
    if value != defaults.get(name)
  }


def as_json(config: ml_collections.ConfigDict) -> dict:
  """Returns a config as nested dicts of what JSON knows."""
  return json.loads(config.to_json_best_effort())


def flatten(tree: Mapping, prefix: str = '') -> dict:
  """Returns {'a.b': value} of nested mappings."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def read_json(path: str) -> dict | None:
  """Reads a file written by `write_json`; None if it does not exist."""
  if not os.path.exists(path):
    return None
  with open(path) as file:
    return json.load(file)


def write_json(path: str, content: Mapping) -> None:
  """Writes a JSON file atomically, on the primary process only."""
  if not processes.is_primary():
    return
  with files.write_atomically(path) as file:
    json.dump(content, file, indent=2)
    file.write('\n')
