"""What data and loop cost: training beside the bare step on one batch.

python benchmarks/end_to_end.py [glyphs] [--steps=100] [--rounds=5]
python benchmarks/end_to_end.py photos [--model=resnet50] [--dtype=bfloat16]
  [--batch_size=32] [--resize=288] [--image_size=256] [--pictures=5864]

`glyphs` trains configs/glyphs.py. `photos` is for accelerators: as many
pictures of noise as CUB has to learn, stored resized as with
config.dataset.cache_size, cropped and flipped, at the sizes of ProxyNCA++. In
one process and in turn:

  step        the jitted step alone, over and over on one batch on the device
  loop        the trainer's loop, given one and the same batch by the host
  host        the trainer's loop, from data: images are cropped by the host
  on_device   the same with config.dataset.on_device=True

The trainer's loop is loop.fit with logging and TensorBoard, no evaluation and
no checkpoints. Prints medians over the rounds, in milliseconds a step, of the
clock and of processor time, which other work on the machine disturbs less; and
the median over the rounds of each one's ratio to the bare step of the same
round.
"""

import argparse
import contextlib
import itertools
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import ml_collections
import numpy as np
from absl import flags

from proxy_nca_jax import (
  datasets,
  input_pipeline,
  loop,
  models,
  train,
  train_step,
)
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import default, glyphs
from proxy_nca_jax.runtime import metric_writer, monitoring, signals
from proxy_nca_jax.runtime import progress as progress_lib

flags.FLAGS.mark_as_parsed()
_WAYS = ('step', 'loop', 'host', 'on_device')


def make_photos(arguments) -> tuple[ml_collections.ConfigDict, datasets.Split]:
  """Returns a config, and pictures of noise of 100 classes."""
  config = default.get_config()
  config.batch_size = arguments.batch_size
  config.model.name, config.model.dtype = arguments.model, arguments.dtype
  config.model.embedding_dim = 2048
  config.dataset.image_size = arguments.image_size
  config.optimizer.backbone.learning_rate = 1e-5  # Noise teaches nothing.
  shape = (arguments.pictures, arguments.resize, arguments.resize, 3)
  # One picture of noise at another offset each: quick to make.
  noise = np.random.default_rng(0).integers(
    0, 256, np.prod(shape[1:]) + shape[0], np.uint8
  )
  pixels = np.empty(shape, np.uint8)
  for index, picture in enumerate(pixels):
    picture.reshape(-1)[:] = noise[index : index + picture.size]
  split = datasets.Split(
    source=(),
    images=pixels.__getitem__,
    rows=np.arange(len(pixels)),
    labels=(np.arange(len(pixels)) % 100).astype(np.int32),
    class_names=tuple(map(str, range(100))),
  )
  return config, split


def read_clocks() -> np.ndarray:
  return np.array([time.perf_counter(), time.process_time()])


