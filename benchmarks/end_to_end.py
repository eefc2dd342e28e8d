"""Measures the overhead of data and training loop over the bare step.

python benchmarks/end_to_end.py [glyphs] [--steps=100] [--rounds=5]
python benchmarks/end_to_end.py photos [--model=resnet50] [--dtype=bfloat16]
  [--batch_size=32] [--resize=288] [--image_size=256] [--pictures=5864]

`glyphs` trains configs/glyphs.py. `photos` is for accelerators: random images,
as many as CUB has for training, stored resized as with
config.dataset.cache_size, cropped and flipped, at the sizes of ProxyNCA++.
These variants take turns in one process:

  step        only the jitted step, repeated on one batch on the device
  loop        the trainer's loop, repeating one batch from the host
  host        the trainer's loop from data; the host crops the images
  on_device   the same with config.dataset.on_device=True

The trainer's loop is loop.fit with logging and TensorBoard, but without
evaluation and checkpoints. Prints medians over the rounds in milliseconds per
step, of wall-clock time and of processor time, which is less sensitive to other
work on the machine, and the median ratio to the bare step of the same round.
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
_VARIANTS = ('step', 'loop', 'host', 'on_device')


def make_photos(arguments) -> tuple[ml_collections.ConfigDict, datasets.Split]:
  """Returns a config, and random images of 100 classes."""
  config = default.get_config()
  config.batch_size = arguments.batch_size
  config.model.name, config.model.dtype = arguments.model, arguments.dtype
  config.model.embedding_dim = 2048
  config.dataset.image_size = arguments.image_size
  config.optimizer.backbone.learning_rate = 1e-5  # Noise teaches nothing.
  shape = (arguments.pictures, arguments.resize, arguments.resize, 3)
  # All images are views of one noise array at different offsets, for speed.
  noise = np.random.default_rng(0).integers(
    0, 256, np.prod(shape[1:]) + shape[0], np.uint8
  )
  pixels = np.empty(shape, np.uint8)
  for index, image in enumerate(pixels):
    image.reshape(-1)[:] = noise[index : index + image.size]
  split = datasets.Split(
    source=(),
    images=pixels.__getitem__,
    rows=np.arange(len(pixels)),
    labels=(np.arange(len(pixels)) % 100).astype(np.int32),
    class_names=tuple(map(str, range(100))),
  )
  return config, split


def read_clocks() -> np.ndarray:
  """Returns wall-clock and processor time, in seconds."""
  return np.array([time.perf_counter(), time.process_time()])


class Contest:
  """An initial state, a compiled step, and four variants of training."""

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

  def seconds(self, variant: str) -> np.ndarray:
    """Trains `config.num_steps` in one of `_VARIANTS`.

    Starting the reading threads and the first batch are not measured.

    Returns:
      float64 [2], wall-clock and processor time in seconds.
    """
    state = jax.block_until_ready(
      jax.device_put(self._start, mesh_lib.replicated(self._mesh))
    )
    if variant == 'step':
      batch = jax.block_until_ready(self._prepare[False](self._batch))
      start = read_clocks()
      for _ in range(self._config.num_steps):
        state, metrics = self._step(state, batch, 1.0, freeze_batch_norm=False)
      jax.block_until_ready((state, metrics))
      return read_clocks() - start
    is_on_device = variant == 'on_device'
    with contextlib.ExitStack() as stack:
      batches = itertools.repeat(self._batch)
      if variant != 'loop':
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
  parser.add_argument(
    '--model', default='resnet50', help='photos: config.model.name'
  )
  parser.add_argument(
    '--dtype', default='bfloat16', help='photos: config.model.dtype'
  )
  for name, value, text in (
    ('steps', 100, 'steps of each measurement'),
    ('rounds', 5, 'repetitions of each measurement'),
    ('batch_size', 32, 'photos: batch size'),
    ('resize', 288, 'photos: side of the stored images, in pixels'),
    ('image_size', 256, 'photos: side of the crops, in pixels'),
    ('pictures', 5864, 'photos: number of images'),
  ):
    parser.add_argument(f'--{name}', type=int, default=value, help=text)
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
    seconds = {variant: [] for variant in _VARIANTS}
    for variant in _VARIANTS:  # Compiles.
      contest.seconds(variant)
    for number in range(arguments.rounds):
      # Rotates, so that each variant comes first equally often.
      turn = number % len(_VARIANTS)
      for variant in _VARIANTS[turn:] + _VARIANTS[:turn]:
        seconds[variant].append(contest.seconds(variant))
  size = config.dataset.image_size
  print(
    f'{config.model.name}, {config.model.dtype}, batches of '
    f'{config.batch_size} images of {size} x {size}, {len(split)} images; '
    f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax '
    f'{jax.__version__}; {arguments.rounds} rounds of {arguments.steps} steps'
  )
  print(
    f'{"":12}{"ms per step":>12}{"ratio":>9}{"processor ms":>14}{"ratio":>9}'
  )
  for variant, values in seconds.items():
    ratios = np.median(np.divide(values, seconds['step']), axis=0)
    clock, processor = 1e3 * np.median(values, axis=0) / arguments.steps
    print(
      f'{variant:12}{clock:12.2f}{ratios[0]:9.3f}{processor:14.2f}{ratios[1]:9.3f}'
    )


if __name__ == '__main__':
  main()
