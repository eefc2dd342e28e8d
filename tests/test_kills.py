"""A run that is stopped and killed again and again ends as one that was not."""

import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time
from unittest import mock

import whole_runs
from absl.testing import absltest

from configs import glyphs
from proxy_nca_jax import train

_NUM_KILLS = 30


def _train(workdir, data_dir):
  """Trains; at the top of a module, as another process must find it."""
  config = glyphs.get_config()
  config.update_from_flattened_dict({
    'num_steps': 24, 'batch_size': 32, 'log_every': 1, 'save_every': 2,
    'eval_every': 8, 'dataset.validation': '2/2', 'dataset.num_classes': 20,
    'dataset.data_dir': data_dir, 'model.width': 4,
    'evaluation.kmeans_iterations': 0,
  })
  train.train_and_evaluate(config, workdir)


def _is_saving(workdir) -> bool:
  """Whether a checkpoint is being written: it has no name yet."""
  folders = (
    pathlib.Path(workdir, name) for name in ('checkpoints', 'selected')
  )
  return any(
    not name.isdigit()
    for folder in folders if folder.exists() for name in os.listdir(folder)
  )


class KillsTest(absltest.TestCase):

  def test_thirty_kills_and_fifteen_stops_change_no_bit(self):
    # The server imports once; each run is a process of its own, forked from it.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__])
    # With one device, where the tests' own processes have eight.
    self.enter_context(mock.patch.dict(os.environ, {'XLA_FLAGS': ''}))
    root = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, root)

    def start(workdir):
      process = context.Process(
        target=_train, args=(str(workdir), str(root / 'data'))
      )
      process.start()
      return process

    straight = root / 'straight'
    for _ in range(2):  # The second has what is prepared and compiled.
      shutil.rmtree(straight / 'checkpoints', ignore_errors=True)
      (straight / 'metrics.jsonl').unlink(missing_ok=True)
      (straight / 'results.json').unlink(missing_ok=True)
      begun = time.monotonic()
      process = start(straight)
      process.join()
      self.assertEqual(process.exitcode, 0)
      duration = time.monotonic() - begun

    rng = random.Random(0)
    interruptions = _NUM_KILLS // 2 * [
      (signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, False)
    ]
    num_in_saves = num_runs = 0
    while interruptions:
      workdir = root / f'run{num_runs}'
      code = None
      while code != 0:
        process = start(workdir)
        if interruptions:
          number, in_save = interruptions[-1]
          process.join(rng.uniform(0, duration))
          while in_save and process.is_alive() and not _is_saving(workdir):
            time.sleep(0.001)
          num_in_saves += in_save and process.is_alive()
          if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        code = process.exitcode
        if code:  # Who is told to stop ends with an exception.
          expected = (-number, 1) if number == signal.SIGTERM else (-number,)
          self.assertIn(code, expected)
          interruptions.pop()
      num_runs += 1
      whole_runs.assert_same_state(workdir, straight)
      self.assertEqual(
        whole_runs.metrics(workdir), whole_runs.metrics(straight)
      )
    self.assertGreater(num_in_saves, 5)


if __name__ == '__main__':
  absltest.main()
