import os
import pathlib
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import whole_runs
from absl.testing import absltest, parameterized

from proxy_nca_jax import datasets, input_pipeline
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.configs import default
from proxy_nca_jax.input_pipeline import on_device


def make_split(num_records=13, height=12, width=10):
  """Images of noise, two of a class."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(1, 256, (num_records, height, width, 3), dtype=np.uint8)
  labels = np.arange(num_records, dtype=np.int32) // 2
  return datasets.Split(
    source=(),
    images=pixels.__getitem__,
    rows=np.arange(num_records),
    labels=labels,
    class_names=tuple(map(str, range(labels[-1] + 1))),
  )


def make_config(**fields):
  config = default.get_config()
  config.batch_size = 8
  config.dataset.image_size = 8
  config.update_from_flattened_dict(fields)
  return config


def take(split, config, number, *, on_device, **kwargs):
  config = config.copy_and_resolve_references()
  config.dataset.on_device = on_device
  batches = input_pipeline.train_batches(split, config, **kwargs)
  rows = [next(batches) for _ in range(number)]
  batches.close()
  return rows


def make_prepare(split, config, mesh=None):
  return on_device.make_prepare(
    split,
    mesh or mesh_lib.make_mesh(),
    image_size=config.dataset.image_size,
    padding=config.dataset.padding,
  )


class DeviceDataTest(parameterized.TestCase):
  def _assert_same(self, actual, expected):
    self.assertSameElements(actual, expected)
    for name, rows in expected.items():
      self.assertEqual(actual[name].dtype, rows.dtype, name)
      np.testing.assert_array_equal(actual[name], rows, name)

  @parameterized.parameters(
    {},
    {'seed': 1, 'dataset.padding': 3},
    {'seed': 2, 'dataset.flip': False},
    {'seed': 3, 'dataset.images_per_class': 2, 'dataset.padding': 1},
    {'seed': 4, 'dataset.image_size': 12, 'dataset.padding': 1},
    {'seed': 5, 'batch_size': 24},
  )
  def test_batches_are_those_of_the_host(self, **fields):
    split, config = make_split(), make_config(**fields)
    prepare = make_prepare(split, config)
    # Of 13 records: several epochs.
    expected = take(split, config, 9, on_device=False)
    for places, batch in zip(take(split, config, 9, on_device=True), expected):
      self.assertNotIn('image', places)
      self._assert_same(prepare(places), batch)

  @parameterized.parameters(1, 2, 4)
  def test_processes_and_resumed_runs_draw_the_same(self, count):
    split, config = make_split(), make_config(**{'dataset.padding': 2})
    prepare = make_prepare(split, config)
    expected = take(split, config, 7, on_device=False)[3:]
    parts = [
      take(
        split, config, 4, on_device=True, first_step=3, process=(index, count)
      )
      for index in range(count)
    ]
    for rows, batch in zip(zip(*parts), expected):
      places = {
        name: np.concatenate([part[name] for part in rows]) for name in rows[0]
      }
      self._assert_same(prepare(places), batch)

  def test_one_device_cuts_as_eight_do(self):
    split, config = make_split(), make_config()
    (places,) = take(split, config, 1, on_device=True)
    one = make_prepare(split, config, mesh_lib.make_mesh(jax.devices()[:1]))
    self._assert_same(one(places), make_prepare(split, config)(places))

  def test_batches_are_divided_as_those_from_the_host(self):
    split, config = make_split(), make_config()
    (places,) = take(split, config, 1, on_device=True)
    mesh = mesh_lib.make_mesh()
    for name, rows in make_prepare(split, config, mesh)(places).items():
      self.assertEqual(rows.sharding, mesh_lib.by_row(mesh), name)

  def test_a_device_holds_its_part_and_never_more(self):
    split, mesh = make_split(num_records=1999), mesh_lib.make_mesh()
    stored = on_device.put_images(split, mesh)
    size = 12 * 10 * 3
    self.assertEqual(stored.shape, (2000, size))
    for shard in stored.addressable_shards:
      self.assertEqual(shard.data.shape, (250, size))
    (places,) = take(split, make_config(), 1, on_device=True)
    places = mesh_lib.shard_batch(places, mesh)
    cut = on_device.make_cut(mesh, height=12, width=10, image_size=8, padding=0)
    place = {name: places[name] for name in ('top', 'left', 'flip', 'id')}
    compiled = cut.lower(stored, place).compile()
    memory = compiled.memory_analysis()
    # A device is given its part, and works in less than a tenth of the whole.
    self.assertLess(memory.argument_size_in_bytes, 251 * size)
    self.assertLess(memory.temp_size_in_bytes, 200 * size)
    self.assertNotRegex(compiled.as_text(), rf'u8\[2000,{size}\]')

  def test_pictures_of_different_sizes_are_refused(self):
    pixels = [np.zeros((9, 9, 3), np.uint8), np.zeros((9, 10, 3), np.uint8)]
    split = datasets.Split(
      source=(),
      images=pixels.__getitem__,
      rows=np.arange(2),
      labels=np.arange(2, dtype=np.int32),
      class_names=('a', 'b'),
    )
    with self.assertRaisesRegex(
      ValueError, 'image 1 has 10 x 9 pixels and the first has 9 x 9'
    ):
      on_device.put_images(split, mesh_lib.make_mesh())

  def test_pictures_that_do_not_fit_are_refused(self):
    def device(**stats):
      return types.SimpleNamespace(memory_stats=lambda: stats or None)

    full = device(bytes_limit=10 * 2**20, bytes_in_use=4 * 2**20)
    on_device.check_memory(6 * 2**20, [device(), full])
    with self.assertRaisesRegex(ValueError, 'need 7 MiB .* 6 MiB left'):
      on_device.check_memory(7 * 2**20, [device(), full])


_PROCESS = """
import dataclasses
import sys

import jax

jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))

import numpy as np
from absl import flags

import test_on_device as here

flags.FLAGS.mark_as_parsed()
split, config = here.make_split(), here.make_config()
process = (jax.process_index(), 2)
reads = set()

def read(row):
  reads.add(row)
  return split.images(row)

prepare = here.make_prepare(dataclasses.replace(split, images=read), config)
# 13 stored on 4 devices: 4 on each. The first tells the size.
assert reads == {0} | set(range(13)[8 * process[0] :][:8]), reads
take = lambda on_device: here.take(
  split, config, 4, on_device=on_device, process=process
)
for places, expected in zip(take(True), take(False)):
  batch = prepare(places)
  for name, rows in expected.items():
    shards = batch[name].addressable_shards
    shards = sorted(shards, key=lambda shard: shard.index[0].start)
    actual = np.concatenate([shard.data for shard in shards])
    np.testing.assert_array_equal(actual, rows, name)
print('the same')
"""


class ProcessesTest(absltest.TestCase):
  def test_each_process_reads_and_cuts_its_part(self):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      address = f'localhost:{free.getsockname()[1]}'
    tests = pathlib.Path(__file__).parent
    environment = whole_runs.environment() | {
      'PYTHONPATH': f'{tests.parent}{os.pathsep}{tests}'
    }
    processes = [
      subprocess.Popen(
        [sys.executable, '-c', _PROCESS, str(index), address],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for index in range(2)
    ]
    for process in processes:
      output, _ = process.communicate(timeout=120)
      self.assertEqual(process.returncode, 0, output)
      self.assertIn('the same', output)


if __name__ == '__main__':
  absltest.main()
