"""A short run of benchmarks/fuzz.py, in this process, and its own checks."""

import importlib.util
import pathlib
import random
from unittest import mock

from absl.testing import absltest, parameterized

_PATH = pathlib.Path(__file__).parent.parent / 'benchmarks' / 'fuzz.py'
_SPEC = importlib.util.spec_from_file_location('fuzz', _PATH)
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)


def _run(name, seeds):
  return [fuzz.run_case(name, seed) for seed in seeds]


class FuzzTest(parameterized.TestCase):
  def test_damaged_files_are_read_or_refused_in_one_line(self):
    counts = fuzz.fuzz(
      list(fuzz.KINDS), seconds=60, seed=0, cases=12, run=_run, cases_per_call=4
    )
    for name, outcomes in counts.items():
      self.assertEqual(outcomes.total(), 12)
      self.assertLessEqual(outcomes.keys(), {'succeeded', 'refused'}, name)
    both = sum(counts.values(), type(outcomes)())
    self.assertGreater(min(both['succeeded'], both['refused']), 9)
    self.assertLen(fuzz.table(counts).splitlines(), len(fuzz.KINDS) + 1)

  def test_a_case_is_determined_by_its_seed(self):
    for name, kind in fuzz.KINDS.items():
      self.assertEqual(
        kind.make(random.Random(3)).keys(), kind.make(random.Random(3)).keys()
      )
      self.assertEqual(fuzz.run_case(name, 3), fuzz.run_case(name, 3))

  @parameterized.parameters(
    (lambda folder: 1 / 0, 'ZeroDivisionError'),
    (lambda folder: (folder / 'field').write_text('x'), 'changed files'),
    (lambda folder: (folder / 'field').unlink(), 'changed files'),
    (lambda folder: fuzz.sys.exit(1), 'status 1'),
    (lambda folder: fuzz.errors.fail('x' * 9999), 'status 2, 1 lines'),
  )
  def test_other_ends_are_failures_with_their_seed(self, read, expected):
    kind = fuzz.KINDS['configs']._replace(read=read)
    self.enter_context(mock.patch.dict(fuzz.KINDS, configs=kind))
    counts = fuzz.fuzz(['configs'], seconds=9, seed=5, cases=1, run=_run)
    (outcome,) = counts['configs']
    self.assertStartsWith(outcome, f'seed 5: {expected}')
    self.assertIn('5', fuzz.table(counts).splitlines()[1].split()[-1])

  def test_a_child_that_crashes_or_hangs_is_a_failure(self):
    for read, expected in (
      (lambda folder: fuzz.os._exit(7), 'the process ended with 7'),
      (lambda folder: fuzz.time.sleep(60), 'hangs'),
    ):
      kind = fuzz.KINDS['configs']._replace(read=read)
      with (
        mock.patch.dict(fuzz.KINDS, configs=kind),
        mock.patch.object(fuzz, '_LIMIT_SECONDS', 1),
      ):
        (outcome,) = fuzz.run_in_child('configs', [1, 2])
      self.assertStartsWith(outcome, expected)


if __name__ == '__main__':
  absltest.main()
