"""How a command ends on wrong input: one line on stderr and exit status 2."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from proxy_nca_jax.runtime import signals


def fail(message: str) -> NoReturn:
  print(f'Error: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(2)


@contextlib.contextmanager
def in_one_line(*, stopped: str = 'Stopped.') -> Iterator[None]:
  """Ends the command on a ValueError or OSError, and on Ctrl-C.

  Ctrl-C ends the process where it is, like a kill, which harms nothing saved:
  an exception at any line can hang, or come out as another one.

  Args:
    stopped: what Ctrl-C prints, before exit status 130.
  """

  def end(number, frame):
    del frame
    os.write(2, f'\n{stopped}\n'.encode())
    os._exit(128 + number)

  previous = signal.signal(signal.SIGINT, end)
  try:
    yield
  except signals.Stopped as error:  # Where a signal had to wait.
    print(stopped, file=sys.stderr)
    sys.exit(128 + error.number)
  except (ValueError, OSError) as error:
    fail(str(error))
  finally:
    signal.signal(signal.SIGINT, previous)
