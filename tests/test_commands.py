"""The installed command `proxy-nca` and its commands."""

import contextlib
import io
import sys
from unittest import mock

from absl.testing import absltest, parameterized

from proxy_nca_jax import commands


def _call(*arguments):
  """Returns exit status, stdout and stderr of `proxy-nca`."""
  out, err = io.StringIO(), io.StringIO()
  with (
    mock.patch.object(sys, 'argv', ['proxy-nca', *arguments]),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    try:
      commands.main()
      code = 0
    except SystemExit as exit_:
      code = exit_.code or 0
  return code, out.getvalue(), err.getvalue()


class CommandsTest(parameterized.TestCase):
  @parameterized.parameters(
    'evaluate', 'search', 'report', 'datasets', 'models'
  )
  def test_help_names_the_command_that_was_called(self, name):
    code, out, _ = _call(name, '--help')
    self.assertEqual(code, 0)
    self.assertIn(f'usage: proxy-nca {name}', out)
    self.assertNotIn('python -m', out)

  @parameterized.parameters((), ('--help',))
  def test_help_lists_the_commands(self, *arguments):
    code, out, _ = _call(*arguments)
    self.assertEqual(code, 0)
    for name in commands._COMMANDS:
      self.assertRegex(out, rf'(?m)^  {name} +\w')

  def test_an_unknown_command_lists_the_choices(self):
    code, out, err = _call('serch')
    self.assertEqual((code, out), (2, ''))
    self.assertEqual(err.count('\n'), 1)
    self.assertIn("'serch': choose one of train, evaluate, search", err)


if __name__ == '__main__':
  absltest.main()
