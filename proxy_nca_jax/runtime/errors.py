"""Errors for the user: one line on stderr and exit status 2."""

import collections
import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

from proxy_nca_jax.runtime import signals

# Files at fault that are named one by one; `count_kinds` sums up all of them.
MAX_NAMED = 20


def one_line(
  error: BaseException | str, *, max_length: int | None = 200
) -> str:
  """Returns an error's text in one line of printable characters.

  Args:
    error: an exception, or text from elsewhere, such as a server.
    max_length: longer texts are truncated; None keeps all of it.

  Returns:
    The text, or the name of the exception's type if it has no text.
  """
  text = ''.join(filter(str.isprintable, ' '.join(str(error).split())))
  if not text and isinstance(error, BaseException):
    return type(error).__name__
  return text[:max_length]


def count_kinds(reasons: Iterable[str]) -> str:
  """Counts reasons by kind, which is a reason without numbers and details.

  >>> count_kinds(['unlisted', 'class 9: x', 'class 8: y'])
  '2 x class N, 1 x unlisted'
  """
  kinds = collections.Counter(
    re.sub(r'\d(,?\d)*', 'N', reason.split(':')[0]) for reason in reasons
  )
  first = kinds.most_common(MAX_NAMED)
  counts = [f'{count:,} x {kind}' for kind, count in first]
  if others := kinds.total() - sum(count for _, count in first):
    counts.append(f'{others:,} others')
  return ', '.join(counts)


def fail(message: str) -> NoReturn:
  """Ends the process with a message for the user and exit status 2."""
  print(f'Error: {one_line(message, max_length=None)}', file=sys.stderr)
  sys.exit(2)


def open_closed_streams() -> None:
  """Opens the null device in place of closed stdin, stdout and stderr.

  Some launchers start programs with closed streams. Without this, the next
  file to be opened would become stderr, and be overwritten by messages.
  """
  for number, name in enumerate(('stdin', 'stdout', 'stderr')):
    try:
      os.fstat(number)
    except OSError:
      descriptor = os.open(os.devnull, os.O_RDWR)
      if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)
    if getattr(sys, name) is None:
      mode = 'r' if name == 'stdin' else 'w'
      setattr(sys, name, open(number, mode, closefd=False))


def seed(text: str) -> int:
  """Parses a seed of a command line: an integer of 32 bits.

  Raises:
    ValueError: if it is not one; argparse reports it.
  """
  value = int(text)
  if not 0 <= value < 2**32:
    raise ValueError
  return value


@contextlib.contextmanager
def in_one_line(*, stopped: str = 'Stopped.') -> Iterator[None]:
  """Turns ValueError, OSError and Ctrl-C in its block into one line and exit.

  A reader that closes the pipe, such as head, ends the process silently with
  the status of SIGPIPE.

  Ctrl-C ends the process immediately, like a kill. Whatever is already saved
  is safe, and no library can swallow the interruption or hang on it, as with a
  KeyboardInterrupt.

  Args:
    stopped: the line that Ctrl-C prints before exit status 130.
  """

  def end(number, frame):
    del frame
    os.write(2, f'\n{stopped}\n'.encode())
    os._exit(128 + number)

  open_closed_streams()
  previous = signal.signal(signal.SIGINT, end)
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:
    # The interpreter flushes stdout once more when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
  except signals.Stopped as error:  # The signal came inside `StopSignals`.
    print(stopped, file=sys.stderr)
    sys.exit(128 + error.number)
  except (ValueError, OSError) as error:
    fail(str(error))
  finally:
    signal.signal(signal.SIGINT, previous)
