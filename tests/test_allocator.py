import os
import subprocess
import sys
from unittest import mock

from absl.testing import absltest

_PROGRAM = """
import os, resource, sys
from proxy_nca_jax.runtime import allocator
allocator.restart()
import numpy as np

def count_faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**24)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults = [count_faults() for _ in range(4)]
print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), faults[-1], sys.argv[1:])
"""


def _run(**environment):
  process = subprocess.Popen(
    [sys.executable, '-c', _PROGRAM, 'a b', '--c=d'],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), **environment},
  )
  output, _ = process.communicate()
  return process.pid, process.returncode, output.strip()


class AllocatorTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(os.environ))
    os.environ.pop('GLIBC_TUNABLES', None)

  def test_command_restarts_once_as_the_same_process(self):
    pid, code, output = _run()
    self.assertEqual(code, 0)
    self.assertStartsWith(output, f'{pid} glibc.malloc.hugetlb=1:')
    self.assertEndsWith(output, "['a b', '--c=d']")

  def test_freed_memory_is_used_again(self):
    _, _, output = _run()
    self.assertLess(int(output.split()[2]), 100)
    # 128 MB are 64 huge pages, or 32,768 small ones, in each of four calls.
    _, _, output = _run(GLIBC_TUNABLES='glibc.malloc.mmap_threshold=100000')
    self.assertGreater(int(output.split()[2]), 30)

  def test_other_settings_are_kept(self):
    _, _, output = _run(GLIBC_TUNABLES='glibc.rtld.nns=3')
    self.assertIn(' glibc.rtld.nns=3:glibc.malloc.hugetlb=1:', output)

  def test_the_user_decides(self):
    _, _, output = _run(GLIBC_TUNABLES='glibc.malloc.hugetlb=0')
    self.assertIn(' glibc.malloc.hugetlb=0 ', output)


if __name__ == '__main__':
  absltest.main()
