import json
import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import fsspec
from absl.testing import absltest

from proxy_nca_jax.runtime import lock, remote, signals

_HOLD = """
import os, sys, time
from proxy_nca_jax.runtime import lock
with lock.locked(sys.argv[1]):
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
      with lock.locked(self.path, wait=False):
        pass
    holder.kill()
    holder.wait()
    with lock.locked(self.path, wait=False):
      pass

  def test_a_stop_signal_ends_the_wait(self):
    self._start_holder()
    kill = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    with signals.StopSignals():
      kill.start()
      with self.assertRaises(signals.Stopped):
        with lock.locked(self.path):
          self.fail('Two processes hold the lock.')

  def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(self):
    holder = self._start_holder('fork')
    holder.kill()
    holder.wait()
    with lock.locked(self.path, wait=False):
      pass

  def test_a_released_lock_can_be_taken_again(self):
    for _ in range(2):
      with lock.locked(self.path, wait=False):
        pass


class LeaseTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.storage = fsspec.filesystem('memory')
    self.path = f'/{self.id()}/lease.json'

  def _lease(self, seconds=0.4):
    return remote.Lease(self.storage, self.path, seconds=seconds)

  def _content(self):
    return json.loads(self.storage.cat_file(self.path))

  def _write(self, *, age, owner='another', seconds=10):
    content = {'owner': owner, 'renewed': time.time() - age, 'seconds': seconds}
    self.storage.pipe_file(self.path, json.dumps(content).encode())

  def test_a_second_holder_is_refused_and_the_first_named(self):
    with self._lease() as first:
      with self.assertRaisesRegex(BlockingIOError, first.owner):
        with self._lease():
          pass
      self.assertEqual(self._content()['owner'], first.owner)

  def test_a_released_lease_can_be_taken_again(self):
    for _ in range(2):
      with self._lease():
        pass
    self.assertFalse(self.storage.exists(self.path))

  def test_it_is_renewed_beyond_its_duration(self):
    with self._lease():
      begun = self._content()['renewed']
      time.sleep(1.0)  # 2.5 times its duration.
      self.assertGreater(self._content()['renewed'], begun + 0.5)
      with self.assertRaises(BlockingIOError):
        with self._lease():
          pass

  def test_an_expired_lease_is_taken_over_and_its_owner_named(self):
    self._write(age=9)
    with self.assertRaisesRegex(BlockingIOError, 'another.*expires in 1 s'):
      with self._lease():
        pass
    self._write(age=11)
    with self._lease() as lease:
      self.assertEqual(self._content()['owner'], lease.owner)
      self.assertIn(
        'over from another, whose lease expired 1 s ago', lease.note
      )

  def test_a_holder_whose_lease_was_taken_fails_and_leaves_it(self):
    with self._lease() as lease:
      lease.renew()
      self._write(age=0)
      with self.assertRaisesRegex(remote.LeaseLost, 'taken over by another'):
        lease.renew()
      time.sleep(0.3)  # It is not renewed in the background either.
      self.assertEqual(self._content()['owner'], 'another')
    self.assertEqual(self._content()['owner'], 'another')

  def test_a_removed_lease_is_lost(self):
    with self._lease() as lease:
      self.storage.rm_file(self.path)
      with self.assertRaisesRegex(remote.LeaseLost, 'removed'):
        lease.renew()

  def test_of_two_simultaneous_starts_the_first_to_write_is_refused(self):
    # The other has seen no lease either, and writes during the pause.
    with mock.patch.object(
      time, 'sleep', side_effect=lambda _: self._write(age=0)
    ):
      with self.assertRaisesRegex(BlockingIOError, 'another'):
        with self._lease():
          pass
    self.assertEqual(self._content()['owner'], 'another')

  def test_a_failed_renewal_is_retried(self):
    with self._lease():
      with self.assertLogs('proxy_nca_jax', 'WARNING') as logs:
        with mock.patch.object(
          type(self.storage), 'pipe_file', side_effect=OSError('no route')
        ):
          time.sleep(0.25)
      self.assertIn('no route', logs.output[0])
      begun = self._content()['renewed']
      time.sleep(0.25)
      self.assertGreater(self._content()['renewed'], begun)

  def test_another_file_in_its_place_is_named(self):
    for content in (
      b'?',
      b'[]',
      b'{}',
      b'\xff',
      b'{"owner": 1, "renewed": 1, "seconds": 1}',
      b'{"owner": "a", "renewed": "1", "seconds": 1}',
      b'{"owner": "a", "renewed": 1, "seconds": NaN}',
    ):
      self.storage.pipe_file(self.path, content)
      with self.assertRaisesRegex(ValueError, 'is not a lease: delete it'):
        with self._lease():
          pass


if __name__ == '__main__':
  absltest.main()
