"""Several processes as one run: found, told the same, stopped together."""

import json
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_T = TypeVar('_T')

# A process that sends no sign of life for so long counts as dead, and the
# others end.
_HEARTBEAT_SECONDS = 30
# One that ends waits so long for the others.
_SHUTDOWN_SECONDS = 10


def initialize(
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  multiprocess: bool = False,
  environment: Mapping[str, str] = os.environ,
) -> None:
  """Joins the processes of a run, before anything asks for the devices.

  Does nothing where there is one process: where no address is given and no
  cluster's environment tells of several.

  Args:
    coordinator_address: HOST:PORT of process 0, where it listens.
    num_processes: of the run; where a cluster tells, it need not be given.
    process_id: of this process, in [0, num_processes); likewise.
    multiprocess: whether there are others though the environment tells of none,
      as on TPU pods, which JAX asks for them.
    environment: of this process.

  Raises:
    ValueError: if what is given is not enough, or does not fit.
    RuntimeError: if the others cannot be reached.
  """
  if not coordinator_address:
    if num_processes is not None or process_id is not None:
      raise ValueError(
        '--num_processes and --process_id need --coordinator_address=HOST:PORT '
        'of process 0.'
      )
    if not multiprocess and not _has_cluster(environment):
      return
  elif (
    num_processes is not None
    and process_id is not None
    and not (0 <= process_id < num_processes)
  ):
    raise ValueError(
      f'--process_id ({process_id}) must be in [0, {num_processes}), the '
      'number of processes.'
    )
  jax.distributed.initialize(
    coordinator_address,
    num_processes,
    process_id,
    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
  )


def _has_cluster(environment: Mapping[str, str]) -> bool:
  """Whether the environment tells of several processes that JAX can find."""
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
  """Whether this process writes for all."""
  return jax.process_index() == 0


def run_on_primary(fn: Callable[[], _T]) -> _T:
  """Calls fn() on process 0, and returns the outcome in all processes.

  All must call it at the same place. What several read from a disk while one
  writes could differ.

  Args:
    fn: returns what JSON holds unchanged.

  Raises:
    ValueError, OSError: on process 0 as fn raises them, and in the others a
      ValueError of the same text.
  """
  if jax.process_count() == 1:
    return fn()
  outcome, error = {}, None
  if is_primary():
    try:
      outcome = {'value': fn()}
    except (ValueError, OSError) as raised:
      error, outcome = raised, {'error': str(raised)}
  outcome = json.loads(_broadcast(json.dumps(outcome).encode()))
  if error is not None:
    raise error
  if 'error' in outcome:
    raise ValueError(outcome['error'])
  return outcome['value']


def _broadcast(content: bytes) -> bytes:
  """Returns the content of process 0."""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  row = np.zeros(size, np.uint8)
  if is_primary():
    row[:] = np.frombuffer(content, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(row)).tobytes()


def true_on_all(value: bool) -> bool:
  """Whether it holds in all processes."""
  return bool(np.all(multihost_utils.process_allgather(np.bool_(value))))
