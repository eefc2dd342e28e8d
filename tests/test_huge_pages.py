import os
import subprocess
import sys
from unittest import mock

from absl.testing import absltest

from proxy_nca_jax.runtime import huge_pages

_PROGRAM = """
import os, sys
from proxy_nca_jax.runtime import huge_pages
huge_pages._is_on_request = lambda: {}
huge_pages.restart()
print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])
"""


def _run(is_on_request, **environment):
  process = subprocess.Popen(
    [sys.executable, '-c', _PROGRAM.format(is_on_request), 'a b', '--c=d'],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), **environment},
  )
  output, _ = process.communicate()
  return process.pid, process.returncode, output.strip()


class HugePagesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(os.environ))
    os.environ.pop('GLIBC_TUNABLES', None)

  def test_command_restarts_once_as_the_same_process(self):
    pid, code, output = _run(True)
    self.assertEqual(code, 0)
    self.assertEqual(output, f"{pid} glibc.malloc.hugetlb=1 ['a b', '--c=d']")

  def test_other_settings_are_kept(self):
    _, _, output = _run(True, GLIBC_TUNABLES='glibc.malloc.arena_max=2')
    self.assertIn('arena_max=2:glibc.malloc.hugetlb=1', output)

  def test_nothing_happens_where_the_user_or_the_kernel_decides(self):
    _, _, output = _run(True, GLIBC_TUNABLES='glibc.malloc.hugetlb=0')
    self.assertIn(' glibc.malloc.hugetlb=0 ', output)
    _, _, output = _run(False)
    self.assertIn(' None ', output)

  def test_a_kernel_without_the_setting_is_no_error(self):
    with mock.patch.object(huge_pages, '_MODE', '/nowhere'):
      self.assertFalse(huge_pages._is_on_request())


if __name__ == '__main__':
  absltest.main()
