import contextlib
import io
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

from proxy_nca_jax.runtime import errors

_ROOT = pathlib.Path(__file__).parent.parent
_MESSAGES = """
import sys
from proxy_nca_jax.runtime import errors
with errors.in_one_line():
  file = open(sys.argv[1], 'w')
  print('content', file=file)
  print('a message', file=sys.stderr)
  print('a result')
"""
_MANY_LINES = """
from proxy_nca_jax.runtime import errors
with errors.in_one_line():
  for number in range(100_000):
    print(number)
"""


class ErrorsTest(parameterized.TestCase):
  def test_reasons_are_counted_by_kind(self):
    reasons = ['missing'] * 990
    reasons += [f'class {i}, expected 1 to 1,96' for i in range(9)]
    self.assertEqual(
      errors.count_kinds(reasons),
      '990 x missing, 9 x class N, expected N to N',
    )
    various = [chr(0x4E00 + i) for i in range(50)]
    self.assertEndsWith(errors.count_kinds(various), ', 30 others')

  @parameterized.parameters(
    (ValueError('a\n  b\tc'), 'a b c'),
    (ValueError('\x1b[31mred\x07'), '[31mred'),
    (ValueError('x' * 300), 'x' * 200),
    (ValueError(), 'ValueError'),
    (KeyError('name'), "'name'"),
    ('two\nlines', 'two lines'),
    ('', ''),
  )
  def test_one_line_is_printable_and_short(self, error, expected):
    self.assertEqual(errors.one_line(error), expected)

  @parameterized.parameters(ValueError, OSError)
  def test_errors_of_the_user_are_one_line_and_exit_status_2(self, kind):
    with (
      contextlib.redirect_stderr(io.StringIO()) as printed,
      self.assertRaises(SystemExit) as raised,
      errors.in_one_line(),
    ):
      raise kind('a' * 300 + '\nb')
    self.assertEqual(raised.exception.code, 2)
    self.assertEqual(printed.getvalue(), f'Error: {"a" * 300} b\n')

  def test_closed_streams_write_into_no_file(self):
    file = self.create_tempfile().full_path
    for closed in ('2>&-', '>&- 2>&-', '<&- >&- 2>&-'):
      code = subprocess.run(
        ['sh', '-c', f'exec "$0" -c "$1" "$2" {closed}']
        + [sys.executable, _MESSAGES, file],
        cwd=_ROOT,
        check=False,
        stdout=subprocess.DEVNULL,
      ).returncode
      self.assertEqual(code, 0)
      self.assertEqual(pathlib.Path(file).read_text(), 'content\n')

  def test_a_closed_pipe_is_silent(self):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
      [sys.executable, '-c', _MANY_LINES],
      cwd=_ROOT,
      check=False,
      stdout=write,
      stderr=subprocess.PIPE,
    )
    os.close(write)
    self.assertEqual((process.returncode, process.stderr), (141, b''))

  def test_our_own_errors_keep_their_traceback(self):
    with self.assertRaises(TypeError), errors.in_one_line():
      raise TypeError('a bug')


if __name__ == '__main__':
  absltest.main()
