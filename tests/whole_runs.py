"""Runs as real processes, and what they leave, as far as two must agree."""

import atexit
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
from unittest import mock

import jax
import made_fonts
import numpy as np

from proxy_nca_jax import state as state_lib
from proxy_nca_jax.runtime import metric_writer

ROOT = pathlib.Path(__file__).parent.parent

_TIMINGS = ('images_per_second', 'steps_per_second', 'input_wait')


def command(config: str, workdir, *flags: str, **fields) -> list[str]:
  """Returns main.py with a config, as a user writes it.

  Args:
    config: a file of configs/, or glyphs or image_folder with a network that
      compiles soon.
    workdir: the value of --workdir.
    *flags: further flags.
    **fields: values of fields of the config.
  """
  path = f'{ROOT}/configs/{config}'
  if '.' not in config:
    path = f'{ROOT}/tests/one_convolution.py:{config}'
  if config == 'glyphs':
    fields = {'dataset.fonts_dir': made_fonts.folder()} | fields
  return [
    sys.executable,
    str(ROOT / 'main.py'),
    f'--config={path}',
    f'--workdir={workdir}',
    *(f'--config.{name}={value}' for name, value in fields.items()),
    *flags,
  ]


def environment() -> dict[str, str]:
  """Returns this one, but with one device, where the tests have eight."""
  flags = os.environ.get('XLA_FLAGS', '').split()
  flags = [flag for flag in flags if 'device_count' not in flag]
  return os.environ | {'XLA_FLAGS': ' '.join(flags), 'PYTHONUNBUFFERED': '1'}


def start(arguments: list[str], *, cwd='/') -> subprocess.Popen:
  """Starts a command; its stdout has all that it prints."""
  return subprocess.Popen(
    arguments,
    # As in a terminal, its processes are a group.
    start_new_session=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=environment(),
    cwd=cwd,
  )


# A server that has imported the program; its children begin at once.
_FORKS = multiprocessing.get_context('forkserver')
_FORKS.set_forkserver_preload(['proxy_nca_jax.train'])


class Fork:
  """A process as `start` gives it, of main.py, that imports nothing again."""

  def __init__(self, arguments: list[str]):
    """Starts it.

    Args:
      arguments: of `command`.
    """
    reader, writer = _FORKS.Pipe(duplex=False)
    self._process = _FORKS.Process(target=_run, args=(arguments[1:], writer))
    # The server and its children have the environment of the first start; it
    # finds the package only by the path.
    path = {'PYTHONPATH': str(ROOT)}
    with mock.patch.dict(os.environ, environment() | path):
      self._process.start()
    writer.close()
    self.stdout = open(os.dup(reader.fileno()))
    self.pid = self._process.pid

  def send_signal(self, number: int) -> None:
    os.kill(self.pid, number)

  def kill(self) -> None:
    self._process.kill()

  def wait(self, timeout: float | None = None) -> int | None:
    """Returns the exit status, or None if there is none by then."""
    self._process.join(timeout)
    return self._process.exitcode


def _run(arguments, output):
  """Runs main.py, in a child of the server."""
  from proxy_nca_jax import commands

  for standard in (1, 2):
    os.dup2(output.fileno(), standard)
  output.close()
  os.chdir('/')
  sys.argv = arguments
  try:
    commands.train(prog='python main.py')
  finally:
    # As any program that ends; a fork would not.
    atexit._run_exitfuncs()


def wait_for(process: subprocess.Popen | Fork, line_start: str) -> str:
  """Returns what a process prints up to the first line that begins so.

  Or all of it, if it ends before.
  """
  output = ''
  for line in process.stdout:
    output += line
    if line.startswith(line_start):
      break
  return output


def finish(process: subprocess.Popen | Fork) -> tuple[int, str]:
  """Returns the exit status of a process, and what it printed since.

  A process that hangs is killed after ten minutes.
  """
  # Not `communicate`: what `wait_for` has read ahead would be lost.
  timer = threading.Timer(600, process.kill)
  timer.start()
  output = process.stdout.read()
  code = process.wait()
  timer.cancel()
  return code, output


def assert_one_line_error(code: int, output: str) -> str:
  """Fails unless wrong input ended as it should; returns its line."""
  assert code == 2, (code, output)
  assert 'Traceback' not in output, output
  (line,) = [line for line in output.splitlines() if 'Error:' in line]
  return line


def results(workdir) -> dict:
  return json.loads(pathlib.Path(workdir, 'results.json').read_text())


def metrics(workdir) -> list[dict]:
  """Returns the rows of metrics.jsonl without what depends on the clock."""
  return [
    {name: value for name, value in row.items() if name not in _TIMINGS}
    for row in metric_writer.read_metrics(str(workdir))
  ]


def final_state(workdir) -> dict:
  """Returns the newest checkpoint, as it is saved, on one device."""
  checkpoints = state_lib.Checkpoints(str(workdir), keep=2)
  step = max(checkpoints.steps)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  saved = checkpoints._checkpointer.load(
    step,
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      checkpoints._checkpointer.metadata(step).metadata,
    ),
  )
  checkpoints.close()
  return saved


def assert_same_state(workdir, other) -> None:
  """Fails unless the newest checkpoints agree in every bit."""
  actual, expected = final_state(workdir), final_state(other)
  assert int(actual['state']['step']) == int(expected['state']['step'])
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
