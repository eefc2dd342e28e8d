"""Tables of images: one row per image, in a CSV, TSV or Parquet file.

Columns `path` and `label`, and optionally `split`, `query`, `camera` and `box`,
or `left`, `top`, `right` and `bottom`; docs/data.md describes them. A wrong
table raises ValueError, in one line that names the file and the line or row.
"""

import csv
import importlib.util
import itertools
import logging
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from proxy_nca_jax.runtime import errors

_SIDES = ('left', 'top', 'right', 'bottom')
_COLUMNS = ('path', 'label', 'split', 'query', 'camera', 'box', *_SIDES)
# The split of each word in the column `split`, and whether it is a query.
SPLITS = {
  'train': ('train', None),
  'validation': ('validation', None),
  'valid': ('validation', None),
  'val': ('validation', None),
  'test': ('test', None),
  'query': ('test', True),
  'gallery': ('test', False),
}
_BOOLS = {'true': True, '1': True, 'false': False, '0': False}
_SEARCHING = {('test', True), ('test', False)}
_DELIMITERS = {'.csv': ',', '.tsv': '\t'}

_logger = logging.getLogger(__name__)

Box = tuple[int, int, int, int]


class Image(NamedTuple):
  """An image, or a box of one.

  Attributes:
    path: the file, as its source names it.
    version: size, modification and change time of the file in bytes and ns.
    where: the line or row of the table, for messages.
    is_query: whether a test image is a query.
    camera: the name of the camera; '' without one.
    box: left, top, right and bottom in pixels of the upright image, right and
      bottom excluded; None is the whole image.
  """

  path: str
  version: tuple[int, int, int]
  where: str = ''
  is_query: bool = False
  camera: str = ''
  box: Box | None = None


# {split: {label: images}}, the splits in the order of their records.
Classes = dict[str, dict[str, list[Image]]]


def read(table: str, root: str) -> Classes:
  """Reads a table of images.

  Args:
    table: a file that ends in .csv, .tsv or .parquet.
    root: the folder that relative paths start from.

  Returns:
    The images by split, 'train', 'validation' and 'test', or '' if the table
    has no column `split`, and by label, in ascending order of labels and paths:
    the order of rows does not matter. Without test images, those for validation
    are the test split.

  Raises:
    ValueError: if the table or one of its rows is wrong, or a file is missing.
  """
  classes = {}
  for split, label, image in _read_images(table, root):
    classes.setdefault(split, {}).setdefault(label, []).append(image)
  return arrange(classes)


def arrange(classes: Classes) -> Classes:
  """Sorts splits, labels and images; validation is test if there is no test."""
  classes = dict(classes)
  if 'train' in classes and 'test' not in classes:
    classes['test'] = classes.pop('validation')
  return {
    split: {
      label: sorted(images, key=lambda image: (image.path, image.box or ()))
      for label, images in sorted(classes[split].items())
    }
    for split in ('train', 'validation', 'test', '')
    if split in classes
  }


def _read_images(table: str, root: str) -> Iterator[tuple[str, str, Image]]:
  """Yields the split, the label and the image of each row."""
  unit = 'row' if table.lower().endswith('.parquet') else 'line'
  rows = _read_cells(table)
  header = next(rows, (1, []))[1]
  columns = _find_columns(table, header)
  versions, first_lines, roles = {}, {}, set()
  for line, cells in rows:
    where = f'{unit} {line}'
    try:
      if len(cells) != len(header):
        raise ValueError(f'{len(cells)} cells, but {len(header)} in the header')
      name = cells[columns['path']]
      row = {column: cells[i].strip() for column, i in columns.items()}
      split, is_query, camera, box = _parse(row)
      roles.add((split, is_query))
      _check_roles(roles)
      path = os.path.join(root, name)
      first = first_lines.setdefault((os.path.normpath(path), box), line)
      if first != line:
        raise ValueError(f'{name!r} is in {unit} {first} already')
      if path not in versions:
        versions[path] = _find_version(name, root)
      image = Image(name, versions[path], where, bool(is_query), camera, box)
    except ValueError as error:
      raise ValueError(f'{table}, {where}: {error}.') from error
    yield split, row['label'], image
  _check_complete(table, roles)


