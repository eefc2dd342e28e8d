"""Runs of several processes: joining them, and agreeing on values."""

import json
import os
import threading
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
  content, error = b'', None
  if is_primary():
    try:
      content = json.dumps({'value': fn()}).encode()
    except BaseException as raised:
      error, text = raised, str(raised)
      if not isinstance(raised, ValueError | OSError):
        text = f'Process 0 has failed: {type(raised).__name__}: {text}'
      stopped = raised.number if isinstance(raised, signals.Stopped) else 0
      content = json.dumps({'error': text, 'stopped': stopped}).encode()
  outcome = json.loads(_broadcast(content))
  if error is not None:
    raise error
  if outcome.get('stopped'):
    raise signals.Stopped(outcome['stopped'])
  if 'error' in outcome:
    raise ValueError(outcome['error'])
  return outcome['value']


def _broadcast(content: bytes) -> bytes:
  """Returns the primary process's bytes on all processes."""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  row = np.zeros(size, np.uint8)
  if is_primary():
    row[:] = np.frombuffer(content, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(row)).tobytes()


def true_on_all(value: bool) -> bool:
  """Whether the value is true on all processes; a collective operation."""
  return bool(np.all(multihost_utils.process_allgather(np.bool_(value))))
