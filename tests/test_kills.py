"""Runs that are killed or stopped repeatedly end like an undisturbed run."""

import os
import pathlib
import random
import shutil
import signal
import tempfile
import time

import whole_runs
from absl.testing import absltest

# Latest signal, as a fraction of a straight run's duration: runs vary in speed.
_LATEST = 0.85


_FIELDS = {
  'num_steps': 8,
  'batch_size': 32,
  'log_every': 1,
  'save_every': 2,
  'eval_every': 4,
  'dataset.validation': '2/2',
  'dataset.num_classes': 20,
  'model.width': 4,
  'evaluation.nearest_only': True,
  'evaluation.kmeans_iterations': 0,
  'evaluation.baselines': False,
  'report': False,
}


def _start(workdir):
  return whole_runs.Fork(whole_runs.command('glyphs', workdir, **_FIELDS))


def _is_saving(workdir) -> bool:
  """Whether a checkpoint is being written, under a temporary name."""
  folders = (
    pathlib.Path(workdir, name) for name in ('checkpoints', 'selected')
  )
  return any(
    not name.isdigit()
    for folder in folders
    if folder.exists()
    for name in os.listdir(folder)
  )


class KillsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    # Like all later runs, the second finds data and compiled programs cached.
    cls.straight = cls.root / 'straight'
    for workdir in (cls.root / 'first', cls.straight):
      begun = time.monotonic()
      code, output = whole_runs.finish(_start(workdir))
      assert code == 0, output
      cls.duration = time.monotonic() - begun

  def _interrupt(self, number, moments, *, in_save=()):
    """Sends a signal to runs at given moments and compares their final results.

    A run that ends before its moment is compared, and a new one is started.

    Args:
      number: the signal.
      moments: fractions of the duration of a straight run.
      in_save: indices of moments after which the signal waits for a save.

    Returns:
      The number of signals that were sent during a save.
    """
    num_in_saves, index = 0, 0
    workdir = self.root / f'run{number}'
    while index < len(moments) or workdir.exists():
      process = _start(workdir)
      if index < len(moments):
        code = process.wait(moments[index] * self.duration)
        while index in in_save and code is None:
          if _is_saving(workdir):
            num_in_saves += 1
            break
          code = process.wait(0.001)
        if code is None:
          process.send_signal(number)
      code, output = whole_runs.finish(process)
      if code:
        # Without a handler, while starting or ending, the signal kills.
        self.assertIn(code, (128 + number, -number), output)
        self.assertLess(index, len(moments))
        index += 1
        continue
      whole_runs.assert_same_state(workdir, self.straight)
      self.assertEqual(
        whole_runs.metrics(workdir), whole_runs.metrics(self.straight)
      )
      self.assertEqual(
        whole_runs.results(workdir), whole_runs.results(self.straight)
      )
      shutil.rmtree(workdir)
      if index < len(moments):
        # Faster than the straight run: try earlier, so that the loop ends.
        moments[index] *= 0.8
    return num_in_saves

  def test_ten_kills_change_no_bit(self):
    rng = random.Random(0)
    num_in_saves = self._interrupt(
      signal.SIGKILL,
      [rng.uniform(0, _LATEST) for _ in range(10)],
      in_save=range(0, 10, 2),
    )
    self.assertGreater(num_in_saves, 1)

  def test_a_stop_in_every_quarter_of_a_run_changes_no_bit(self):
    moments = [_LATEST * (i + 0.5) / 4 for i in range(4)]
    self._interrupt(signal.SIGTERM, moments)


if __name__ == '__main__':
  absltest.main()
