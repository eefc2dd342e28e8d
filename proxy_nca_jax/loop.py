"""The training loop: steps, scores on the way, checkpoints, and stops."""

import itertools
import logging
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np

from proxy_nca_jax import losses
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.runtime import monitoring, signals
from proxy_nca_jax.runtime import progress as progress_lib

# What the watchdog reports that a step is waiting for.
INPUT = 'its input'
DEVICE = 'the device, or a compilation'
SAVING = 'checkpoints to be written'

_logger = logging.getLogger(__name__)


def _is_batch_norm_frozen(config, done: int) -> bool:
  steps = config.model.freeze_batch_norm_steps
  return steps < 0 or done < steps


def _is_evaluated(config, step: int) -> bool:
  """Whether training scores a step.

  The first state is among the baselines and the last is scored afterwards, both
  on the test classes.
  """
  if step in (0, config.num_steps):
    return bool(config.dataset.validation)
  return bool(config.eval_every) and step % config.eval_every == 0


def make_take_steps(
  config: ml_collections.ConfigDict,
  batches: Iterator[dict[str, np.ndarray]],
  *,
  num_classes: int,
  prepare: Callable,
  train_steps: Callable,
  progress: progress_lib.Progress,
  watchdog: monitoring.Watchdog,
  trace: monitoring.Trace,
  publish: Callable[[], None],
) -> Callable[..., state_lib.TrainState]:
  """Returns (state, steps done, lr_scale) -> state after the next dispatch.

  Args:
    config: the run's config.
    batches: this process's rows of each batch.
    num_classes: labels must be below it.
    prepare: places a batch on the devices.
    train_steps: takes the steps, from `train_step.make_train_steps`.
    progress: records their metrics.
    watchdog: warns of a step that waits for long.
    trace: profiles steps.
    publish: uploads a remote workdir.
  """

  def take_steps(state, done, lr_scale):
    first, last = done + 1, done + config.steps_per_dispatch
    with watchdog.waiting_for(INPUT, step=first):
      rows = list(itertools.islice(batches, config.steps_per_dispatch))
    for batch in rows:
      losses.check_labels(batch['label'], num_classes)
    trace.before(first, last)
    with (
      watchdog.waiting_for(DEVICE, step=first),
      jax.profiler.StepTraceAnnotation('train', step_num=first),
    ):
      state, metrics = train_steps(
        state,
        [prepare(batch) for batch in rows],
        lr_scale,
        freeze_batch_norm=_is_batch_norm_frozen(config, done),
      )
      progress.add(last, metrics, input_seconds=watchdog.seconds[INPUT])
    trace.after(last, metrics)
    if last == config.num_steps or last % config.log_every == 0:
      progress.report()
      publish()
    return state

  return take_steps


def fit(
  config: ml_collections.ConfigDict,
  state: state_lib.TrainState,
  *,
  take_steps: Callable[..., state_lib.TrainState],
  score_step: Callable[[state_lib.TrainState], None],
  save: Callable[..., None],
  check_finite: Callable[[int], None],
  is_scored: Callable[[int], bool],
  lr_scale: Callable[[], float],
  stop_signals: signals.StopSignals,
) -> state_lib.TrainState:
  """Trains up to `config.num_steps`, scoring and saving on the way.

  Args:
    config: the run's config.
    state: the state to start from.
    take_steps: (state, steps done, lr_scale) -> state after one dispatch.
    score_step: scores a state and records the scores.
    save: starts saving a state; with block=True it returns when that is done.
    check_finite: raises ValueError unless all losses so far are finite.
    is_scored: whether a step's scores are recorded already.
    lr_scale: returns the factor on all learning rates.
    stop_signals: raises `signals.Stopped` at a check after a signal.

  Raises:
    ValueError: if a loss or gradient is not finite, or, where such steps are
      skipped, too many in a row are; no such state is saved.
    signals.Stopped: on a signal, after saving the state.
  """
  done = int(state.step)
  try:
    # The state before training is a candidate for selection, and a run that was
    # stopped just before an evaluation makes up for it.
    if _is_evaluated(config, done) and not is_scored(done):
      score_step(state)
    scale = lr_scale()
    if not config.num_steps:
      save(state, block=True)
    while done < config.num_steps:
      stop_signals.check()
      state = take_steps(state, done, scale)
      done += config.steps_per_dispatch
      # Scores are written before the checkpoint, so that a run resumed from it
      # has them.
      if _is_evaluated(config, done):
        check_finite(done)
        score_step(state)
        scale = lr_scale()
      if done == config.num_steps or done % config.save_every == 0:
        check_finite(done)
        save(state, block=done == config.num_steps)
  except signals.Stopped:
    check_finite(done)
    save(state, block=True)
    _logger.info(
      'Stopped after step %d of %d and saved. The same command resumes.',
      done,
      config.num_steps,
    )
    raise
  return state
