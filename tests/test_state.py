import dataclasses
import functools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import default
from proxy_nca_jax.runtime import signals


class _Network:
  """Two layers and a running mean: few arrays to trace, save and restore."""

  def example(self, batch_size):
    return jax.ShapeDtypeStruct((batch_size, 8, 8, 3), jnp.uint8)

  def init(self, key, images, *, train):
    del train
    keys = jax.random.split(key)
    return {
      'params': {
        'backbone': jax.random.normal(keys[0], (images[0].size, 4)),
        'head': jax.random.normal(keys[1], (4, 64)),
      },
      'batch_stats': {'mean': jnp.ones(4)},
    }


@functools.cache
def _create(seed=0, num_devices=8, *, sharded=False, memory_size=0):
  config = default.get_config()
  if memory_size:
    config.loss.name, config.loss.memory_size = 'sup_con', memory_size
  config.proxies.sharded = sharded
  config.seed = seed
  config.dataset.image_size = 8
  # What waits has a state of its own.
  config.optimizer.backbone.freeze_steps = 3
  return state_lib.create(
    config,
    _Network(),
    optimizer_lib.make_optimizer(config),
    class_sizes=np.ones(5, int),
    mesh=mesh_lib.make_mesh(jax.devices()[:num_devices]),
  )


def _at_step(step):
  """Returns a state whose arrays, the step among them, are those plus it."""
  return jax.tree.map(
    lambda x: jax.device_put(np.asarray(x) + x.dtype.type(step), x.sharding),
    _create(),
  )


def _largest_file(directory):
  paths = [
    os.path.join(folder, name)
    for folder, _, names in os.walk(directory)
    for name in names
  ]
  return max(paths, key=os.path.getsize)


def _stop_at(work, number):
  """Tells the process to stop at a call of a work; returns their number."""
  num_calls = 0

  def count(frame, event, argument):
    del frame, argument
    nonlocal num_calls
    if event in ('call', 'c_call'):
      num_calls += 1
      if num_calls == number:
        os.kill(os.getpid(), signal.SIGTERM)

  sys.setprofile(count)
  try:
    work()
  finally:
    sys.setprofile(None)
  return num_calls


def _assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


class StateTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = self.create_tempdir().full_path

  def _open(self, keep=3):
    checkpoints = state_lib.Checkpoints(self.workdir, keep=keep)
    self.addCleanup(checkpoints.close)
    return checkpoints

  def _save(self, *steps):
    checkpoints = self._open()
    for step in steps:
      checkpoints.save(step, _at_step(step))
    checkpoints.wait()

  def _path(self, step):
    return os.path.join(self.workdir, 'checkpoints', str(step))

  def test_a_memory_is_restored_onto_other_devices(self):
    state = _create(memory_size=5)
    memory = {
      'embeddings': np.arange(320, dtype=np.float32).reshape(5, 64),
      'labels': np.arange(5, dtype=np.int32),
      'where': np.arange(5) < 3,
    }
    state = dataclasses.replace(
      state,
      loss_state=jax.device_put({'memory': memory}, state.step.sharding),
    )
    checkpoints = self._open()
    checkpoints.save(0, state)
    restored = checkpoints.restore(_create(num_devices=2, memory_size=5))
    _assert_equal(restored.loss_state, {'memory': memory})

  def test_proxies_have_the_variance_of_kaiming_or_xavier(self):
    for init, fan in (('kaiming', 300), ('xavier', 300 + 64)):
      config = default.get_config()
      config.proxies.init = init
      arrays = state_lib.create_loss_arrays(
        config,
        jax.random.split(jax.random.key(0), 3),
        class_sizes=np.ones(300, int),
      )
      variance = np.var(arrays['proxies'])
      self.assertAlmostEqual(variance * fan / 2, 1, delta=0.03)

  def test_seed_alone_decides_the_initial_state(self):
    _assert_equal(_create(seed=3), _create.__wrapped__(seed=3))
    self.assertTrue(
      np.any(_create(seed=3).params['proxies'] != _create().params['proxies'])
    )

  def test_nothing_saved_restores_nothing(self):
    self.assertIsNone(self._open().restore(_create()))

  def test_newest_state_comes_back_bit_for_bit(self):
    self._save(1, 2)
    _assert_equal(self._open().restore(_create()), _at_step(2))

  def test_the_counts_of_skipped_steps_come_back(self):
    state = _create(seed=3).skip_step().skip_step()
    checkpoints = self._open()
    checkpoints.save(2, state)
    checkpoints.wait()
    restored = self._open().restore(_create())
    self.assertEqual(restored.skipped_in_row, 2)
    _assert_equal(restored, state)

  def test_restores_onto_another_number_of_devices(self):
    self._save(4)
    like = _create(num_devices=2)
    state = self._open().restore(like)
    _assert_equal(state, _at_step(4))
    self.assertEqual(
      state.params['proxies'].sharding, like.params['proxies'].sharding
    )

  def test_shared_proxies_move_to_other_numbers_of_devices(self):
    # Five classes: 8, 2 and 1 devices fill up to 8, 6 and 5 rows.
    state = _create(sharded=True)
    for step, num_devices, sharded in (
      (1, 8, True),
      (2, 2, True),
      (3, 8, False),
      (4, 8, True),
    ):
      checkpoints = self._open()
      checkpoints.save(step, dataclasses.replace(state, step=jnp.int32(step)))
      checkpoints.wait()
      like = _create(seed=9, num_devices=num_devices, sharded=sharded)
      state = self._open().restore(like)
      self.assertEqual(int(state.step), step)
      self.assertEqual(
        state.params['proxies'].sharding, like.params['proxies'].sharding
      )
      points, filling = np.split(state.params['proxies'], [5])
      np.testing.assert_array_equal(points, _create().params['proxies'])
      np.testing.assert_array_equal(filling, np.zeros_like(filling))

  def test_proxies_that_were_cut_off_do_not_restore(self):
    state = _create()
    points = jax.random.normal(jax.random.key(0), (7, 64))
    more = dataclasses.replace(state, params=state.params | {'proxies': points})
    checkpoints = self._open()
    checkpoints.save(0, more)
    checkpoints.wait()
    with self.assertRaisesRegex(ValueError, 'None of the checkpoints'):
      self._open().restore(_create())

  def test_old_states_are_removed(self):
    checkpoints = self._open(keep=2)
    for step in (1, 2, 3):
      checkpoints.save(step, _at_step(step))
      checkpoints.wait()
    self.assertEqual(checkpoints.steps, [2, 3])

  def test_saving_a_saved_step_again_changes_nothing(self):
    self._save(1)
    checkpoints = self._open()
    checkpoints.save(1, _at_step(1))
    checkpoints.wait()
    self.assertEqual(checkpoints.steps, [1])

  def test_a_stop_at_any_call_of_a_restore_is_no_fault_of_the_state(self):
    self._save(1)
    like, path = _create(), os.path.join(self.workdir, 'checkpoints')
    for read in (
      lambda: self._open().restore(like),
      lambda: state_lib.read(path),
    ):
      read()
      num_calls = _stop_at(read, None)
      for share in np.arange(0.05, 1, 0.1):
        with signals.StopSignals() as stop_signals:
          with self.assertRaises(signals.Stopped):
            _stop_at(read, int(share * num_calls))
            stop_signals.check()
        self.assertNotIn('1.broken', os.listdir(path))
    _assert_equal(self._open().restore(like), _at_step(1))

  def _assert_falls_back(self):
    with self.assertLogs('proxy_nca_jax', 'WARNING') as logs:
      state = self._open().restore(_create())
    self.assertIn('step 2', logs.output[0])
    _assert_equal(state, _at_step(1))
    self.assertTrue(os.path.isdir(self._path('2.broken')))
    # The run reaches the step again, and saves it.
    checkpoints = self._open()
    checkpoints.save(2, _at_step(2))
    checkpoints.wait()
    _assert_equal(self._open().restore(_create()), _at_step(2))

  def test_a_changed_byte_is_noticed(self):
    self._save(1, 2)
    path = _largest_file(self._path(2))
    with open(path, 'r+b') as file:
      file.seek(os.path.getsize(path) // 2)
      byte = file.read(1)[0]
      file.seek(-1, os.SEEK_CUR)
      file.write(bytes([byte ^ 1]))
    self._assert_falls_back()

  def test_a_truncated_file_is_noticed(self):
    self._save(1, 2)
    path = _largest_file(self._path(2))
    os.truncate(path, os.path.getsize(path) // 2)
    self._assert_falls_back()

  def test_a_missing_file_is_noticed(self):
    self._save(1, 2)
    os.remove(_largest_file(self._path(2)))
    self._assert_falls_back()

  def test_an_unfinished_save_is_not_taken(self):
    self._save(1)
    os.makedirs(self._path('2.orbax-checkpoint-tmp'))
    _assert_equal(self._open().restore(_create()), _at_step(1))

  def test_reading_falls_back_to_the_checkpoint_before(self):
    self._save(1, 2)
    folder = os.path.join(self.workdir, 'checkpoints')
    os.remove(_largest_file(self._path(2)))
    with self.assertLogs('proxy_nca_jax', 'WARNING') as logs:
      state = state_lib.read(folder)
    self.assertEqual(state.step, 1)
    self.assertRegex(
      logs.output[0], 'cannot be read .* Reading the one of step 1'
    )
    with self.assertRaisesRegex(ValueError, 'cannot be read'):
      state_lib.read(folder, step=2)

  def test_a_checkpoint_that_cannot_be_read_back_is_an_error(self):
    self._save(1)
    checkpoints = self._open()
    checkpoints.read_back(1, _at_step(1))
    with self.assertRaisesRegex(ValueError, 'step 1 .* cannot be read back'):
      checkpoints.read_back(1, _at_step(2))

  def test_no_whole_state_is_an_error_and_nothing_is_deleted(self):
    self._save(1)
    os.remove(_largest_file(self._path(1)))
    with self.assertRaisesRegex(ValueError, 'None of the checkpoints'):
      self._open().restore(_create())
    self.assertTrue(os.path.isdir(self._path('1.broken')))

  def test_checksums_notice_swapped_and_changed_words(self):
    def checksums(values):
      return state_lib._checksums({'a': jnp.asarray(values)}).tolist()

    self.assertNotEqual(checksums([1.0, 2.0]), checksums([2.0, 1.0]))
    self.assertNotEqual(checksums([1.0, 2.0]), checksums([1.0, -2.0]))
    self.assertEqual(checksums([0.0, jnp.nan]), checksums([0.0, jnp.nan]))


if __name__ == '__main__':
  absltest.main()
