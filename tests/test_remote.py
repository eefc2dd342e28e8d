import contextlib
import json
import os
import tempfile
import time
from unittest import mock

import fsspec
from absl.testing import absltest

from proxy_nca_jax.runtime import remote


class MirrorTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.storage = fsspec.filesystem('memory')
    self.url = f'memory://bucket/{self.id()}'
    self.addCleanup(self.storage.store.clear)
    # The folder of the local copies.
    copies = self.create_tempdir().full_path
    self.enter_context(mock.patch.object(tempfile, 'tempdir', copies))
    self.copies = copies

  def _mirrored(self):
    return remote.mirrored(self.url, lease_seconds=0.4)

  def _write(self, folder, name, content='x'):
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file:
      file.write(content)

  def _run(self, *names):
    """Starts and ends a run that writes these files.

    Returns:
      {name: content} of the files that it found at its start.
    """
    with self._mirrored() as (folder, _, _):
      found = self._read(folder)
      for name in names:
        self._write(folder, name)
    return found

  def _read(self, folder):
    files = {}
    for parent, _, names in os.walk(folder):
      for name in names:
        path = os.path.join(parent, name)
        with open(path) as file:
          files[os.path.relpath(path, folder)] = file.read()
    return files

  def _remote(self):
    return {
      path.removeprefix(f'/bucket/{self.id()}/')
      for path in self.storage.find(self.url)
    }

  def _wait_until(self, condition):
    deadline = time.monotonic() + 10
    while not condition():
      self.assertLess(time.monotonic(), deadline, self._remote())
      time.sleep(0.01)

  def test_a_run_finds_the_files_of_the_previous_run(self):
    self.assertEqual(self._run('log.txt', 'checkpoints/1/a'), {})
    self.assertEqual(
      self._remote(), {'log.txt', 'checkpoints/1/a', 'manifest.json'}
    )
    self.assertEqual(self._run(), {'log.txt': 'x', 'checkpoints/1/a': 'x'})
    self.assertEmpty(os.listdir(self.copies))

  def test_changes_are_uploaded_during_the_run(self):
    with self._mirrored() as (folder, publish, _):
      self._write(folder, 'log.txt', 'one')
      self._write(folder, 'checkpoints/1.orbax-checkpoint-tmp/a')
      self._write(folder, 'results.json.tmp')
      publish()
      self._wait_until(lambda: 'log.txt' in self._remote())
      self._write(folder, 'log.txt', 'one two')
      self._wait_until(lambda: publish() or self._log() == 'one two')
      self.assertEqual(
        self._remote(), {'log.txt', 'lease.json', 'manifest.json'}
      )

  def _log(self):
    return self.storage.cat_file(f'{self.url}/log.txt').decode()

  def test_unchanged_files_are_not_uploaded_again(self):
    self._run('a', 'b')
    with mock.patch.object(type(self.storage), 'put', autospec=True) as put:
      self._run('b')
    self.assertEqual([os.path.basename(put.call_args.args[2][0])], ['b'])
    self.assertLen(put.call_args.args[2], 1)

  def test_files_that_the_run_removes_are_removed(self):
    self._run('checkpoints/1/a', 'checkpoints/2/a')
    with self._mirrored() as (folder, _, _):
      os.remove(os.path.join(folder, 'checkpoints/1/a'))
    self.assertEqual(self._remote(), {'checkpoints/2/a', 'manifest.json'})

  def test_an_interrupted_upload_is_never_mistaken_for_a_complete_one(self):
    self._run('log.txt', 'checkpoints/1/a', 'checkpoints/1/b')
    whole = ['checkpoints/1/a', 'checkpoints/1/b', 'log.txt']
    new = ['checkpoints/2/a', 'checkpoints/2/b']
    for number_that_arrive in range(3):
      with self.assertRaisesRegex(OSError, 'machine is gone.*copy that folder'):
        with self._mirrored() as (folder, _, _):
          for name in new:
            self._write(folder, name)
          self._break_after(number_that_arrive)
      mock.patch.stopall()
      self.assertEqual(
        {n for n in self._remote() if n in new}, set(new[:number_that_arrive])
      )
      self.assertEqual(sorted(self._run()), whole)
      # The leftovers are removed.
      self.assertEqual(self._remote(), {*whole, 'manifest.json'})

  def _break_after(self, number):
    """Lets `number` files arrive and fails every later upload."""
    storage_type = type(self.storage)
    put_file, pipe_file = storage_type.put_file, storage_type.pipe_file
    arrived = []

    def put_some(storage, source, target, **kwargs):
      if len(arrived) == number:
        raise ConnectionError('The machine is gone.')
      arrived.append(target)
      put_file(storage, source, target, **kwargs)

    def pipe_only_lease(storage, path, content):
      if not path.endswith('lease.json'):
        raise ConnectionError('The machine is gone.')
      pipe_file(storage, path, content)

    mock.patch.object(storage_type, 'put_file', put_some).start()
    mock.patch.object(storage_type, 'pipe_file', pipe_only_lease).start()

  def test_a_failed_upload_is_retried_and_the_run_continues(self):
    with self._mirrored() as (folder, publish, _):
      self._write(folder, 'log.txt')
      with contextlib.ExitStack() as stack:
        logs = stack.enter_context(self.assertLogs('proxy_nca_jax', 'WARNING'))
        stack.enter_context(
          mock.patch.object(
            type(self.storage), 'put', side_effect=ConnectionError('no route')
          )
        )
        publish()
        self._wait_until(lambda: logs.output)
      self.assertIn('no route', logs.output[0])
      publish()
      self._wait_until(lambda: 'log.txt' in self._remote())

  def test_the_local_copy_is_kept_if_the_last_upload_fails(self):
    with mock.patch.object(
      type(self.storage), 'put', side_effect=ConnectionError('no route')
    ):
      with self.assertRaisesRegex(OSError, 'ConnectionError: no route'):
        self._run('log.txt')
    (copy,) = os.listdir(self.copies)
    self.assertEqual(
      self._read(os.path.join(self.copies, copy)), {'log.txt': 'x'}
    )

  def test_a_damaged_manifest_is_named(self):
    for content in (b'?', b'{}', b'[1]', b'["a/../../b"]', b'["/a"]', b'\xff'):
      self.storage.pipe_file(f'{self.url}/manifest.json', content)
      with self.assertRaisesRegex(ValueError, 'manifest.json. is damaged'):
        with self._mirrored():
          self.fail('It was opened.')

  def test_a_folder_without_a_manifest_is_downloaded_whole(self):
    for name in ('run.json', 'checkpoints/1/a'):
      self.storage.pipe_file(f'{self.url}/{name}', b'y')
    paths = self.storage.find(self.url)
    # An object that some web consoles create for a folder.
    paths.append(f'/bucket/{self.id()}/checkpoints/')
    with mock.patch.object(type(self.storage), 'find', return_value=paths):
      found = self._run()
    self.assertEqual(found, {'run.json': 'y', 'checkpoints/1/a': 'y'})
    self.assertEqual(
      json.loads(self.storage.cat_file(f'{self.url}/manifest.json')),
      ['checkpoints/1/a', 'run.json'],
    )

  def test_lost_files_are_named(self):
    self._run('log.txt', 'checkpoints/1/a')
    self.storage.rm_file(f'{self.url}/checkpoints/1/a')
    with self.assertLogs('proxy_nca_jax', 'WARNING') as logs:
      self.assertEqual(self._run(), {'log.txt': 'x'})
    self.assertIn('checkpoints/1/a', logs.output[0])

  def test_a_second_run_is_refused(self):
    with self._mirrored():
      with self.assertRaisesRegex(BlockingIOError, 'lease expires in'):
        self._run()

  def test_a_run_whose_lease_is_taken_stops_and_writes_nothing_more(self):
    events = []
    with self.assertRaisesRegex(remote.LeaseLost, 'taken over by another'):
      with self._mirrored() as (folder, publish, _):
        lease = {'owner': 'another', 'renewed': time.time(), 'seconds': 60}
        self.storage.pipe_file(
          f'{self.url}/lease.json', json.dumps(lease).encode()
        )
        self._write(folder, 'log.txt')
        publish()
        # The call after the failed upload raises it, which ends training.
        with self.assertRaises(remote.LeaseLost):
          self._wait_until(publish)
        events.append('raised in the block')
    self.assertEqual(events, ['raised in the block'])
    self.assertEqual(self._remote(), {'lease.json', 'manifest.json'})
    self.assertEmpty(os.listdir(self.copies))

  def test_an_interrupted_write_on_disk_keeps_the_old_file(self):
    storage = self.create_tempdir().full_path
    for content in ('before', 'after'):
      with contextlib.ExitStack() as stack:
        if content == 'after':
          # As if killed when the bytes are written.
          stack.enter_context(
            mock.patch.object(os, 'replace', side_effect=OSError('killed'))
          )
          stack.enter_context(self.assertRaisesRegex(OSError, 'killed'))
        with remote.mirrored(f'file://{storage}', lease_seconds=60) as run:
          self._write(run[0], 'log.txt', content)
    files = self._read(storage)
    self.assertEqual(files['log.txt'], 'before')
    self.assertEqual(json.loads(files['manifest.json']), ['log.txt'])

  def test_storage_that_cannot_be_opened_is_named(self):
    with self.assertRaisesRegex(ValueError, 'nonsense'):
      with remote.mirrored('nonsense://bucket/run', lease_seconds=1):
        pass
    with mock.patch.object(
      fsspec, 'url_to_fs', side_effect=ImportError('Please install gcsfs')
    ):
      with self.assertRaisesRegex(ValueError, 'gs://b/r.*install gcsfs'):
        with remote.mirrored('gs://b/r', lease_seconds=1):
          pass


if __name__ == '__main__':
  absltest.main()
