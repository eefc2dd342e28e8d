"""Exact nearest neighbors on the unit sphere; FAISS for very large indexes."""

import importlib.util
import os
import sys

import jax
import numpy as np

from proxy_nca_jax import distances, retrieval
from proxy_nca_jax.runtime import errors, files
from proxy_nca_jax.search import index as index_lib

# Pictures from which FAISS answers, if it is there: an exact search of so many
# reads gigabytes.
_MANY = 1_000_000


def find(
  queries: np.ndarray, items: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the k nearest items of each query on the unit sphere, exactly.

  Args:
    queries: float32 [num_queries, dim].
    items: float32 [num_items, dim].
    k: at least 1; at most as many as there are are found.

  Returns:
    (distances, indices): float32 and int32 [num_queries, k], nearest first.
  """
  queries, items = project(queries), project(items)
  _, indices = retrieval.nearest(queries, min(k, len(items)), gallery=items)
  indices = np.asarray(indices)
  return retrieval.neighbor_distances(queries, items, indices), indices


def project(rows: np.ndarray) -> np.ndarray:
  return np.asarray(_unit_norm(np.asarray(rows, np.float32)))


_unit_norm = jax.jit(distances.unit_norm)


def find_in_index(
  path: str, content: index_lib.Content, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """As `find`, in an index, with FAISS where there are many pictures."""
  if len(content.names) < _MANY or not importlib.util.find_spec('faiss'):
    return find(queries, content.embeddings, k)
  import faiss

  queries, items = project(queries), project(content.embeddings)
  stored, stamp = f'{path}.faiss', os.stat(path).st_mtime_ns
  if os.path.exists(stored) and os.stat(stored).st_mtime_ns > stamp:
    lists = faiss.read_index(stored)
  else:
    print(f'Making {stored}: once for this index.', file=sys.stderr)
    num_lists = int(4 * len(items) ** 0.5)
    lists = faiss.index_factory(
      items.shape[1], f'IVF{num_lists},Flat', faiss.METRIC_INNER_PRODUCT
    )
    # Sixty-four pictures tell where the centre of a list is.
    order = np.random.default_rng(0).permutation(len(items))
    lists.train(items[order[: 64 * num_lists]])
    lists.add(items)
    with files.write_atomically(stored, 'wb') as file:
      try:
        faiss.write_index(lists, file.name)
      except RuntimeError as error:  # The library raises no OSError.
        raise OSError(errors.one_line(error)) from error
  # A sixteenth of the lists is looked through.
  lists.nprobe = max(lists.nlist // 16, 1)
  print('The search is approximate (FAISS).', file=sys.stderr)
  _, indices = lists.search(queries, min(k, len(items)))
  return retrieval.neighbor_distances(queries, items, indices), indices