def _read_cells(table: str) -> Iterator[tuple[int, Sequence[str]]]:
  """Yields the number and the cells of each line, or row; the header first."""
  suffix = os.path.splitext(table)[1].lower()
  if suffix not in (*_DELIMITERS, '.parquet'):
    raise ValueError(
      f'config.dataset.table ({table!r}) must end in .csv, .tsv or .parquet.'
    )
  if not os.path.isfile(table):
    raise ValueError(
      f'No file {table!r} (config.dataset.table): name a table with the '
      'columns path and label.'
    )
  if suffix == '.parquet':
    return _read_parquet(table)
  return _read_csv(table, _DELIMITERS[suffix])


def _read_csv(
  table: str, delimiter: str
) -> Iterator[tuple[int, Sequence[str]]]:
  with open(table, 'rb') as file:
    reader = csv.reader(
      _decode_lines(table, file),
      delimiter=delimiter,
      skipinitialspace=True,
      strict=True,
    )
    while True:
      line = reader.line_num + 1
      try:
        cells = next(reader, None)
      except csv.Error as error:
        raise ValueError(f'{table}, line {line}: {error}.') from error
      if cells is None:
        return
      if cells not in ([], ['']):
        yield line, cells


def _decode_lines(table: str, file: Iterator[bytes]) -> Iterator[str]:
  for number, line in enumerate(file, 1):
    try:
      text = line.decode()
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{table}, line {number}: not UTF-8: save the table in that encoding.'
      ) from error
    # Spreadsheets write a byte order mark.
    yield text.removeprefix('\ufeff') if number == 1 else text


def _read_parquet(table: str) -> Iterator[tuple[int, Sequence[str]]]:
  if not importlib.util.find_spec('pyarrow'):
    raise ValueError(
      f'{table} (config.dataset.table) needs pyarrow: pip install pyarrow.'
    )
  import pyarrow
  from pyarrow import parquet

  try:
    with parquet.ParquetFile(table) as file:
      header = file.schema_arrow.names
      yield 0, header
      # Other columns, such as encoded images, are not read.
      used = [name for name in header if _column_name(name) in _COLUMNS]
      first = 1
      for batch in file.iter_batches(columns=used):
        columns = dict(zip(used, batch.columns))
        cells = [
          map(_as_text, columns[name].to_pylist())
          if name in columns
          else itertools.repeat('', batch.num_rows)
          for name in header
        ]
        yield from enumerate(zip(*cells), first)
        first += batch.num_rows
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f'{table} is not a readable Parquet file: {errors.one_line(error)}'
    ) from error


def _as_text(value) -> str:
  """Returns a cell as a CSV file would have it."""
  if value is None or value != value:  # NaN, by which pandas means none.
    return ''
  if isinstance(value, list):
    return ' '.join(map(_as_text, value))
  return str(value)


def _column_name(cell: str) -> str:
  return cell.strip().lower()


def _find_columns(table: str, header: Sequence[str]) -> dict[str, int]:
  """Returns the position of each known column; logs the others."""
  names = [_column_name(cell) for cell in header]
  problems = []
  for name in ('path', 'label'):
    if name not in names:
      problems.append(f'there is no column {name}')
  problems += [
    f'there are {names.count(name)} columns {name}'
    for name in _COLUMNS
    if names.count(name) > 1
  ]
  sides = [name for name in _SIDES if name in names]
  if sides and 'box' in names:
    problems.append(f'there are columns box and {sides[0]}')
  elif 0 < len(sides) < len(_SIDES):
    missing = [name for name in _SIDES if name not in sides]
    problems.append(f'there is a column {sides[0]}, but no {missing[0]}')
  if problems:
    raise ValueError(
      f'{table}, header: {"; ".join(problems)}. Its columns are '
      f'{errors.one_line(", ".join(map(repr, header))) or "none"}; expected '
      'path and label, optionally split, query, camera, and box or '
      f'{", ".join(_SIDES)}.'
    )
  others = [cell for cell, name in zip(header, names) if name not in _COLUMNS]
  if others:
    _logger.info(
      'Columns of %s that are not used: %s',
      table,
      errors.one_line(', '.join(others)),
    )
  return {name: names.index(name) for name in _COLUMNS if name in names}


