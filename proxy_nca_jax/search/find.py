"""Nearest neighbors on the unit sphere: exact, or with FAISS if very many."""

import contextlib
import importlib.util
import os
import sys

import jax
import numpy as np

from proxy_nca_jax import distances, retrieval
from proxy_nca_jax.runtime import errors, files
from proxy_nca_jax.search import index as index_lib

# From this number of images on, FAISS is used if installed: an exact search
# would read gigabytes per batch of queries.
_MIN_FAISS_IMAGES = 1_000_000
# FAISS divides the images into 4 sqrt(num_images) inverted lists, of which a
# query searches one in 16. Their centers are trained on 64 images per list.
_LISTS_PER_ROOT, _LISTS_PER_PROBE, _TRAIN_IMAGES_PER_LIST = 4, 16, 64


_unit_norm = jax.jit(distances.unit_norm)


def normalize(rows: np.ndarray) -> np.ndarray:
  """Returns the rows scaled to unit length, float32 [num_rows, dim]."""
  return np.asarray(_unit_norm(np.asarray(rows, np.float32)))


def find(
  queries: np.ndarray, items: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the exact k nearest items of each query on the unit sphere.

  Args:
    queries: float [num_queries, dim], nonzero rows; normalized here.
    items: float [num_items, dim], likewise.
    k: number of neighbors, at least 1; clipped to num_items.

  Returns:
    (distances, indices): Euclidean distances in [0, 2], float32, and indices of
    `items`, int32, both [num_queries, min(k, num_items)], nearest first.
  """
  queries, items = normalize(queries), normalize(items)
  _, indices = retrieval.nearest(queries, min(k, len(items)), gallery=items)
  indices = np.asarray(indices)
  return retrieval.neighbor_distances(queries, items, indices), indices


def _load_or_build_lists(path: str, items: np.ndarray):
  """Returns the FAISS index of an index file, built if older than the file."""
  import faiss

  stored = f'{path}.faiss'
  modified = os.stat(path).st_mtime_ns
  if os.path.exists(stored) and os.stat(stored).st_mtime_ns > modified:
    # FAISS raises RuntimeError for a damaged file, which is built again.
    with contextlib.suppress(RuntimeError):
      lists = faiss.read_index(stored)
      if (lists.ntotal, lists.d) == items.shape:
        return lists
  print(f'Building {stored}, once for this index.', file=sys.stderr)
  num_lists = int(_LISTS_PER_ROOT * len(items) ** 0.5)
  lists = faiss.index_factory(
    items.shape[1], f'IVF{num_lists},Flat', faiss.METRIC_INNER_PRODUCT
  )
  order = np.random.default_rng(0).permutation(len(items))
  lists.train(items[order[: _TRAIN_IMAGES_PER_LIST * num_lists]])
  lists.add(items)
  with files.write_atomically(stored, 'wb') as file:
    try:
      faiss.write_index(lists, file.name)
    except RuntimeError as error:  # FAISS has no OSError.
      raise OSError(
        f'Cannot write {stored!r}: {errors.one_line(error)}.'
      ) from error
  return lists


class Finder:
  """An index in memory, for many searches.

  Attributes:
    items: float32 [num_images, dim], the embeddings, of unit length.
    is_exact: whether all images are compared with; FAISS searches a part of
      very large indexes.
  """

  def __init__(self, path: str, content: index_lib.Content):
    """Normalizes the embeddings, and loads or builds the lists of FAISS.

    The lists are built once and stored beside the index, in PATH.faiss.

    Args:
      path: the index file.
      content: its content.
    """
    self.items = normalize(content.embeddings)
    self.is_exact = not _is_approximate(content)
    if not self.is_exact:
      self._lists = _load_or_build_lists(path, self.items)

  def find(
    self, queries: np.ndarray, k: int, *, rows: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k nearest images of each query.

    Args:
      queries: float [num_queries, dim], nonzero rows.
      k: number of neighbors, at least 1; clipped to the number searched.
      rows: int [num_rows], indices of the images to search, which are then all
        compared with; by default all images are searched.

    Returns:
      (distances, indices), as the function `find`, except that FAISS may miss
      some if not `is_exact`, and that any of several images at the distance of
      the last neighbor may be found.
    """
    queries = normalize(queries)
    if rows is None and not self.is_exact:
      indices = _search_lists(self._lists, queries, min(k, len(self.items)))
      return self._sort(queries, indices)
    products = queries @ (self.items if rows is None else self.items[rows]).T
    num_searched = products.shape[1]
    k = min(k, num_searched)
    first = num_searched - k
    if first:
      top = np.argpartition(products, first, axis=1)[:, first:]
    else:
      top = np.broadcast_to(np.arange(k), products.shape)
    return self._sort(queries, top if rows is None else rows[top])

  def _sort(self, queries, indices) -> tuple[np.ndarray, np.ndarray]:
    """Sorts neighbors by distance, whose rounding differs from products'."""
    found = retrieval.neighbor_distances(queries, self.items, indices)
    order = np.lexsort([indices, found], axis=1)
    return (
      np.take_along_axis(found, order, axis=1),
      np.take_along_axis(indices, order, axis=1),
    )


def find_in_index(
  path: str, content: index_lib.Content, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """As `find`, for an index; uses FAISS for very large ones, approximately.

  Args:
    path: the index file.
    content: its content.
    queries: float [num_queries, dim].
    k: number of neighbors, at least 1.

  Returns:
    (distances, indices), as `find`.
  """
  if not _is_approximate(content):
    return find(queries, content.embeddings, k)
  print('This search is approximate (FAISS).', file=sys.stderr)
  return Finder(path, content).find(queries, k)


def _is_approximate(content: index_lib.Content) -> bool:
  is_large = len(content.names) >= _MIN_FAISS_IMAGES
  return is_large and importlib.util.find_spec('faiss') is not None


def _search_lists(lists, queries: np.ndarray, k: int) -> np.ndarray:
  """Searches more lists for the queries whose lists hold fewer than k items.

  Returns:
    int64 [num_queries, k]; -1, which FAISS returns for a missing item, is in no
    row.

  Raises:
    ValueError: if all lists together have fewer than k items for a query.
  """
  lists.nprobe = max(lists.nlist // _LISTS_PER_PROBE, 1)
  _, indices = lists.search(queries, k)
  while len(short := np.flatnonzero((indices < 0).any(axis=1))):
    if lists.nprobe >= lists.nlist:
      raise ValueError(
        f'FAISS finds fewer than {k} images for {len(short)} queries: delete '
        'the .faiss file beside the index, which is then built again.'
      )
    lists.nprobe = min(2 * lists.nprobe, lists.nlist)
    _, indices[short] = lists.search(queries[short], k)
  return indices
