"""Metrics of a run: to metrics.jsonl, TensorBoard and the log."""

import json
import logging
import os
import time
from collections.abc import Mapping

import jax
import numpy as np
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

_logger = logging.getLogger(__name__)


def read_metrics(workdir: str) -> list[dict]:
  """Returns the rows of WORKDIR/metrics.jsonl; a torn last line is left out."""
  path = os.path.join(workdir, 'metrics.jsonl')
  if not os.path.exists(path):
    return []
  rows = []
  with open(path) as file:
    for line in file:
      if line.endswith('\n'):
        rows.append(json.loads(line))
  return rows


class MetricWriter:
  """Writes rows of scalars; the names of the methods are clu's.

  A resumed run repeats the steps after its checkpoint, so their rows are
  removed: its file has the same rows as that of a straight run.
  """

  def __init__(self, workdir: str, *, first_step: int):
    path = os.path.join(workdir, 'metrics.jsonl')
    kept = [row for row in read_metrics(workdir) if row['step'] <= first_step]
    with open(path + '.tmp', 'w') as file:
      file.writelines(json.dumps(row) + '\n' for row in kept)
    os.replace(path + '.tmp', path)
    self._file = open(path, 'a')
    self._board = _Board(
      os.path.join(workdir, 'tensorboard'), first_step=first_step
    )

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._file.write(json.dumps({'step': step, **scalars}) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._board.add(step, summary=summary.scalar(name, value))
    self._board.flush_if_due()

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      self._board.add(step, summary=summary.text(name, text))

  def close(self) -> None:
    self._file.close()
    self._board.close()


class _Board:
  """A file of events for TensorBoard, written by the thread that calls.

  tensorboardX's SummaryWriter has a thread of its own: a full disk ends it, and
  the run would wait for its queue for ever.
  """

  def __init__(self, folder: str, *, first_step: int):
    os.makedirs(folder, exist_ok=True)
    self._file = event_file_writer.EventsWriter(os.path.join(folder, 'events'))
    # TensorBoard drops what a run that was stopped had written from here on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self.add(first_step + 1, session_log=start)
    self._flushed = time.monotonic()

  def add(self, step: int, **content) -> None:
    event = event_pb2.Event(wall_time=time.time(), step=step, **content)
    self._file.write_event(event)

  def flush_if_due(self) -> None:
    """Flushes every half minute: it waits for the disk."""
    if time.monotonic() > self._flushed + 30:
      self._file.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    self._file.close()


class Progress:
  """Holds the metrics of steps until they are needed, then fetches them.

  The host does not wait for a step before it starts the next.
  """

  def __init__(self, writer: MetricWriter, *, num_steps: int, batch_size: int):
    self._writer = writer
    self._num_steps, self._batch_size = num_steps, batch_size
    self._pending, self._last, self._step = [], None, 0
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves the time until the next step out of the rate."""
    self._clock, self._clock_step = None, None

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Takes a step's scalars, 'loss' and 'gradient_norm' among them."""
    self._step = step
    self._pending.append((step, metrics))
    if self._clock is None:
      # The first step compiles: the rate is of those after it.
      jax.block_until_ready(metrics)
      self._clock, self._clock_step = time.monotonic(), step
    if len(self._pending) >= 1000:
      self.check()

  def check(self) -> None:
    """Raises ValueError if a loss or gradient was not finite."""
    fetched = jax.device_get(self._pending)
    self._pending = []
    bad = [
      step
      for step, metrics in fetched
      if not np.isfinite(metrics['loss'])
      or not np.isfinite(metrics['gradient_norm'])
    ]
    if bad:
      steps = ', '.join(map(str, bad[:5])) + (', ...' if len(bad) > 5 else '')
      raise ValueError(
        f'The loss or its gradient is not finite at step {steps}. The '
        'checkpoints before it are kept. Lower the learning rates, or set '
        'config.optimizer.clip_norm.'
      )
    if fetched:
      self._last = fetched[-1][1]

  def report(self) -> None:
    """Writes the newest step's metrics and the rate since the last report."""
    self.check()
    seconds = max(time.monotonic() - self._clock, 1e-9)
    steps = self._step - self._clock_step
    rate = steps / seconds
    scalars = {name: float(value) for name, value in self._last.items()}
    left = self._num_steps - self._step
    rates = {'images_per_second': rate * self._batch_size}
    self._writer.write_scalars(self._step, scalars | (rates if steps else {}))
    timing = ''
    if steps:
      timing = (
        f'  {rates["images_per_second"]:.0f} images/s  '
        f'{_format_seconds(left / rate)} left'
      )
    accuracy = ''
    if 'proxy_accuracy' in scalars:  # Of losses whose labels index proxies.
      share = 100 * scalars['proxy_accuracy']
      accuracy = f'  nearest proxy right {share:.0f}%'
    _logger.info(
      'step %d/%d  loss %.4f%s%s',
      self._step, self._num_steps, scalars['loss'], accuracy, timing,
    )
    self._clock, self._clock_step = time.monotonic(), self._step


def _format_seconds(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
