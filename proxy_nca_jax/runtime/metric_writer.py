"""Metrics of a run: to metrics.jsonl, TensorBoard and the log."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from proxy_nca_jax.runtime import files, monitoring, processes

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
  removed: its file has the same rows as that of a straight run. Process 0 of a
  run writes, the others nothing.
  """

  def __init__(self, workdir: str, *, first_step: int):
    self._file = self._board = None
    if not processes.is_primary():
      return
    path = os.path.join(workdir, 'metrics.jsonl')
    kept = [row for row in read_metrics(workdir) if row['step'] <= first_step]
    with files.write_atomically(path) as file:
      file.writelines(json.dumps(row) + '\n' for row in kept)
    self._file = open(path, 'a')
    self._board = _Board(
      os.path.join(workdir, 'tensorboard'), first_step=first_step
    )

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **scalars}) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._board.add(step, summary=summary.scalar(name, value))
    self._board.flush_if_due()

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    if self._file is None:
      return
    for name, text in texts.items():
      self._board.add(step, summary=summary.text(name, text))

  def close(self) -> None:
    if self._file is None:
      return
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

  The host waits for a step only when the next one is under way.
  """

  def __init__(
    self,
    writer: MetricWriter,
    *,
    num_steps: int,
    batch_size: int,
    max_skipped: int,
  ):
    self._writer = writer
    self._num_steps, self._batch_size = num_steps, batch_size
    self._max_skipped = max_skipped
    self._pending, self._is_due = [], False
    self._step, self._input_seconds, self._clock = 0, 0.0, None

  def restart_clock(self) -> None:
    """Leaves the time since the last step out of the rate."""
    if self._clock is not None:
      self._start_clock(self._step)

  def _start_clock(self, step):
    self._clock, self._clock_step = time.monotonic(), step
    self._clock_input_seconds = self._input_seconds

  def add(
    self,
    step: int,
    metrics: Mapping[str, jax.Array],
    *,
    input_seconds: float = 0.0,
  ) -> None:
    """Takes what steps that are under way give.

    Args:
      step: the number of the last of them.
      metrics: [steps], or [] of one, 'loss' and 'gradient_norm' among them,
        and, if steps may be skipped, the counts of `optimizer.skip_counts`.
      input_seconds: that the host has waited for its batch and all before it.
    """
    self._step, self._input_seconds = step, input_seconds
    self._pending.append((step, metrics))
    if self._is_due or len(self._pending) >= 1000:
      self._fetch(len(self._pending) - 1)
    if self._clock is None:
      # The first step compiles: the rate is of those after it.
      jax.block_until_ready(metrics)
      self._start_clock(step)

  def report(self) -> None:
    """Asks for the newest step's metrics and the rate since the last report.

    They are written when the next step is under way, or by `check`.
    """
    self._is_due = True

  def check(self) -> None:
    """Waits for all steps, and writes the report that is due.

    Raises:
      ValueError: if a loss or gradient was not finite and its step not skipped,
        or if `max_skipped` steps in a row were.
    """
    self._fetch(len(self._pending))

  def _fetch(self, number):
    """Takes so many of the pending steps; a report is of the last of them."""
    steps, self._pending = self._pending[:number], self._pending[number:]
    names = ('loss', 'gradient_norm', 'skipped_steps', 'skipped_in_row')
    fetched = jax.device_get(
      [
        (step, {name: metrics[name] for name in names if name in metrics})
        for step, metrics in steps
      ]
    )
    _check_finite(
      [row for step, metrics in fetched for row in _rows(step, metrics)],
      max_skipped=self._max_skipped,
    )
    if self._is_due:
      self._is_due = False
      step, metrics = jax.device_get(steps[-1])
      self._write(*_rows(step, metrics)[-1])

  def _write(self, step, metrics):
    scalars = {
      name: value.item()
      for name, value in metrics.items()
      if np.isfinite(value)  # What a skipped step has is no number of JSON.
    }
    seconds = max(time.monotonic() - self._clock, 1e-9)
    steps = step - self._clock_step
    rate = steps / seconds
    rates, timing = {}, ''
    if steps:
      waited = self._input_seconds - self._clock_input_seconds
      rates = {
        'images_per_second': rate * self._batch_size,
        'steps_per_second': rate,
        'input_wait': waited / seconds,
      }
      left = _format_seconds((self._num_steps - step) / rate)
      timing = f'  {rates["images_per_second"]:.0f} images/s  {left} left'
    self._writer.write_scalars(
      step, scalars | rates | monitoring.device_memory()
    )
    accuracy = skipped = ''
    if 'proxy_accuracy' in scalars:  # Of losses whose labels index proxies.
      share = 100 * scalars['proxy_accuracy']
      accuracy = f'  nearest proxy right {share:.0f}%'
    if scalars.get('skipped_steps'):
      skipped = f'  {scalars["skipped_steps"]} skipped'
    _logger.info(
      'step %d/%d  loss %.4f%s%s%s',
      step,
      self._num_steps,
      metrics['loss'],
      accuracy,
      skipped,
      timing,
    )
    self._start_clock(step)


def _rows(
  last: int, metrics: Mapping[str, np.ndarray]
) -> list[tuple[int, dict[str, np.ndarray]]]:
  """Returns (step, metrics []) of each step of a dispatch, `last` the last."""
  metrics = {name: np.atleast_1d(values) for name, values in metrics.items()}
  number = len(metrics['loss'])
  return [
    (
      last - number + 1 + row,
      {name: values[row] for name, values in metrics.items()},
    )
    for row in range(number)
  ]


def _check_finite(
  rows: Sequence[tuple[int, Mapping[str, np.ndarray]]], *, max_skipped: int
) -> None:
  """Raises ValueError, or logs what was skipped, if steps were not finite."""
  bad = [
    (step, metrics)
    for step, metrics in rows
    if not np.isfinite(metrics['loss'])
    or not np.isfinite(metrics['gradient_norm'])
  ]
  if not bad:
    return
  names = ', '.join(str(step) for step, _ in bad[:5])
  names += ', ...' if len(bad) > 5 else ''
  if 'skipped_in_row' not in bad[0][1]:
    raise ValueError(
      f'The loss or its gradient is not finite at step {names}. The '
      'checkpoints before it are kept. Lower the learning rates, or set '
      'config.optimizer.clip_norm, or begin with '
      'config.optimizer.on_nonfinite=skip.'
    )
  _logger.warning(
    'Skipped, for a loss or gradient that is not finite: step %s; %d in all.',
    names,
    bad[-1][1]['skipped_steps'],
  )
  if any(metrics['skipped_in_row'] >= max_skipped for _, metrics in bad):
    raise ValueError(
      f'The loss or its gradient is not finite in {max_skipped} steps in a row '
      f'(config.optimizer.max_skipped_steps), step {bad[-1][0]} the last. The '
      'checkpoints before it are kept. Lower the learning rates, or set '
      'config.optimizer.clip_norm.'
    )


def _format_seconds(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
