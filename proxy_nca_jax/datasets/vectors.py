"""Vectors in a file that is mapped into memory."""

from __future__ import annotations

import numpy as np


class Vectors:
  """Rows of a matrix in a file, read as float32.

  The file is mapped: only the pages that are read occupy memory, and the
  operating system drops them when memory is short. If the file is truncated
  meanwhile, reading it kills the process. Another process that gets a pickled
  copy maps the file itself.

  Attributes:
    shape: (number of rows, dimension).
    dtype, ndim, size: as of the array that `vectors[:]` returns.
  """

  dtype, ndim = np.dtype(np.float32), 2

  def __init__(self, matrix: np.memmap, rows: np.ndarray | None = None):
    """Selects rows of a matrix; none is read.

    Args:
      matrix: float [num_stored, dim], from `open_vectors`.
      rows: int [num_rows], the rows to take, in that order; None takes all.
    """
    self._matrix, self._rows = matrix, rows
    num_rows = len(matrix) if rows is None else len(rows)
    self.shape = (num_rows, matrix.shape[1])
    self.size = num_rows * matrix.shape[1]

  def __reduce__(self):
    matrix = self._matrix
    arguments = matrix.filename, matrix.offset, matrix.shape, matrix.dtype.str
    return open_vectors, (*arguments, self._rows)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
    """Reads rows: float32 [dim] for an int, [num_rows, dim] otherwise."""
    rows = index if self._rows is None else self._rows[index]
    return np.asarray(self._matrix[rows], np.float32)

  def subset(self, rows: np.ndarray) -> Vectors:
    """Returns the vectors of some rows, int [num_rows], without reading any."""
    return Vectors(
      self._matrix, rows if self._rows is None else self._rows[rows]
    )


def open_vectors(
  path: str,
  offset: int,
  shape: tuple[int, int],
  dtype: str,
  rows: np.ndarray | None = None,
) -> Vectors:
  """Maps a matrix in a file.

  Args:
    path: the file.
    offset: the position of the matrix in it, in bytes.
    shape: the shape of the matrix, in C order.
    dtype: its dtype, as NumPy writes it.
    rows: as of `Vectors`.
  """
  matrix = np.memmap(
    path, mode='r', offset=offset, shape=tuple(shape), dtype=dtype
  )
  return Vectors(matrix, rows)
