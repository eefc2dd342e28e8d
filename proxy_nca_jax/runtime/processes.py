"""Runs of several processes: joining them, and agreeing on values."""

import functools
import json
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from proxy_nca_jax.runtime import errors, signals

_T = TypeVar('_T')

# How long a process that failed waits for the others, so that all of them can
# print their error. A process that succeeded waits as long as JAX does.
_FAILURE_SECONDS = 10
# How long a file of another host may take to appear on a shared disk.
_APPEAR_SECONDS = 5
# Variables with a number of processes or slices. JAX does not find the address
# of the last two, which need the flags.
_SIZES = (
  'SLURM_STEP_NUM_TASKS',
  'OMPI_COMM_WORLD_SIZE',
  'MEGASCALE_NUM_SLICES',
  'PMI_SIZE',
  'WORLD_SIZE',
)
_TPU_METADATA = (
  'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'
  'worker-network-endpoints'
)


def devices() -> list[jax.Device]:
  """Returns the devices of all processes.

  Raises:
    ValueError: if JAX finds none, as with JAX_PLATFORMS=cuda without a GPU.
  """
  try:
    return jax.devices()
  # JAX asserts that there is a default backend.
  except (RuntimeError, AssertionError) as error:
    raise ValueError(
      'JAX finds no device for '
      f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")!r} '
      f'({errors.one_line(error)}): install the jax of this platform, or unset '
      'the variable.'
    ) from error


def initialize(
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  multiprocess: bool = False,
  environment: Mapping[str, str] = os.environ,
) -> None:
  """Joins the processes of a run; must precede any use of the devices.

  Does nothing in a single-process run: without an address, unless the
  environment is that of a cluster with several processes.

  Args:
    coordinator_address: HOST:PORT on which process 0 listens.
    num_processes: number of processes in the run; detected on a cluster.
    process_id: index of this process, in [0, num_processes); detected on a
      cluster.
    multiprocess: joins other processes even if the environment does not show
      them, as in an Indexed Job of Kubernetes, whose pods can be a run each.
    environment: the environment variables of this process.

  Raises:
    ValueError: if the arguments are incomplete or out of range.
    RuntimeError: if the other processes cannot be reached.
  """
  if not coordinator_address:
    if num_processes is not None or process_id is not None:
      raise ValueError(
        '--num_processes and --process_id require --coordinator_address='
        'HOST:PORT of process 0.'
      )
    if not multiprocess and not _has_cluster(environment):
      return
  elif (
    num_processes is not None
    and process_id is not None
    and not (0 <= process_id < num_processes)
  ):
    raise ValueError(
      f'--process_id ({process_id}) must be in [0, {num_processes}), the range '
      'given by --num_processes.'
    )
  try:
    jax.distributed.initialize(coordinator_address, num_processes, process_id)
  except (ValueError, KeyError) as error:
    raise ValueError(
      'JAX does not find the other processes of this run '
      f'({errors.one_line(error)}): give --coordinator_address=HOST:PORT of '
      'process 0, --num_processes and --process_id. For a run of one process, '
      f'unset those of these variables that are set: {", ".join(_SIZES)}.'
    ) from error


def _has_cluster(
  environment: Mapping[str, str],
  read_metadata: Callable[[], str] = lambda: _read_tpu_metadata(),
) -> bool:
  """Whether the environment shows several processes.

  Args:
    environment: the environment variables of this process.
    read_metadata: returns the hosts of a slice of TPU VMs, comma-separated.
  """
  sizes = [environment.get(name, '1') for name in _SIZES]
  if 'JAX_COORDINATOR_ADDRESS' in environment or any(
    size.isdigit() and int(size) > 1 for size in sizes
  ):
    return True
  for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'):
    if name in environment:  # GKE sets them, also on a single host.
      return ',' in environment[name]
  # `import jax` sets it on a machine with TPUs.
  is_tpu = environment.get('TPU_ML_PLATFORM') == 'JAX'
  is_used = 'tpu' in environment.get('JAX_PLATFORMS', 'tpu')
  if not is_tpu or not is_used or 'TPU_SKIP_MDS_QUERY' in environment:
    return False
  try:
    return ',' in read_metadata()
  except OSError:  # Not a TPU VM of Google Cloud.
    return False


def _read_tpu_metadata() -> str:
  request = urllib.request.Request(
    _TPU_METADATA, headers={'Metadata-Flavor': 'Google'}
  )
  with urllib.request.urlopen(request, timeout=5) as response:
    return response.read().decode()


