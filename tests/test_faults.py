"""Whole runs, as real processes, whose disk, data or machine fails.

Each ends with a one-line error that says what to do. The same command then
resumes and reaches, bit for bit, the parameters and metrics of a straight run.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

import numpy as np
import whole_runs
from absl.testing import absltest
from PIL import Image

_FIELDS = {
  'num_steps': 60,
  'batch_size': 16,
  'log_every': 1,
  'save_every': 10,
  'evaluation.baselines': False,
  'evaluation.kmeans_iterations': 0,
  'evaluation.nearest_only': True,
  'report': False,
  'dataset.resize': 64,
  'dataset.image_size': 32,
  'model.width': 4,
}
# A mount namespace of its own, in which a user may mount a small disk.
_UNSHARE = ('unshare', '--map-root-user', '--mount')


def _can_unshare():
  return (
    shutil.which('unshare')
    and not subprocess.run(
      [*_UNSHARE, 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt'], capture_output=True
    ).returncode
  )


def _write_images(root):
  """Writes 20 classes of 10 noise images, 64 x 64: megabytes of records."""
  rng = np.random.default_rng(0)
  for label in range(20):
    folder = root / f'class{label}'
    folder.mkdir(parents=True)
    for number in range(10):
      pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(folder / f'{number}.png')


class FaultsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    _write_images(cls.root / 'images')
    cls.straight = cls.root / 'straight'
    cls.data_dir = cls.root / 'data'
    code, output = cls._run(cls.straight)
    assert code == 0, output

  @classmethod
  def _command(cls, workdir):
    fields = {
      'dataset.root': cls.root / 'images',
      'dataset.data_dir': cls.data_dir,
    }
    return whole_runs.command('image_folder', workdir, **fields, **_FIELDS)

  @classmethod
  def _run(cls, workdir):
    return whole_runs.finish(whole_runs.Fork(cls._command(workdir)))

  def _break(self, do, line_start, workdir):
    """Starts a run and calls do(process) when a line starts with `line_start`.

    Returns:
      (exit status, output).
    """
    process = whole_runs.Fork(self._command(workdir))
    begun = whole_runs.wait_for(process, line_start)
    do(process)
    code, output = whole_runs.finish(process)
    return code, begun + output

  def _assert_one_line(self, code, output, message):
    line = whole_runs.assert_one_line_error(code, output)
    self.assertRegex(line, message)

  def _assert_equals_straight(self, workdir):
    self.assertEqual(
      whole_runs.metrics(workdir), whole_runs.metrics(self.straight)
    )
    whole_runs.assert_same_state(workdir, self.straight)

  def test_a_run_resumes_after_a_full_and_a_read_only_disk(self):
    if not _can_unshare():
      self.skipTest('Needs unshare(1) with user namespaces for a small disk.')
    disk = self.root / 'disk'
    disk.mkdir()
    run = ' '.join(map(str, self._command(disk / 'run')))
    copied = self.root / 'copied'
    script = f"""
      mount -t tmpfs -o size=4m tmpfs {disk}
      {run} > {copied}.full 2>&1 & pid=$!
      until test -d {disk}/run/checkpoints/10; do sleep 0.02; done
      cat /dev/zero > {disk}/filler 2> /dev/null
      wait $pid; echo $?
      ls {disk}/run/checkpoints > {copied}.saved
      rm {disk}/filler
      mount -o remount,ro {disk}
      {run} > {copied}.read_only 2>&1; echo $?
      mount -o remount,rw {disk}
      {run} > {copied}.on 2>&1; echo $?
      cp -r {disk}/run {copied}
    """
    codes = subprocess.run(
      [*_UNSHARE, 'sh', '-c', script],
      env=whole_runs.environment(),
      stdout=subprocess.PIPE,
      text=True,
      timeout=600,
    ).stdout.split()
    full, saved, read_only, on = (
      pathlib.Path(f'{copied}.{name}').read_text()
      for name in ('full', 'saved', 'read_only', 'on')
    )
    self._assert_one_line(
      int(codes[0]), full, 'disk is full.*start the same command'
    )
    self.assertIn('10', saved.split())
    self._assert_one_line(
      int(codes[1]), read_only, f'Read-only file system.*{disk}/run'
    )
    self.assertEqual(int(codes[2]), 0, on)
    self.assertRegex(on, r'Resuming after step \d+')
    self._assert_equals_straight(copied)

  def test_a_run_resumes_once_truncated_data_is_restored(self):
    workdir = self.root / 'cut_short'
    (file,) = self.data_dir.glob('image_folder/*/*/*.array_record*')
    content = file.read_bytes()
    message = f'Record .* from .{file}.*[Rr]estore that file.*same command'

    def cut(process):
      del process
      os.truncate(file, len(content) // 2)

    code, output = self._break(cut, 'step 25/60', workdir)
    self._assert_one_line(code, output, message)
    # It does not start with truncated data either.
    code, output = self._run(workdir)
    self._assert_one_line(code, output, message)
    file.unlink()
    code, output = self._run(workdir)
    self._assert_one_line(code, output, message)
    file.write_bytes(content)
    code, output = self._run(workdir)
    self.assertEqual(code, 0, output)
    self.assertRegex(output, 'Resuming after step [23]0')
    self._assert_equals_straight(workdir)

  def test_a_killed_run_on_remote_storage_resumes_elsewhere(self):
    remote = self.root / 'remote'
    url = f'file://{remote}'

    def kill(process):
      # As soon as a checkpoint has been uploaded.
      manifest = remote / 'manifest.json'
      while 'checkpoints/' not in manifest.read_text():
        time.sleep(0.01)
      process.send_signal(signal.SIGKILL)

    code, output = self._break(kill, 'step 15/60', url)
    self.assertEqual(code, -signal.SIGKILL, output)
    code, output = self._run(url)
    self._assert_one_line(
      code, output, f'Another run is using .{url}.*wait for it'
    )
    # As if two minutes had passed.
    lease = json.loads((remote / 'lease.json').read_text())
    lease['renewed'] -= 120
    (remote / 'lease.json').write_text(json.dumps(lease))
    code, output = self._run(url)
    self.assertEqual(code, 0, output)
    self.assertRegex(output, r'Resuming after step \d+')
    self._assert_equals_straight(remote)
    self.assertIn(
      f'over from {lease["owner"]}', (remote / 'log.txt').read_text()
    )
    self.assertFalse((remote / 'lease.json').exists())


if __name__ == '__main__':
  absltest.main()
