import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest

import proxy_nca_jax
from proxy_nca_jax.runtime import parent

# The first library that the package imports takes ten minutes in a worker.
_JAX = """
import os, pathlib, sys, time
started = pathlib.Path(sys.argv[1])
started.with_suffix('.tmp').write_text(str(os.getpid()))
started.with_suffix('.tmp').rename(started)
time.sleep(600)
"""
_RUN = f"""
import importlib.util, multiprocessing, time
if __name__ == '__main__':
  spec = importlib.util.spec_from_file_location('parent', {parent.__file__!r})
  parent = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(parent)
  with parent.starting_workers():
    multiprocessing.get_context('spawn').Process(target=print).start()
  time.sleep(600)
else:
  import proxy_nca_jax.losses
"""


def _wait_until(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline, 'Nothing happened in 60 seconds.'
    time.sleep(0.05)


def _has_ended(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
  except FileNotFoundError:
    return True
  return state.split()[0] == 'Z'


class ParentTest(absltest.TestCase):
  def test_a_worker_that_is_starting_ends_with_its_killed_run(self):
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / 'jax.py').write_text(_JAX)
    (folder / 'run.py').write_text(_RUN)
    package = pathlib.Path(proxy_nca_jax.__file__).parent.parent
    run = subprocess.Popen(
      [sys.executable, str(folder / 'run.py'), str(folder / 'started')],
      env={**os.environ, 'PYTHONPATH': f'{folder}{os.pathsep}{package}'},
    )
    try:
      _wait_until((folder / 'started').exists)
      worker = int((folder / 'started').read_text())
      self.assertFalse(_has_ended(worker))
    finally:
      run.kill()
      run.wait()
    try:
      _wait_until(lambda: _has_ended(worker))
    finally:
      if not _has_ended(worker):
        os.kill(worker, signal.SIGKILL)

  def test_other_processes_do_not_watch(self):
    with parent.starting_workers():
      child = subprocess.run(
        [
          sys.executable,
          '-c',
          'import threading; from proxy_nca_jax.runtime import parent; '
          'parent.watch_if_worker(); print(threading.active_count())',
        ],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
      )
    self.assertEqual(child.stdout, '1\n', child.stderr)
    self.assertNotIn('PROXY_NCA_JAX_PARENT', os.environ)


if __name__ == '__main__':
  absltest.main()
