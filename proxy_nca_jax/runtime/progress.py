"""Progress of training: fetches, checks and logs the metrics of steps."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from proxy_nca_jax.runtime import metric_writer, monitoring

# Fetch the metrics of at most this many steps at once, even without a report,
# to bound the number of live device buffers.
_MAX_PENDING = 1000

_logger = logging.getLogger(__name__)


class _Mark(NamedTuple):
  """The start of a timed interval: a step, the time and the input wait."""

  step: int
  time: float
  input_seconds: float


class Progress:
  """Reports metrics of training steps without stalling the device.

  JAX dispatches steps asynchronously, and reading a metric blocks until its
  step is complete. So the metrics of steps stay on the device until the next
  step is dispatched, and a requested report is written at the next `add` or
  `check`:

    progress.add(1, ...)
    progress.add(2, ...)
    progress.report()      # Requests a report of step 2.
    progress.add(3, ...)   # Dispatches step 3; fetches 1 and 2, writes 2.
  """

  def __init__(
    self,
    writer: metric_writer.MetricWriter,
    *,
    num_steps: int,
    batch_size: int,
    max_skipped: int,
    unit: str = 'images',
  ):
    """Creates a reporter.

    Args:
      writer: receives one row of scalars per report.
      num_steps: the last step of the run, for the remaining time.
      batch_size: images per step over all processes, for the throughput.
      max_skipped: consecutive skipped steps after which `check` raises.
      unit: what a batch has, for the log.
    """
    self._writer = writer
    self._num_steps, self._batch_size = num_steps, batch_size
    self._max_skipped = max_skipped
    self._unit = unit
    self._pending = []  # (last step, metrics) of each dispatch not yet fetched.
    self._is_report_due = False
    self._step, self._input_seconds = 0, 0.0
    self._interval_start = None  # Unknown until the first step has compiled.

  def restart_clock(self) -> None:
    """Excludes the time since the last step from the throughput."""
    if self._interval_start is not None:
      self._start_interval(self._step)

  def _start_interval(self, step: int) -> None:
    self._interval_start = _Mark(step, time.monotonic(), self._input_seconds)

  def add(
    self,
    step: int,
    metrics: Mapping[str, jax.Array],
    *,
    input_seconds: float = 0.0,
  ) -> None:
    """Adds the metrics of one dispatch, of one step or several.

    Args:
      step: the last step of the dispatch.
      metrics: float32 [num_steps], or [] for a single step; with 'loss' and
        'gradient_norm' and, if steps may be skipped, the int32 counts of
        `optimizer.skip_counts`.
      input_seconds: total seconds that the host has waited for input so far.

    Raises:
      ValueError: as `check`, for the steps before this dispatch.
    """
    self._step, self._input_seconds = step, input_seconds
    self._pending.append((step, metrics))
    if self._is_report_due or len(self._pending) >= _MAX_PENDING:
      self._fetch(len(self._pending) - 1)
    if self._interval_start is None:
      # The throughput excludes the first step, which compiles.
      jax.block_until_ready(metrics)
      self._start_interval(step)

  def report(self) -> None:
    """Requests a report of the newest step and the throughput up to it.

    It is written once the next step is dispatched, or by `check`.
    """
    self._is_report_due = True

  def check(self) -> None:
    """Waits for all steps, checks them and writes a report that is due.

    Raises:
      ValueError: if a loss or gradient is not finite and its step was not
        skipped, or if `max_skipped` consecutive steps were skipped.
    """
    self._fetch(len(self._pending))

  def _fetch(self, num_dispatches: int) -> None:
    """Checks the oldest dispatches; writes the report, due for their last."""
    dispatches = self._pending[:num_dispatches]
    self._pending = self._pending[num_dispatches:]
    checked = ('loss', 'gradient_norm', 'skipped_steps', 'skipped_in_row')
    fetched = jax.device_get(
      [
        (step, {name: metrics[name] for name in checked if name in metrics})
        for step, metrics in dispatches
      ]
    )
    _check_finite(
      [row for step, metrics in fetched for row in _split_steps(step, metrics)],
      max_skipped=self._max_skipped,
    )
    if self._is_report_due:
      self._is_report_due = False
      step, metrics = jax.device_get(dispatches[-1])
      self._write(*_split_steps(step, metrics)[-1])

  def _write(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
    scalars = {
      name: value.item()
      for name, value in metrics.items()
      if np.isfinite(value)  # JSON has no NaN or infinity, as of skipped steps.
    }
    throughput = self._throughput(step)
    self._writer.write_scalars(
      step, scalars | throughput | monitoring.device_memory()
    )
    parts = [
      f'step {step}/{self._num_steps}',
      f'loss {metrics["loss"]:.4f}',
    ]
    if 'proxy_accuracy' in scalars:  # Only losses whose labels index proxies.
      parts.append(f'proxy accuracy {100 * scalars["proxy_accuracy"]:.0f}%')
    if scalars.get('skipped_steps'):
      parts.append(f'{scalars["skipped_steps"]} skipped')
    if throughput:
      seconds = (self._num_steps - step) / throughput['steps_per_second']
      parts.append(f'{throughput["images_per_second"]:.0f} {self._unit}/s')
      parts.append(f'{_format_seconds(seconds)} left')
    _logger.info('%s', '  '.join(parts))
    self._start_interval(step)

  def _throughput(self, step: int) -> dict[str, float]:
    """Returns rates since the last report; empty if no step was completed."""
    start = self._interval_start
    if step == start.step:
      return {}
    seconds = max(time.monotonic() - start.time, 1e-9)
    steps_per_second = (step - start.step) / seconds
    return {
      'images_per_second': steps_per_second * self._batch_size,
      'steps_per_second': steps_per_second,
      'input_wait': (self._input_seconds - start.input_seconds) / seconds,
    }


def _split_steps(
  last_step: int, metrics: Mapping[str, np.ndarray]
) -> list[tuple[int, dict[str, np.ndarray]]]:
  """Splits metrics [num_steps] of a dispatch into (step, metrics []) pairs."""
  metrics = {name: np.atleast_1d(values) for name, values in metrics.items()}
  num_steps = len(metrics['loss'])
  return [
    (
      last_step - num_steps + 1 + i,
      {name: values[i] for name, values in metrics.items()},
    )
    for i in range(num_steps)
  ]


def _check_finite(
  steps: Sequence[tuple[int, Mapping[str, np.ndarray]]], *, max_skipped: int
) -> None:
  """Raises ValueError for non-finite steps, or logs that they were skipped."""
  bad = [
    (step, metrics)
    for step, metrics in steps
    if not np.isfinite(metrics['loss'])
    or not np.isfinite(metrics['gradient_norm'])
  ]
  if not bad:
    return
  names = ', '.join(str(step) for step, _ in bad[:5])
  names += ', ...' if len(bad) > 5 else ''
  if 'skipped_in_row' not in bad[0][1]:
    raise ValueError(
      f'The loss or its gradient is not finite at step {names}. The earlier '
      'checkpoints are kept. Lower the learning rates, set '
      'config.optimizer.clip_norm, or start again with '
      'config.optimizer.on_nonfinite=skip.'
    )
  _logger.warning(
    'Skipped step %s, whose loss or gradient is not finite; %d skipped in '
    'total.',
    names,
    bad[-1][1]['skipped_steps'],
  )
  if any(metrics['skipped_in_row'] >= max_skipped for _, metrics in bad):
    raise ValueError(
      f'The loss or its gradient is not finite in {max_skipped} consecutive '
      f'steps (config.optimizer.max_skipped_steps) up to step {bad[-1][0]}. '
      'The earlier checkpoints are kept. Lower the learning rates, or set '
      'config.optimizer.clip_norm.'
    )


def _format_seconds(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
