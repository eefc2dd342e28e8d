"""The package's metadata says what the checkout does."""

import pathlib
import tomllib

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parent.parent


class PackageTest(absltest.TestCase):
  def test_the_extra_for_tests_is_the_list_of_the_checkout(self):
    project = tomllib.loads((_ROOT / 'pyproject.toml').read_text())['project']
    lines = (_ROOT / 'requirements-test.txt').read_text().split()
    self.assertEqual(
      ['-r', 'requirements.txt', *project['optional-dependencies']['test']],
      lines,
    )


if __name__ == '__main__':
  absltest.main()
