"""The training loop with a step that computes nothing."""

import itertools
import os
import signal
import types
from unittest import mock

import numpy as np
from absl.testing import absltest

from proxy_nca_jax import loop
from proxy_nca_jax.configs import default
from proxy_nca_jax.runtime import metric_writer, monitoring, signals
from proxy_nca_jax.runtime import progress as progress_lib


def _config(**fields):
  config = default.get_config()
  config.update_from_flattened_dict(fields)
  return config


def _fit(config, take_steps, *, first=0, **functions):
  with signals.StopSignals() as stop_signals:
    return loop.fit(
      config,
      types.SimpleNamespace(step=first),
      take_steps=take_steps,
      stop_signals=stop_signals,
      **{
        'score_step': lambda state: None,
        'save': lambda state, *, block: None,
        'check_finite': lambda done: None,
        'is_scored': lambda step: False,
        'lr_scale': lambda: 1.0,
        **functions,
      },
    )


class LoopTest(absltest.TestCase):
  def test_batches_are_sent_while_steps_compute(self):
    # The host waits for the first step, which compiles, and to report step 4
    # and step 8, which it does when the next one is under way.
    events = []

    class Scalar:
      def block_until_ready(self):
        events.append('wait')

      def __array__(self):
        events.append('wait')
        return np.float32(1)

    def train_steps(state, batches, lr_scale, *, freeze_batch_norm):
      del batches, lr_scale, freeze_batch_norm
      events.append('step')
      return state, {'loss': Scalar(), 'gradient_norm': Scalar()}

    writer = mock.create_autospec(metric_writer.MetricWriter)
    config = _config(num_steps=8, log_every=4)
    progress = progress_lib.Progress(
      writer, num_steps=8, batch_size=4, max_skipped=1
    )
    take_steps = loop.make_take_steps(
      config,
      ({'label': np.zeros(4, np.int32)} for _ in range(8)),
      num_classes=1,
      prepare=lambda batch: events.append('send'),
      train_steps=train_steps,
      progress=progress,
      watchdog=self.enter_context(monitoring.Watchdog(0)),
      trace=self.enter_context(monitoring.Trace('', ())),
      publish=lambda: None,
    )
    state = _fit(config, take_steps, check_finite=lambda done: progress.check())
    self.assertEqual(state, types.SimpleNamespace(step=0))
    names = [event for event, _ in itertools.groupby(events)]
    sent = ['send', 'step']
    self.assertEqual(
      names, [*sent, 'wait', *4 * sent, 'wait', *3 * sent, 'wait']
    )

  def _events(self, *, first=0, is_scored=lambda step: False, **fields):
    """Returns what a loop of ten steps does, in order."""
    events = []

    def take_steps(state, done, lr_scale):
      events.append(f'{done + 1} at {lr_scale}')
      if len(events) == fields.get('killed'):
        os.kill(os.getpid(), signal.SIGTERM)
      return types.SimpleNamespace(step=state.step + 1)

    scales = itertools.count(1)
    config = _config(
      num_steps=10, **{k: v for k, v in fields.items() if k != 'killed'}
    )
    try:
      _fit(
        config,
        take_steps,
        first=first,
        is_scored=is_scored,
        score_step=lambda state: events.append(f'score {state.step}'),
        check_finite=lambda done: events.append(f'check {done}'),
        save=lambda state, *, block: events.append(
          f'save {state.step}' + ' and wait' * block
        ),
        lr_scale=lambda: next(scales),
      )
    except signals.Stopped:
      events.append('stopped')
    return events

  def test_scores_come_before_the_checkpoint_that_follows_them(self):
    self.assertEqual(
      self._events(first=7, eval_every=9, save_every=9),
      [
        '8 at 1',
        '9 at 1',
        'check 9',
        'score 9',
        'check 9',
        'save 9',
        '10 at 2',
        'check 10',
        'save 10 and wait',
      ],
    )

  def test_the_last_step_is_scored_where_validation_classes_select(self):
    events = self._events(
      first=9, eval_every=4, **{'dataset.validation': '2/2'}
    )
    self.assertIn('score 10', events)
    self.assertNotIn('score 10', self._events(first=9, eval_every=10))

  def test_a_resumed_run_makes_up_for_a_missing_evaluation_only(self):
    events = self._events(first=8, eval_every=8)
    self.assertEqual(events[:2], ['score 8', '9 at 1'])
    events = self._events(first=8, eval_every=8, is_scored=lambda step: True)
    self.assertEqual(events[0], '9 at 1')

  def test_batch_norm_is_frozen_for_the_first_steps_or_for_all(self):
    for steps, expected in ((0, [0, 0, 0]), (2, [1, 1, 0]), (-1, [1, 1, 1])):
      config = _config(**{'model.freeze_batch_norm_steps': steps})
      frozen = [loop._is_batch_norm_frozen(config, done) for done in range(3)]
      self.assertEqual(frozen, [bool(x) for x in expected], steps)

  def test_a_signal_saves_and_waits(self):
    self.assertEqual(
      self._events(killed=2),
      ['1 at 1', '2 at 1', 'check 2', 'save 2 and wait', 'stopped'],
    )


if __name__ == '__main__':
  absltest.main()
