"""Runs of several processes: joining them, and agreeing on values."""

import json
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from proxy_nca_jax.runtime import errors

_T = TypeVar('_T')

# A process without a heartbeat for this long counts as dead; the others stop.
_HEARTBEAT_SECONDS = 30
# How long a process that ends waits for the others.
_SHUTDOWN_SECONDS = 10


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
      them, as on TPU pods, where JAX queries the metadata server.
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
  jax.distributed.initialize(
    coordinator_address,
    num_processes,
    process_id,
    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
  )


def _has_cluster(environment: Mapping[str, str]) -> bool:
  """Whether the environment shows several processes that JAX can detect."""
  sizes = [
    environment.get(name, '1')
    for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  ]
  hosts = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
  return (
    'JAX_COORDINATOR_ADDRESS' in environment
    or any(size.isdigit() and int(size) > 1 for size in sizes)
    or len(hosts) > 1
  )


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
      ValueError with the same text, since they would wait forever otherwise.
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
      content = json.dumps({'error': text}).encode()
  outcome = json.loads(_broadcast(content))
  if error is not None:
    raise error
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
