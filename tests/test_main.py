"""The command as a user runs it: whole runs, stopped runs, wrong input."""

import os
import pathlib
import shutil
import signal
import sys
import tempfile
from unittest import mock

import whole_runs
from absl.testing import absltest, parameterized

from proxy_nca_jax import train
from proxy_nca_jax.configs import glyphs, image_folder
from proxy_nca_jax.runtime import lock, metric_writer

# Four evaluations: time to stop in between. A score falls, and with it the
# rates.
_SMALL = {
  'num_steps': 20,
  'batch_size': 64,
  'log_every': 1,
  'save_every': 4,
  'eval_every': 5,
  'evaluation.select_by': 'harmonic_mean',
  'dataset.num_classes': 40,
  'dataset.validation': '2/2',
  'dataset.images_per_class': 8,
  'model.width': 16,
  'optimizer.plateau_factor': 0.5,
  'optimizer.plateau_patience': 0,
  'report': False,
}


def _command(workdir, *flags, config='glyphs', **fields):
  return whole_runs.command(config, workdir, *flags, **(_SMALL | fields))


def _run(*args, start=whole_runs.Fork, **kwargs):
  return whole_runs.finish(start(_command(*args, **kwargs)))


def _signal_at(number, line_start, *args, start=whole_runs.Fork, **kwargs):
  """Starts a run, signals it when a line begins so, and returns its end."""
  process = start(_command(*args, **kwargs))
  begun = whole_runs.wait_for(process, line_start)
  process.send_signal(number)
  code, output = whole_runs.finish(process)
  return code, begun + output


class MainTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    cls.straight = str(cls.root / 'straight')
    code, output = _run(cls.straight, report=True)
    assert code == 0, output
    cls.output = output

  def _workdir(self):
    return tempfile.mkdtemp(dir=self.root)

  def _assert_equals_straight(self, workdir):
    self.assertEqual(
      whole_runs.metrics(workdir), whole_runs.metrics(self.straight)
    )
    self.assertEqual(
      whole_runs.results(workdir), whole_runs.results(self.straight)
    )
    whole_runs.assert_same_state(workdir, self.straight)

  def test_a_run_prints_progress_and_leaves_its_results(self):
    self.assertRegex(
      self.output, r'step 12/20  loss .* images/s  0:00:\d\d left'
    )
    self.assertRegex(self.output, r'recall@1 +\d+\.\d\d')
    self.assertRegex(self.output, r'rates are multiplied by 0.5\nstep \d+/20')
    results = whole_runs.results(self.straight)
    for title in ('selected', 'trained', 'untrained', 'raw_pixels'):
      for name in (
        'recall@1',
        'recall@2',
        'recall@4',
        'recall@8',
        'map@r',
        'r_precision',
        'nmi',
      ):
        self.assertBetween(results[title][name], 0, 1)
    self.assertEqual(results['step'], 20)
    self.assertTrue(os.path.exists(os.path.join(self.straight, 'report.html')))

  def test_the_validation_classes_select_the_step(self):
    rows = {
      row['step']: 2
      / (1 / row['validation.nmi'] + 1 / row['validation.recall@1'])
      for row in metric_writer.read_metrics(self.straight)
      if 'validation.nmi' in row
    }
    self.assertEqual(list(rows), [0, 5, 10, 15, 20])
    results = whole_runs.results(self.straight)
    best = max(rows, key=lambda step: (rows[step], -step))
    self.assertEqual(results['selected_step'], best)
    self.assertAlmostEqual(results['selected_by']['harmonic_mean'], rows[best])
    is_last = best == 20
    self.assertEqual(results['selected'] == results['trained'], is_last)
    report = pathlib.Path(self.straight, 'report.html').read_text()
    self.assertRegex(report, rf'step shown\D+{best}\D')
    sizes = results['dataset']
    self.assertEqual(
      [sizes[name]['classes'] for name in ('train', 'validation', 'test')],
      [10, 10, 20],
    )

  def test_stopped_runs_save_and_go_on_bit_for_bit_wherever_images_are(self):
    workdir = self._workdir()
    on_device = {'dataset.on_device': True}
    for number, step, fields in (
      (signal.SIGINT, 3, {}),
      # This line comes just before an evaluation.
      (signal.SIGTERM, 10, on_device),
    ):
      code, output = _signal_at(number, f'step {step}/20', workdir, **fields)
      self.assertEqual(code, 128 + number, output)
      self.assertIn('a second signal stops immediately', output)
      self.assertRegex(output, r'Stopped after step \d+ of 20 and saved')
      self.assertNotIn('Traceback', output)
    self.assertRegex(output, r'Resuming after step \d+')
    self.assertRegex(output, r'Putting \d+ images on the devices')
    code, output = _run(workdir)
    self.assertEqual(code, 0, output)
    self.assertRegex(output, r'Resuming after step 1\d')
    self._assert_equals_straight(workdir)

  def test_a_killed_run_goes_on_from_its_last_save_bit_for_bit(self):
    # With no other place to keep what is compiled than its workdir.
    environment = dict(os.environ)
    del environment['JAX_COMPILATION_CACHE_DIR']
    self.enter_context(mock.patch.dict(os.environ, environment, clear=True))
    workdir = self._workdir()
    start = whole_runs.start
    code, _ = _signal_at(signal.SIGKILL, 'step 12/20', workdir, start=start)
    self.assertEqual(code, -signal.SIGKILL)
    cache = pathlib.Path(workdir, 'compilation_cache')
    compiled = {path.name for path in cache.glob('*-cache')}
    code, output = _run(workdir, start=start)
    self.assertEqual(code, 0, output)
    self.assertRegex(output, r'Resuming after step \d+')
    self._assert_equals_straight(workdir)
    # The second start took what the first had compiled.
    added = {path.name for path in cache.glob('*-cache')} - compiled
    for name in ('train_step', 'forward', '_update', '_count', 'init'):
      self.assertTrue([x for x in compiled if f'jit_{name}' in x], name)
      self.assertFalse([x for x in added if f'jit_{name}' in x], name)

  def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_used(self):
    workdir = self._workdir()
    shutil.copytree(self.straight, workdir, dirs_exist_ok=True)
    os.remove(os.path.join(workdir, 'results.json'))
    largest = max(
      pathlib.Path(workdir, 'checkpoints', '20').rglob('*'),
      key=lambda path: path.stat().st_size if path.is_file() else 0,
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    code, output = _run(workdir)
    self.assertEqual(code, 0, output)
    self.assertIn('The checkpoint of step 20 cannot be used', output)
    self.assertIn('Resuming after step 16', output)
    self._assert_equals_straight(workdir)

  def test_several_steps_a_dispatch_stop_and_go_on_bit_for_bit(self):
    fields = {
      'num_steps': 12,
      'steps_per_dispatch': 2,
      'optimizer.ema_decay': 0.9,
      'log_every': 2,
      'save_every': 6,
      'eval_every': 6,
      'evaluation.baselines': False,
      'evaluation.kmeans_iterations': 0,
      'evaluation.nearest_only': True,
      'evaluation.select_by': 'recall@1',
    }
    straight, stopped = self._workdir(), self._workdir()
    code, output = _run(straight, **fields)
    self.assertEqual(code, 0, output)
    self.assertEqual(
      [row['step'] for row in whole_runs.metrics(straight) if 'loss' in row],
      [*range(2, 13, 2)],
    )
    code, output = _signal_at(signal.SIGTERM, 'step 4/12', stopped, **fields)
    self.assertEqual(code, 128 + signal.SIGTERM, output)
    self.assertRegex(output, r'Stopped after step ([68]|10) of 12 and saved')
    code, output = _run(stopped, **fields)
    self.assertEqual(code, 0, output)
    self.assertEqual(whole_runs.metrics(stopped), whole_runs.metrics(straight))
    whole_runs.assert_same_state(stopped, straight)

  def test_a_finished_run_prints_its_table(self):
    code, output = _run(self.straight, **{'dataset.data_dir': '/nowhere'})
    self.assertEqual(code, 0, output)
    self.assertIn('This run finished at step 20', output)
    self.assertRegex(output, r'recall@1 +\d+\.\d\d')

  def test_a_run_killed_before_its_results_writes_no_score_twice(self):
    workdir = self._workdir()
    shutil.copytree(self.straight, workdir, dirs_exist_ok=True)
    os.remove(os.path.join(workdir, 'results.json'))
    code, output = _run(workdir)
    self.assertEqual(code, 0, output)
    self._assert_equals_straight(workdir)

  def test_steps_can_be_added_to_a_finished_run(self):
    workdir = self._workdir()
    shutil.copytree(self.straight, workdir, dirs_exist_ok=True)
    code, output = _run(workdir, num_steps=22)
    self.assertEqual(code, 0, output)
    self.assertIn('Resuming after step 20', output)
    self.assertEqual(whole_runs.results(workdir)['step'], 22)

  def test_eval_mode_scores_the_newest_checkpoint(self):
    code, output = _run(self.straight, '--mode=eval')
    self.assertEqual(code, 0, output)
    recall = 100 * whole_runs.results(self.straight)['trained']['recall@1']
    self.assertRegex(output, rf'recall@1 +{recall:.2f} \[')

  def test_a_second_run_in_the_workdir_is_refused(self):
    workdir = self._workdir()
    with lock.locked(os.path.join(workdir, 'lock')):
      code, output = _run(workdir)
    self._assert_refused(code, output, 'Another run is using')

  def test_another_configuration_is_refused_by_name(self):
    code, output = _run(self.straight, seed=5)
    self._assert_refused(code, output, 'seed was 0 and is 5')

  @parameterized.parameters(
    ({'optimizer.rate': 1}, "no field 'rate'.*choose one of.*backbone"),
    ({'num_steps': 'many'}, 'num_steps'),
    ({'dataset.num_classes': 9999}, r'num_classes .9999. must be in .1, \d+\]'),
    (
      {'eval_every': 0, 'optimizer.plateau_factor': 1.0},
      'dataset.validation.*config.eval_every',
    ),
    (
      {'evaluation.select_by': 'f2'},
      'select_by.*one of.*recall@1.*harmonic_mean',
    ),
  )
  def test_wrong_input_is_one_clear_line(self, fields, message):
    code, output = _run(self._workdir(), **fields)
    self._assert_refused(code, output, message)

  @parameterized.parameters(
    (
      {'loss.name': 'tripplet'},
      r"loss.name \('tripplet'\) must be one of adaface",
    ),
    ({'model.name': 'resnet'}, 'config.model.name .*must be one of'),
    ({'dataset.name': 'mnist'}, 'config.dataset.name .*must be one of'),
    ({'dataset.fonts_dir': '/nowhere'}, 'No folder'),
    ({'dataset.validation': '3/2'}, 'dataset.validation'),
    ({'dataset.images_per_class': 7}, 'batch_size .64.*divisible'),
  )
  def test_what_does_not_fit_is_said(self, fields, message):
    config = glyphs.get_config()
    config.update_from_flattened_dict(_SMALL | fields)
    with self.assertRaisesRegex(ValueError, message):
      train.train_and_evaluate(config, self._workdir())

  def test_an_unknown_recipe_is_one_clear_line(self):
    code, output = _run(self._workdir(), config='cub200.py:papr')
    self._assert_refused(code, output, "^Error: Unknown recipe 'papr'.*paper")

  def test_a_recipe_of_a_config_without_is_one_clear_line(self):
    code, output = _run(self._workdir(), config='glyphs.py:best')
    self._assert_refused(code, output, 'no recipes: remove the colon')

  def test_a_missing_config_is_one_clear_line(self):
    command = _command(self._workdir())
    command[2] = '--config=cub'
    code, output = whole_runs.finish(whole_runs.Fork(command))
    self._assert_refused(code, output, "no config 'cub'.*one of .*cub200.*sop")

  def test_a_dry_run_prints_the_plan_and_leaves_no_trace(self):
    workdir = os.path.join(self._workdir(), 'run')
    code, output = _run(workdir, dry_run=True)
    self.assertEqual(code, 0, output)
    self.assertRegex(output, r'Training on \d+ images of 10 classes')
    self.assertRegex(output, r'proxies +\| \(10, 64\)')
    self.assertRegex(output, r'20 steps of 64 images, \d+\.\d epochs')
    self.assertRegex(output, r'Memory on each of 1 devices: \d+\.\d MiB')
    self.assertFalse(os.path.exists(workdir))

  def test_a_config_of_ours_is_found_by_its_name(self):
    command = _command(self._workdir(), dry_run=True)
    command[2] = '--config=glyphs'
    code, output = whole_runs.finish(whole_runs.Fork(command))
    self.assertEqual(code, 0, output)

  def test_a_missing_or_empty_root_is_said(self):
    config = image_folder.get_config('scratch')
    for root in ('', '/nowhere', self._workdir()):
      config.dataset.root = root
      with self.assertRaisesRegex(ValueError, 'config.dataset.root'):
        train.train_and_evaluate(config, self._workdir())

  def _assert_refused(self, code, output, message):
    line = whole_runs.assert_one_line_error(code, output)
    self.assertRegex(line, message)


_OUT_OF_MEMORY = """
import jax
from proxy_nca_jax.runtime import command_line

def work(config, workdir):
  raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: allocating 9 bytes')

command_line.run(work, config='configs/glyphs.py')
"""


class CommandLineTest(parameterized.TestCase):
  def test_a_device_without_memory_is_one_clear_line(self):
    process = whole_runs.start(
      [sys.executable, '-c', _OUT_OF_MEMORY, '--workdir=/nowhere'],
      cwd=whole_runs.ROOT,
    )
    line = whole_runs.assert_one_line_error(*whole_runs.finish(process))
    self.assertRegex(line, 'memory of a device is full.*config.batch_size')

  @parameterized.parameters(
    (('main.py',), ('config.FIELD=VALUE', '--workdir:', '--mode:')),
    # As the installed command is.
    (
      ('-c', 'from proxy_nca_jax import commands; commands.main()', 'train'),
      ('config.FIELD=VALUE', '--workdir:', '--mode:'),
    ),
    (('experiments/identities.py',), ('--config:', '--num_seeds:')),
  )
  def test_help_tells_of_the_flags(self, program, names):
    code, output = whole_runs.finish(
      whole_runs.start(
        [sys.executable, *program, '--help'], cwd=whole_runs.ROOT
      )
    )
    self.assertEqual(code, 0, output)
    for name in names:
      self.assertIn(name, output)


if __name__ == '__main__':
  absltest.main()
