import os
import signal
import subprocess
import sys

from absl.testing import absltest

from proxy_nca_jax import locks

_HOLD = """
import os, sys, time
from proxy_nca_jax import locks
with locks.hold(sys.argv[1]):
  if len(sys.argv) > 2 and os.fork() == 0:
    time.sleep(60)
  print('held', os.getpid(), flush=True)
  time.sleep(60)
"""


class LocksTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.path = os.path.join(self.create_tempdir(), 'lock')

  def _start_holder(self, *arguments):
    process = subprocess.Popen(
      [sys.executable, '-c', _HOLD, self.path, *arguments],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
      start_new_session=True,
    )
    self.addCleanup(self._end, process)
    self.assertIn('held', process.stdout.readline())
    return process

  def _end(self, process):
    try:
      os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    process.wait()
    process.stdout.close()

  def test_a_second_process_is_refused_until_the_first_is_killed(self):
    holder = self._start_holder()
    with self.assertRaises(BlockingIOError):
      with locks.hold(self.path, wait=False):
        pass
    holder.kill()
    holder.wait()
    with locks.hold(self.path, wait=False):
      pass

  def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(self):
    holder = self._start_holder('fork')
    holder.kill()
    holder.wait()
    with locks.hold(self.path, wait=False):
      pass

  def test_a_released_lock_can_be_taken_again(self):
    for _ in range(2):
      with locks.hold(self.path, wait=False):
        pass


if __name__ == '__main__':
  absltest.main()