def _parse(row: Mapping[str, str]) -> tuple[str, bool | None, str, Box | None]:
  """Returns split, is_query, camera and box of a row.

  is_query is None if the table does not say it.

  Args:
    row: {column: cell without spaces around it}.

  Raises:
    ValueError: if a cell is wrong.
  """
  for name in ('path', 'label'):
    if not row[name]:
      raise ValueError(f'the {name} is empty')
  split, is_query = '', None
  if 'split' in row:
    if row['split'].lower() not in SPLITS:
      raise ValueError(
        f'split is {row["split"]!r}, expected one of {", ".join(SPLITS)}'
      )
    split, is_query = SPLITS[row['split'].lower()]
  if 'query' in row and (row['query'] or split in ('', 'test')):
    if is_query is not None:
      raise ValueError(
        f'split is {row["split"]!r}, but there is a column query as well'
      )
    if row['query'].lower() not in _BOOLS:
      raise ValueError(
        f'query is {row["query"]!r}, expected true or false, or 1 or 0'
      )
    is_query = _BOOLS[row['query'].lower()]
  camera = row.get('camera', '')
  if 'camera' in row and not camera and split != 'train':
    raise ValueError('the camera is empty')
  return split, is_query, camera, _parse_box(row)


def _parse_box(row: Mapping[str, str]) -> Box | None:
  if 'box' in row:
    text = row['box']
    numbers = re.split(r'[\s,]+', text) if text else []
  else:
    numbers = [row[name] for name in _SIDES if name in row]
    text = ' '.join(numbers).strip()
  if not text:
    return None
  try:
    sides = [float(number) for number in numbers]
  except ValueError:
    sides = []
  if len(sides) != 4 or not all(map(math.isfinite, sides)):
    raise ValueError(
      f'the box is {text!r}, expected four numbers: left, top, right, bottom'
    )
  left, top, right, bottom = box = tuple(map(round, sides))
  if not (0 <= left < right and 0 <= top < bottom):
    raise ValueError(
      f'the box {text!r} is empty or outside of the image: expected left, top, '
      'right and bottom in pixels'
    )
  return box


def _find_version(name: str, root: str) -> tuple[int, int, int]:
  """Returns size, modification and change time of a file.

  Raises:
    ValueError: if it is missing, or a folder.
  """
  try:
    status = os.stat(os.path.join(root, name))
  except OSError as error:
    place = '' if os.path.isabs(name) else f' in {root!r}'
    raise ValueError(f'{name!r}{place}: {error.strerror}') from error
  if stat.S_ISDIR(status.st_mode):
    raise ValueError(f'{name!r} is a folder, expected an image')
  return version(status)


def version(status: os.stat_result) -> tuple[int, int, int]:
  """Returns the size, modification and change time of a file."""
  return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check_roles(roles: set[tuple[str, bool | None]]) -> None:
  """Raises ValueError if some test images are queries and others neither.

  Args:
    roles: the split and is_query of the rows so far.
  """
  if ('test', None) in roles and len(roles & _SEARCHING) > 0:
    raise ValueError(
      'some test images have split test, others query or gallery: expected '
      'test for all of them, or query or gallery'
    )


def _check_complete(table: str, roles: set[tuple[str, bool | None]]) -> None:
  """Raises ValueError if the rows of a table lack a split, or a query."""
  found = {split for split, _ in roles}
  if not found:
    raise ValueError(f'{table} has no row below its header.')
  if '' not in found and not ('train' in found and len(found) > 1):
    raise ValueError(
      f'{table}: the column split has only {" and ".join(sorted(found))}, '
      'expected train and test, or train, query and gallery.'
    )
  searching = {is_query for split, is_query in roles if split in ('', 'test')}
  if len(searching) == 1 and searching != {None}:
    missing = 'gallery image' if True in searching else 'query'
    raise ValueError(
      f'{table} has no {missing} among its test images: expected both queries '
      'and gallery images.'
    )
