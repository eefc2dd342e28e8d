"""Processes of one run as threads of one process, which exchange bytes."""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from unittest import mock

import jax

from proxy_nca_jax.runtime import processes


def run(fns: Sequence[Callable]) -> list:
  """Calls each function as a process of one run.

  Only what `processes` exchanges is exchanged, and no array.

  Returns:
    The result of each function, or the exception that it raised.
  """
  barrier = threading.Barrier(len(fns), timeout=60)
  contents, local = [b''] * len(fns), threading.local()

  def gather(content):
    contents[local.index] = content
    barrier.wait()
    gathered = list(contents)
    barrier.wait()
    return gathered

  def call(index, fn):
    local.index = index
    try:
      return fn()
    except BaseException as error:
      return error

  with (
    mock.patch.multiple(
      jax,
      process_count=lambda: len(fns),
      process_index=lambda: local.index,
    ),
    mock.patch.multiple(
      processes,
      _gather=gather,
      _broadcast=lambda content: gather(content)[0],
    ),
    futures.ThreadPoolExecutor(len(fns)) as pool,
  ):
    return list(pool.map(call, range(len(fns)), fns))