def leave_after_failure() -> None:
  """Ends this process soon, even if other processes do not end.

  Otherwise it would wait for them as long as after a success.
  """
  if jax.process_count() > 1:
    timer = threading.Timer(_FAILURE_SECONDS, os._exit, (2,))
    timer.daemon = True
    timer.start()


def is_primary() -> bool:
  """Whether this is process 0, which writes files and logs for the run."""
  return jax.process_index() == 0


def run_on_primary(fn: Callable[[], _T]) -> _T:
  """Calls fn() on the primary process and returns its result on all.

  A collective operation: all processes must call it at the same point. It keeps
  them consistent where each could read a file in a different state.

  Args:
    fn: returns a value that JSON preserves.

  Raises:
    BaseException: whatever fn raises, on the primary process; on the others a
      ValueError with the same text, since they would wait forever otherwise, or
      `signals.Stopped` if the primary process was stopped.
  """
  if jax.process_count() == 1:
    return fn()
  content, error = _call(fn) if is_primary() else (b'', None)
  content = _broadcast(content)
  if error is not None:
    raise error
  return _value(content)


def run_on_each(fn: Callable[[], _T]) -> list[_T]:
  """Calls fn() on every process and returns all results, in order, on all.

  A collective operation: all processes must call it at the same point.

  Args:
    fn: returns a value that JSON preserves.

  Raises:
    BaseException: whatever fn raises, on that process; on the others a
      ValueError with its text and the number of the process, or
      `signals.Stopped` if it was stopped.
  """
  if jax.process_count() == 1:
    return [fn()]
  content, error = _call(fn)
  contents = _gather(content)
  if error is not None:
    raise error
  return [
    _value(content, f'On process {index}: ')
    for index, content in enumerate(contents)
  ]


def _call(fn: Callable[[], _T]) -> tuple[bytes, BaseException | None]:
  """Calls fn(); returns its outcome for the other processes, and its error."""
  try:
    return json.dumps({'value': fn()}).encode(), None
  except BaseException as error:
    text = str(error)
    if not isinstance(error, ValueError | OSError):
      process = jax.process_index()
      text = f'Process {process} has failed: {type(error).__name__}: {text}'
    stopped = error.number if isinstance(error, signals.Stopped) else 0
    return json.dumps({'error': text, 'stopped': stopped}).encode(), error


def _value(content: bytes, where: str = ''):
  """Returns the value of an outcome of `_call`, or raises its error."""
  outcome = json.loads(content)
  if outcome.get('stopped'):
    raise signals.Stopped(outcome['stopped'])
  if 'error' in outcome:
    raise ValueError(where + outcome['error'])
  return outcome['value']


def find_apart(folder: str) -> list[int]:
  """Returns the processes that see another folder than the primary process.

  A collective operation. The primary process writes a file with a random name
  into the folder, and the others look for it.

  Args:
    folder: a path on each process; the primary process creates the folder.

  Raises:
    OSError: if the primary process cannot write there; on the others it is a
      ValueError.
  """
  if jax.process_count() == 1:
    return []
  name = run_on_primary(functools.partial(_write_mark, folder))
  path = os.path.join(folder, name)
  is_seen = run_on_each(functools.partial(_appears, path))
  if is_primary():
    os.remove(path)
  return [index for index, seen in enumerate(is_seen) if not seen]


def _write_mark(folder: str) -> str:
  os.makedirs(folder, exist_ok=True)
  descriptor, path = tempfile.mkstemp(prefix='.shared_', dir=folder)
  os.close(descriptor)
  return os.path.basename(path)


def _appears(path: str) -> bool:
  end = time.monotonic() + _APPEAR_SECONDS
  while not os.path.exists(path):
    if time.monotonic() > end:
      return False
    time.sleep(0.1)
  return True


def _broadcast(content: bytes) -> bytes:
  """Returns the primary process's bytes on all processes."""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  row = np.zeros(size, np.uint8)
  if is_primary():
    row[:] = np.frombuffer(content, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(row)).tobytes()


def _gather(content: bytes) -> list[bytes]:
  """Returns the bytes of each process on all processes."""
  sizes = multihost_utils.process_allgather(np.int32(len(content)))
  row = np.zeros(sizes.max(), np.uint8)
  row[: len(content)] = np.frombuffer(content, np.uint8)
  rows = multihost_utils.process_allgather(row)
  return [row[:size].tobytes() for row, size in zip(rows, sizes)]


def true_on_all(value: bool) -> bool:
  """Whether the value is true on all processes; a collective operation."""
  return bool(np.all(multihost_utils.process_allgather(np.bool_(value))))
