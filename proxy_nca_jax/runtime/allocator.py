"""Settings of the C library's allocator, which halve a step's time on CPUs.

XLA allocates the arrays of each step anew, up to gigabytes. By default each of
them is mapped by the kernel, cleared page by page at its first use, and given
back. With these settings freed memory stays with the process, in huge pages,
and is used again. The memory of a process stays at its peak, which is the same.
"""

import os
import sys

_TUNABLES, _PREFIX = 'GLIBC_TUNABLES', 'glibc.malloc.'
# No array is large enough to be mapped on its own, and nothing is given back.
# Other arenas than the main one could not grow to such sizes.
_SETTINGS = {
  'hugetlb': 1,
  'mmap_threshold': 2**40,
  'trim_threshold': 2**40,
  'arena_max': 1,
}


def restart() -> None:
  """Restarts a command with the settings, on Linux.

  The C library reads them when a process begins (GNU C Library Manual, Memory
  Allocation Tunables), so the process replaces itself, under the same number.
  Nothing happens if the user has made settings of the allocator. To be called
  before costly imports.
  """
  tunables = os.environ.get(_TUNABLES, '')
  if _PREFIX in tunables or not sys.executable or sys.platform != 'linux':
    return
  settings = [f'{_PREFIX}{name}={value}' for name, value in _SETTINGS.items()]
  os.environ[_TUNABLES] = ':'.join(filter(None, [tunables, *settings]))
  sys.stdout.flush()
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
