"""How a command ends on wrong input: one line on stderr and exit status 2."""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn


def fail(message: str) -> NoReturn:
  print(f'Error: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(2)


@contextlib.contextmanager
def in_one_line(*, stopped: str = 'Stopped.') -> Iterator[None]:
  """Ends the command on a ValueError or OSError, and on Ctrl-C.

  Args:
    stopped: what Ctrl-C prints, before exit status 130.
  """
  try:
    yield
  except KeyboardInterrupt:
    print(stopped, file=sys.stderr)
    sys.exit(130)
  except (ValueError, OSError) as error:
    fail(str(error))