class Contest:
  """One state to begin with, one compiled step, and four ways to train."""

  def __init__(self, config, split, workdir, stop_signals):
    self._config, self._split = config, split
    self._mesh = mesh_lib.make_mesh()
    self._signals = stop_signals
    self._writer = metric_writer.MetricWriter(workdir, first_step=0)
    model = models.create_model(config)
    optimizer = optimizer_lib.make_optimizer(config)
    self._step = train_step.make_train_step(
      model,
      optimizer,
      train_step.make_loss(config),
    )
    self._start = jax.device_get(
      state_lib.create(
        config,
        model,
        optimizer,
        class_sizes=split.class_sizes,
        mesh=self._mesh,
      )
    )
    self._prepare = {}
    for is_on_device in (False, True):
      with config.unlocked():
        config.dataset.on_device = is_on_device
      self._prepare[is_on_device] = train.make_prepare(
        config, split, self._mesh
      )
    (self._batch,) = itertools.islice(self._batches(False), 1)

  def _batches(self, is_on_device: bool):
    self._config.dataset.on_device = is_on_device
    return input_pipeline.train_batches(self._split, self._config)

  def seconds(self, way: str) -> np.ndarray:
    """Trains `config.num_steps` in one of the ways.

    The start of the reading threads and the first batch do not count.

    Returns:
      The time it took, and that of all processors.
    """
    state = jax.block_until_ready(
      jax.device_put(self._start, mesh_lib.replicated(self._mesh))
    )
    if way == 'step':
      batch = jax.block_until_ready(self._prepare[False](self._batch))
      start = read_clocks()
      for _ in range(self._config.num_steps):
        state, metrics = self._step(state, batch, 1.0, freeze_batch_norm=False)
      jax.block_until_ready((state, metrics))
      return read_clocks() - start
    is_on_device = way == 'on_device'
    with contextlib.ExitStack() as stack:
      batches = itertools.repeat(self._batch)
      if way != 'loop':
        batches = self._batches(is_on_device)
        stack.callback(batches.close)
        next(batches)
      progress = progress_lib.Progress(
        self._writer,
        num_steps=self._config.num_steps,
        batch_size=self._config.batch_size,
        max_skipped=self._config.optimizer.max_skipped_steps,
      )
      take_steps = loop.make_take_steps(
        self._config,
        batches,
        num_classes=self._split.num_classes,
        prepare=self._prepare[is_on_device],
        train_steps=train_step.make_train_steps(self._step),
        progress=progress,
        watchdog=stack.enter_context(monitoring.Watchdog(0)),
        trace=stack.enter_context(monitoring.Trace('', ())),
        publish=lambda: None,
      )
      start = read_clocks()
      jax.block_until_ready(
        loop.fit(
          self._config,
          state,
          take_steps=take_steps,
          score_step=lambda state: None,
          save=lambda state, *, block: None,
          check_finite=lambda done: progress.check(),
          is_scored=lambda step: True,
          lr_scale=lambda: 1.0,
          stop_signals=self._signals,
        )
      )
      return read_clocks() - start


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'data', nargs='?', default='glyphs', choices=('glyphs', 'photos')
  )
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--model', default='resnet50')
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--resize', type=int, default=288)
  parser.add_argument('--image_size', type=int, default=256)
  parser.add_argument('--pictures', type=int, default=5864)
  arguments = parser.parse_args()
  if arguments.data == 'glyphs':
    config = glyphs.get_config()
    split = datasets.load(config).train
  else:
    config, split = make_photos(arguments)
  config.num_steps = arguments.steps
  with (
    tempfile.TemporaryDirectory() as workdir,
    signals.StopSignals() as stop_signals,
  ):
    contest = Contest(config, split, workdir, stop_signals)
    seconds = {way: [] for way in _WAYS}
    for way in _WAYS:  # Compiles.
      contest.seconds(way)
    for number in range(arguments.rounds):
      # Each way is as often after each other one.
      turn = number % len(_WAYS)
      for way in _WAYS[turn:] + _WAYS[:turn]:
        seconds[way].append(contest.seconds(way))
  size = config.dataset.image_size
  print(
    f'{config.model.name}, {config.model.dtype}, batches of '
    f'{config.batch_size} images of {size} x {size}, {len(split)} pictures; '
    f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax '
    f'{jax.__version__}; {arguments.rounds} rounds of {arguments.steps} steps'
  )
  print(f'{"":12}{"ms a step":>11}{"ratio":>9}{"processor ms":>14}{"ratio":>9}')
  for way, values in seconds.items():
    ratios = np.median(np.divide(values, seconds['step']), axis=0)
    clock, processor = 1e3 * np.median(values, axis=0) / arguments.steps
    print(
      f'{way:12}{clock:11.2f}{ratios[0]:9.3f}{processor:14.2f}{ratios[1]:9.3f}'
    )


if __name__ == '__main__':
  main()
