"""The user's own embeddings: a file of vectors with their labels.

A file is read once from its beginning to its end: values are checked, labels
numbered and everything hashed. The outcome is stored below the data folder, and
later runs read only that. Arrays of NumPy are mapped where they are; those in
compressed files, in Fortran order and in Parquet are first written to a .npy
file beside the outcome, in blocks of rows.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import tqdm

from proxy_nca_jax.datasets import preparation, vectors
from proxy_nca_jax.runtime import errors, files, folders, signals

NAME = 'embeddings'

# The values of the split column, in the order of their classes.
_SPLITS = ('train', 'validation', 'test')
# Rows in memory at a time: 48 MB of 768 float64.
_BLOCK = 8192
# Rows that a message lists.
_MAX_ROWS = 5
_INFO, _LABELS, _VECTORS = 'info.json', 'labels.npy', 'vectors.npy'
_FORMATS = (
  'an .npz file with the arrays embeddings and labels, a NAME.npy file beside '
  'NAME.labels.npy, or a .parquet file with the columns embedding and label'
)

# What damaged and encrypted archives raise.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)

_logger = logging.getLogger(__name__)


class _Matrix(NamedTuple):
  """The vectors of a file.

  Attributes:
    shape: (number of rows, dimension).
    dtype: float16, float32 or float64, in any byte order.
    offset: position in the file, in bytes; None if it cannot be mapped there.
    blocks: reads the rows in blocks, in order.
  """

  shape: tuple[int, int]
  dtype: np.dtype
  offset: int | None
  blocks: Callable[[], Iterator[np.ndarray]]


class _Labels(NamedTuple):
  """Labels by number.

  Attributes:
    names: the distinct labels as texts, in ascending order.
    codes: int [num_rows], indices of `names`.
  """

  names: Sequence[str]
  codes: np.ndarray


class _Content(NamedTuple):
  matrix: _Matrix
  labels: _Labels
  split: _Labels | None


def open_dataset(
  *, data_dir: str, root: str
) -> tuple[vectors.Vectors, dict[str, Any]]:
  """Opens a file of vectors; the first time, checks and perhaps converts it.

  A change to the file's name, size, modification or change time makes it a new
  one, which is read again.

  Args:
    data_dir: the folder of prepared datasets.
    root: the file.

  Returns:
    (vectors, metadata): metadata has the 'labels' int32 [num_rows], the
    'class_names', a 'digest' of everything, and if the file has a split
    'num_train_classes' and 'num_validation_classes', whose classes come first.

  Raises:
    ValueError: if the file is missing, has another form, or holds values that
      are no vectors or labels.
  """
  root = os.path.expanduser(root)
  data_dir = preparation.find_data_dir(data_dir)
  folders.check_utf8(data_dir, 'The folder of datasets (data_dir)')
  parts = {part: _stat(part) for part in _find_parts(root)}
  key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
  folder = os.path.join(data_dir, NAME, key)
  with preparation.locked(os.path.dirname(folder)):
    if not os.path.exists(folder):
      with files.create_folder_atomically(folder) as part:
        _prepare(root, part)
  with open(os.path.join(folder, _INFO), encoding='utf-8') as file:
    info = json.load(file)
  place = info.pop('vectors')
  path = os.path.join(folder, _VECTORS) if place.pop('is_converted') else root
  labels = np.load(os.path.join(folder, _LABELS))
  return vectors.open_vectors(os.path.abspath(path), **place), {
    'labels': labels,
    **info,
  }


@contextlib.contextmanager
def _readable(root: str, *types: type[Exception]) -> Iterator[None]:
  """Turns the errors of a library into a ValueError that names the file."""
  try:
    yield
  except types as error:
    raise ValueError(
      f'{root!r} cannot be read: {errors.one_line(error)}'
    ) from error


def _find_parts(root: str) -> list[str]:
  """Returns the absolute paths of the files that make the dataset.

  Raises:
    ValueError: if one is missing or no regular file.
  """
  if not root:
    raise ValueError(
      f'config.dataset.root is empty: set --config.dataset.root=FILE to '
      f'{_FORMATS}.'
    )
  if not root.endswith(('.npz', '.npy', '.parquet')):
    raise ValueError(f'{root!r} (config.dataset.root) must be {_FORMATS}.')
  parts = [root]
  if root.endswith('.npy'):
    parts.append(_beside(root, 'labels'))
    if os.path.lexists(_beside(root, 'split')):
      parts.append(_beside(root, 'split'))
  for part in parts:
    if not os.path.isfile(part):
      is_other = os.path.exists(part)
      raise ValueError(
        f'{part!r} is not a regular file.'
        if is_other
        else f'No file {part!r} (config.dataset.root): name {_FORMATS}.'
      )
    with open(part, 'rb') as file:
      try:
        folders.check_lfs(file.read(256))
      except ValueError as error:
        raise ValueError(f'{part!r} is {error}.') from error
  return [os.path.abspath(part) for part in parts]


def _beside(root: str, name: str) -> str:
  return f'{root.removesuffix(".npy")}.{name}.npy'


def _stat(path: str) -> list[int]:
  status = os.stat(path)
  return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _prepare(root: str, folder: str) -> None:
  """Reads a file and writes the outcome into a folder."""
  _logger.info('Checking the vectors of %s', folders.escape(root))
  if root.endswith('.parquet'):
    content = _read_parquet(root)
  elif root.endswith('.npz'):
    content = _read_npz(root)
  else:
    content = _read_npy(root)
  matrix = content.matrix
  is_converted = matrix.offset is None
  offset, path = matrix.offset, os.path.join(folder, _VECTORS)
  digest = hashlib.sha256(f'{matrix.dtype.str} {matrix.shape}'.encode())
  if is_converted:
    _logger.info(
      'Writing them once to the data folder, from which they are read'
    )
    with files.write_atomically(path, 'wb') as file:
      np.lib.format.write_array_header_2_0(
        file,
        {
          'descr': matrix.dtype.str,
          'fortran_order': False,
          'shape': matrix.shape,
        },
      )
      offset = file.tell()
      _check_rows(root, matrix, digest, file.write)
  else:
    _check_rows(root, matrix, digest, None)
  info, labels = _number_classes(root, content)
  digest.update(json.dumps(info).encode())
  digest.update(labels.tobytes())
  with files.write_atomically(os.path.join(folder, _LABELS), 'wb') as file:
    np.save(file, labels)
  info |= {
    'digest': digest.hexdigest(),
    'vectors': {
      'is_converted': is_converted,
      'offset': offset,
      'shape': matrix.shape,
      'dtype': matrix.dtype.str,
    },
  }
  with files.write_atomically(os.path.join(folder, _INFO)) as file:
    json.dump(info, file)


def _check_rows(root: str, matrix: _Matrix, digest, write) -> None:
  """Hashes all rows, and writes them if `write` is given.

  Raises:
    ValueError: if some are not finite as float32; names the first ones.
  """
  wrong, num_wrong, position = [], 0, 0
  with tqdm.tqdm(
    total=matrix.shape[0],
    unit=' vectors',
    desc=NAME,
    disable=None,
    leave=False,
    delay=1,
  ) as progress:
    for block in matrix.blocks():
      signals.check()
      block = np.ascontiguousarray(block)
      digest.update(block)
      if write:
        write(block)
      with np.errstate(over='ignore'):
        rows = np.isfinite(block.astype(np.float32)).all(axis=1)
      rows = np.flatnonzero(~rows)
      wrong += (position + rows[: _MAX_ROWS - len(wrong)]).tolist()
      num_wrong += len(rows)
      position += len(block)
      progress.update(len(block))
  if num_wrong:
    more = f' and {num_wrong - len(wrong):,} more' * (num_wrong > len(wrong))
    raise ValueError(
      f'{root!r} has vectors with NaN, infinity or values beyond float32, in '
      f'the rows {", ".join(map(str, wrong))}{more}, counted from 0: remove '
      'these rows.'
    )


def _number_classes(
  root: str, content: _Content
) -> tuple[dict[str, Any], np.ndarray]:
  """Returns the metadata of the classes, and int32 [num_rows] labels.

  Without a split, classes are ordered by name. A class of two splits counts as
  two classes, those of the train split first and those of the test split last.
  """
  names, codes = content.labels
  if content.split is None:
    return {'class_names': list(names)}, codes.astype(np.int32)
  unknown = [name for name in content.split.names if name not in _SPLITS]
  missing = {'train', 'test'} - set(content.split.names)
  if unknown or missing:
    raise ValueError(
      f'The split of {root!r} has the values '
      f'{_list_texts(content.split.names)}: expected train and test, and '
      'perhaps validation.'
    )
  order = np.array([_SPLITS.index(name) for name in content.split.names])
  codes = order[content.split.codes].astype(np.int64) * len(names) + codes
  present, codes = np.unique(codes, return_inverse=True)
  sizes = np.bincount(present // len(names), minlength=len(_SPLITS))
  return {
    'class_names': [names[code % len(names)] for code in present],
    'num_train_classes': int(sizes[0]),
    'num_validation_classes': int(sizes[1]),
  }, codes.astype(np.int32)


def _list_texts(texts: Sequence[str]) -> str:
  more = ', ...' if len(texts) > _MAX_ROWS else ''
  return ', '.join(map(repr, texts[:_MAX_ROWS])) + more


def _check_names(
  root: str, kind: str, names: Iterable[str], expected: Sequence[str]
) -> None:
  if not set(expected) <= set(names):
    raise ValueError(
      f'{root!r} has the {kind} {_list_texts(sorted(names))}: expected '
      f'{" and ".join(expected)}, and perhaps split.'
    )


def _check_matrix(title: str, shape: Sequence[int], dtype: np.dtype) -> None:
  if dtype.kind != 'f' or dtype.itemsize not in (2, 4, 8):
    raise ValueError(
      f'{title} is {dtype}: expected float16, float32 or float64.'
    )
  if len(shape) != 2 or not all(shape):
    raise ValueError(
      f'{title} has the shape {tuple(shape)}: expected one row for each vector '
      'and one column for each dimension, at least one of both.'
    )


def _check_texts(
  title: str, shape: Sequence[int], dtype: np.dtype, num_rows: int
) -> None:
  if dtype.kind not in 'biuUS':
    raise ValueError(
      f'{title} is {dtype}: expected integers or texts. Convert it, as by '
      'labels.astype(str).'
    )
  if tuple(shape) != (num_rows,):
    raise ValueError(
      f'{title} has the shape {tuple(shape)}, and there are {num_rows:,} '
      f'vectors: expected ({num_rows},).'
    )


def _encode(values: np.ndarray) -> _Labels:
  values, codes = np.unique(values, return_inverse=True)
  return _Labels([_text(value) for value in values.tolist()], codes)


def _text(value: Any) -> str:
  if isinstance(value, bytes):
    value = os.fsdecode(value)
  return folders.escape(value) if isinstance(value, str) else str(value)


def _read_header(file: IO[bytes], title: str):
  """Reads the header of an array; returns (shape, is Fortran order, dtype).

  Raises:
    ValueError: if it is none.
  """
  try:
    version = np.lib.format.read_magic(file)
    read = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    return read(file)
  except (zipfile.BadZipFile, zlib.error):
    raise
  # NumPy evaluates the header, which raises many types of errors.
  except Exception as error:
    raise ValueError(
      f'{title} is not an array written by NumPy: {errors.one_line(error)}.'
    ) from error


def _read_labels(file: IO[bytes], title: str, num_rows: int) -> _Labels:
  shape, _, dtype = _read_header(file, title)
  _check_texts(title, shape, dtype, num_rows)
  content = file.read(num_rows * dtype.itemsize)
  if len(content) != num_rows * dtype.itemsize:
    raise ValueError(f'{title} is truncated.')
  return _encode(np.frombuffer(content, dtype))


def _read_matrix(
  path: str,
  file: IO[bytes],
  title: str,
  *,
  start: int | None,
  size: int,
  reopen: Callable[[], IO[bytes]],
) -> _Matrix:
  """Reads the header of the vectors.

  Args:
    path: the file on disk.
    file: yields the bytes of the array with its header.
    title: what the array is, for messages.
    start: position in `path` of what `file` yields; None if it is compressed.
    size: bytes that `file` yields.
    reopen: opens `file` again.
  """
  shape, is_fortran, dtype = _read_header(file, title)
  _check_matrix(title, shape, dtype)
  header_size = file.tell()
  if size - header_size < shape[0] * shape[1] * dtype.itemsize:
    raise ValueError(
      f'{title} is truncated: its header announces {shape[0]:,} x {shape[1]:,} '
      f'values of {dtype}, and {size - header_size:,} bytes follow.'
    )
  if is_fortran and start is None:
    raise ValueError(
      f'{title} is compressed and in Fortran order: save '
      'np.ascontiguousarray(embeddings).'
    )
  if start is None:
    blocks = functools.partial(_stream, path, reopen, header_size, shape, dtype)
    return _Matrix(shape, dtype, None, blocks)
  matrix = np.memmap(
    path,
    mode='r',
    offset=start + header_size,
    shape=shape,
    dtype=dtype,
    order='F' if is_fortran else 'C',
  )

  def blocks():
    for begin in range(0, shape[0], _BLOCK):
      yield matrix[begin : begin + _BLOCK]

  return _Matrix(
    shape, dtype, None if is_fortran else start + header_size, blocks
  )


def _stream(root, reopen, header_size, shape, dtype) -> Iterator[np.ndarray]:
  with _readable(root, *_ZIP_ERRORS), reopen() as file:
    file.read(header_size)
    for begin in range(0, shape[0], _BLOCK):
      num_rows = min(_BLOCK, shape[0] - begin)
      content = file.read(num_rows * shape[1] * dtype.itemsize)
      yield np.frombuffer(content, dtype).reshape(num_rows, shape[1])


def _read_npy(root: str) -> _Content:
  with open(root, 'rb') as file:
    matrix = _read_matrix(
      root,
      file,
      repr(root),
      start=0,
      size=os.path.getsize(root),
      reopen=functools.partial(open, root, 'rb'),
    )

  def read(name):
    path = _beside(root, name)
    with open(path, 'rb') as file:
      return _read_labels(file, repr(path), matrix.shape[0])

  has_split = os.path.exists(_beside(root, 'split'))
  return _Content(matrix, read('labels'), read('split') if has_split else None)


def _read_npz(root: str) -> _Content:
  with _readable(root, *_ZIP_ERRORS), zipfile.ZipFile(root) as archive:
    members = {
      member.filename.removesuffix('.npy'): member
      for member in archive.infolist()
    }
    _check_names(root, 'arrays', members, ('embeddings', 'labels'))
    return _read_members(root, archive, members)


def _read_members(root, archive, members) -> _Content:
  member = members['embeddings']
  start = None
  if member.compress_type == zipfile.ZIP_STORED:
    with open(root, 'rb') as file:
      # https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7: the
      # lengths of the name and of the extra field, which precede the content.
      file.seek(member.header_offset + 26)
      lengths = np.frombuffer(file.read(4), '<u2')
    start = member.header_offset + 30 + int(lengths.sum())

  def title(name):
    return f'The array {name} of {root!r}'

  with archive.open(member) as file:
    matrix = _read_matrix(
      root,
      file,
      title('embeddings'),
      start=start,
      size=member.file_size,
      reopen=lambda: zipfile.ZipFile(root).open(member),
    )

  def read(name):
    with archive.open(members[name]) as file:
      return _read_labels(file, title(name), matrix.shape[0])

  split = read('split') if 'split' in members else None
  return _Content(matrix, read('labels'), split)


def _read_parquet(root: str) -> _Content:
  if not importlib.util.find_spec('pyarrow'):
    raise ValueError(
      f'{root!r} is a Parquet file, which needs pyarrow: pip install pyarrow.'
    )
  import pyarrow

  with _readable(root, pyarrow.ArrowException, OSError):
    file = _open_parquet(root)
    schema = file.schema_arrow
    _check_names(root, 'columns', schema.names, ('embedding', 'label'))
    kind = schema.field('embedding').type
    matrix = _read_lists(root, kind, file.metadata.num_rows)
    labels = {
      name: _encode_column(
        f'The column {name} of {root!r}', file.read([name]).column(0)
      )
      for name in ('label', 'split')
      if name in schema.names
    }
  return _Content(matrix, labels['label'], labels.get('split'))


def _open_parquet(root: str):
  from pyarrow import parquet

  # Otherwise the columns of a whole row group are read into memory.
  return parquet.ParquetFile(root, pre_buffer=False, buffer_size=2**20)


def _read_lists(root: str, kind, num_rows: int) -> _Matrix:
  """Returns the vectors of the column of lists, of the Arrow type `kind`.

  Raises:
    ValueError: if they are no lists of floats of one length.
  """
  import pyarrow
  from pyarrow import compute, types

  title = f'The column embedding of {root!r}'
  is_list = (
    types.is_list(kind)
    or types.is_large_list(kind)
    or types.is_fixed_size_list(kind)
  )
  if not is_list or not types.is_floating(kind.value_type):
    raise ValueError(
      f'{title} is {kind}: expected lists of float16, float32 or float64.'
    )
  if not num_rows:
    raise ValueError(f'{root!r} has no rows.')

  def blocks(dim=None):
    position = 0
    with _readable(root, pyarrow.ArrowException, OSError):
      batches = _open_parquet(root).iter_batches(_BLOCK, columns=['embedding'])
      for batch in batches:
        column = batch.column(0)
        lengths = compute.list_value_length(column).fill_null(0).to_numpy()
        dim = dim or int(lengths[0])
        wrong = np.flatnonzero((lengths != dim) | (lengths == 0))
        if len(wrong):
          raise ValueError(
            f'{title} has {lengths[wrong[0]]} values in row '
            f'{position + wrong[0]}, counted from 0: expected lists of one '
            f'length, here {dim or "at least 1"}.'
          )
        # Missing values become NaN.
        values = column.flatten().to_numpy(zero_copy_only=False)
        yield values.reshape(len(batch), dim)
        position += len(batch)

  first = next(blocks())
  return _Matrix((num_rows, first.shape[1]), first.dtype, None, blocks)


def _encode_column(title: str, column) -> _Labels:
  """Numbers the distinct values of an Arrow column.

  Raises:
    ValueError: if they are neither integers nor texts, or some are missing.
  """
  from pyarrow import types

  if types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  kind = column.type
  is_text = types.is_string(kind) or types.is_large_string(kind)
  if not is_text and not types.is_integer(kind) and not types.is_boolean(kind):
    raise ValueError(f'{title} is {kind}: expected integers or texts.')
  if column.null_count:
    row = np.flatnonzero(column.is_null().to_numpy())[0]
    raise ValueError(
      f'{title} has no value in {column.null_count:,} rows, the first of them '
      f'{row}, counted from 0: remove these rows.'
    )
  encoded = column.combine_chunks().dictionary_encode()
  values = encoded.dictionary.to_pylist()
  order = sorted(range(len(values)), key=values.__getitem__)
  return _Labels(
    [_text(values[index]) for index in order],
    np.argsort(order)[encoded.indices.to_numpy()],
  )
