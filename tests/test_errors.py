import contextlib
import io

from absl.testing import absltest, parameterized

from proxy_nca_jax.runtime import errors


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

  def test_our_own_errors_keep_their_traceback(self):
    with self.assertRaises(TypeError), errors.in_one_line():
      raise TypeError('a bug')


if __name__ == '__main__':
  absltest.main()
