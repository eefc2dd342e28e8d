"""Reads the JSON files of a run, and checks the fields that are used.

They may be damaged, edited, cut off or of another program. Each problem is one
line that names the file and the field.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from proxy_nca_jax.runtime import errors, folders

# No count is larger; a float holds all integers up to here.
_MAX_COUNT = 2**53
# Percents and sums of larger numbers overflow.
_MAX_NUMBER = 1e300


class Kind(NamedTuple):
  """What a field may hold.

  Attributes:
    text: the description for messages, such as 'a text'.
    accepts: whether a value is one.
  """

  text: str
  accepts: Callable[[Any], bool]


def is_number(value: Any, *, finite: bool = True) -> bool:
  """Whether a value is a number that can be computed with."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  if isinstance(value, float) and not math.isfinite(value):
    return not finite
  return abs(value) <= _MAX_NUMBER


def is_count(value: Any) -> bool:
  """Whether a value is a count, such as a step."""
  return type(value) is int and 0 <= value <= _MAX_COUNT


def _is_texts(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


TEXT = Kind('a text', lambda value: isinstance(value, str))
TEXTS = Kind('a list of texts', _is_texts)
COUNT = Kind('an integer in [0, 2^53]', is_count)
OBJECT = Kind('an object', lambda value: isinstance(value, dict))


def optional(kind: Kind) -> Kind:
  """Returns the kind of a field that may be null or missing."""
  return Kind(
    f'{kind.text} or null', lambda value: value is None or kind.accepts(value)
  )


def read(path: str, fields: Mapping[str, Kind] | None = None) -> dict | None:
  """Reads a file that holds a JSON object; None if it does not exist.

  Args:
    path: the file.
    fields: {'group.field': its kind}, groups before their fields.

  Raises:
    ValueError: if the file is damaged, or a field is missing or wrong; names
      the file and the field.
    OSError: if it cannot be read.
  """
  if not os.path.lexists(path):
    return None
  try:
    content = json.loads(folders.read_file(path).decode())
    # An escaped half of a surrogate pair is in no encoding.
    json.dumps(content, ensure_ascii=False).encode()
  except (ValueError, RecursionError) as error:
    fail(path, errors.one_line(error))
  if not isinstance(content, dict):
    fail(path, f'it holds {type(content).__name__} instead of an object')
  for name, kind in (fields or {}).items():
    value = content
    for part in name.split('.'):
      value = value.get(part) if isinstance(value, dict) else None
    if not kind.accepts(value):
      fail(path, f'{name} is {describe(value)}; it must be {kind.text}')
  return content


def describe(value: Any) -> str:
  """Returns a wrong value for a message, shortened; null is missing too."""
  if value is None:
    return 'missing'
  try:
    text = json.dumps(value)
  except (ValueError, RecursionError):  # Integers of very many digits.
    text = type(value).__name__
  return text if len(text) <= 40 else f'{text[:40]}...'


def fail(path: str, problem: str) -> NoReturn:
  """Raises ValueError for a file, with the problem and what to do."""
  raise ValueError(
    f'{path!r} is damaged: {problem}. Restore it, or use another folder.'
  )
