"""Decisions from the history of a run: the best step and the plateau."""

from absl.testing import absltest, parameterized

from proxy_nca_jax.configs import default
from proxy_nca_jax.evaluate import selection


def _config(**fields):
  config = default.get_config()
  config.dataset.validation = '2/2'
  config.eval_every = 10
  config.update_from_flattened_dict(fields)
  return config


def _history(recalls, nmis=None):
  """Rows of metrics: losses at every step, scores at every tenth."""
  history = [{'step': 0, 'untrained.recall@1': 1.0}]
  for index, recall in enumerate(recalls):
    row = {'step': 10 * (index + 1), 'validation.recall@1': recall}
    if nmis:
      row['validation.nmi'] = nmis[index]
    history += [{'step': row['step'] - 5, 'loss': 1.0}, row]
  return history


class SelectTest(parameterized.TestCase):
  def test_the_first_of_the_best_steps_is_selected(self):
    history = _history([0.3, 0.5, 0.5, 0.4])
    self.assertEqual(selection.select(_config(), history), (20, 0.5))

  def test_without_scores_nothing_is_selected(self):
    self.assertIsNone(selection.select(_config(), _history([])))

  def test_the_harmonic_mean_is_of_nmi_and_recall(self):
    config = _config(**{'evaluation.select_by': 'harmonic_mean'})
    history = _history([0.9, 0.6], nmis=[0.3, 0.6])
    step, value = selection.select(config, history)
    self.assertEqual(step, 20)
    self.assertAlmostEqual(value, 0.6)
    # 2 / (1 / 0.9 + 1 / 0.3)
    step, value = selection.select(config, history[:3])
    self.assertEqual(step, 10)
    self.assertAlmostEqual(value, 0.45)

  def test_a_single_score_may_be_negative(self):
    config = _config(**{'evaluation.select_by': 'ami'})
    history = [
      {'step': 10, 'validation.ami': -0.2},
      {'step': 20, 'validation.ami': -0.1},
    ]
    self.assertEqual(selection.select(config, history), (20, -0.1))

  def test_a_row_without_every_averaged_score_does_not_count(self):
    config = _config(**{'evaluation.select_by': 'harmonic_mean'})
    self.assertIsNone(selection.select(config, _history([0.9])))


class LrScaleTest(absltest.TestCase):
  _HALVED = {
    'optimizer.plateau_factor': 0.5,
    'optimizer.plateau_patience': 1,
  }

  def test_without_a_factor_it_is_one(self):
    history = _history([0.5, 0.4, 0.4, 0.4])
    self.assertEqual(selection.lr_scale(_config(), history), 1)

  def test_scores_that_do_not_improve_halve_it(self):
    config = _config(**self._HALVED)
    for number, expected in enumerate([1, 1, 1, 0.5, 0.5, 0.25]):
      history = _history([0.5, 0.4, 0.4, 0.4, 0.4][:number])
      logged = self.assertLogs if expected < 1 else self.assertNoLogs
      with logged('proxy_nca_jax', 'INFO'):
        scale = selection.lr_scale(config, history)
      self.assertEqual(scale, expected, number)

  def test_a_step_that_only_an_extended_run_has_scored_does_not_count(self):
    config = _config(**self._HALVED)
    history = _history([0.5, 0.4])
    history.append({'step': 25, 'validation.recall@1': 0.1})
    self.assertEqual(selection.lr_scale(config, history), 1)


class CheckTest(parameterized.TestCase):
  _SCORES = {'recall@1': 0.5, 'nmi': 0.5, 'num_queries': 7}

  @parameterized.parameters('recall@1', 'nmi', 'harmonic_mean')
  def test_scores_of_the_evaluation_pass(self, name):
    config = _config(**{'evaluation.select_by': name})
    selection.check_select_by(config, self._SCORES)

  @parameterized.parameters('map@r', 'num_queries')
  def test_others_are_refused_with_the_choices(self, name):
    config = _config(**{'evaluation.select_by': name})
    with self.assertRaisesRegex(
      ValueError, 'one of recall@1, nmi, harmonic_mean'
    ):
      selection.check_select_by(config, self._SCORES)
    config.dataset.validation = ''
    selection.check_select_by(config, self._SCORES)

  def test_harmonic_mean_needs_both_scores(self):
    config = _config(**{'evaluation.select_by': 'harmonic_mean'})
    with self.assertRaisesRegex(ValueError, 'must be one of recall@1'):
      selection.check_select_by(config, {'recall@1': 0.5})


if __name__ == '__main__':
  absltest.main()
