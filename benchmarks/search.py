"""Compares search in a large index: exact, and with FAISS.

python benchmarks/search.py [--pictures=1000000] [--dim=64] [--queries=100]
  [--classes=20000] [--k=10] [--rounds=3]

Needs: pip install faiss-cpu

Embeddings are random unit vectors, clustered around the center of their class;
queries are drawn in the same way. FAISS's flat index is exact; the search
commands use its inverted lists. Columns:

  setup     seconds, once: compiling, or building and writing inverted lists
  ms        milliseconds per query, for all queries at once; the median over the
            rounds. As in the command, it includes reading the inverted lists
  recall    fraction of the exact k nearest neighbors that are returned
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax.search import find, index


def make_embeddings(rng, centers: np.ndarray, size: int) -> np.ndarray:
  labels = rng.integers(0, len(centers), size)
  noise = rng.normal(size=(size, centers.shape[1])).astype(np.float32)
  rows = centers[labels] + 0.5 * noise / centers.shape[1] ** 0.5
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def measure(fn, rounds: int):
  """Returns the result, the seconds of the first call, and of later calls."""
  seconds = []
  for _ in range(rounds + 1):
    start = time.perf_counter()
    result = fn()
    seconds.append(time.perf_counter() - start)
  return result, seconds[0], statistics.median(seconds[1:])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, default, text in (
    ('pictures', 1_000_000, 'number of images in the index'),
    ('dim', 64, 'dimension of the embeddings'),
    ('queries', 100, 'number of queries'),
    ('classes', 20_000, 'number of classes of the random embeddings'),
    ('k', 10, 'number of neighbors'),
    ('rounds', 3, 'repetitions of each search'),
  ):
    parser.add_argument(f'--{name}', type=int, default=default, help=text)
  arguments = parser.parse_args()
  # Imported here because --help must work without it.
  import faiss

  rng, k = np.random.default_rng(0), arguments.k
  centers = make_embeddings(
    rng, np.zeros((1, arguments.dim), np.float32), arguments.classes
  )
  items = make_embeddings(rng, centers, arguments.pictures)
  queries = make_embeddings(rng, centers, arguments.queries)

  flat = faiss.IndexFlatIP(arguments.dim)
  flat.add(items)
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'images.index')
    pathlib.Path(path).touch()
    names = range(arguments.pictures)  # Only the count is used.
    content = index.Content('', '', '', names, items)
    rows = {
      'exact': lambda: find.find(queries, items, k)[1],
      "FAISS's flat index": lambda: flat.search(queries, k)[1],
      'the search command': lambda: find.find_in_index(
        path, content, queries, k
      )[1],
    }
    print(f'{arguments}\n{"":20}{"setup":>10}{"ms":>10}{"recall":>10}')
    exact = None
    for title, fn in rows.items():
      indices, first, seconds = measure(fn, arguments.rounds)
      exact = indices if exact is None else exact
      recall = np.mean([np.isin(a, b).mean() for a, b in zip(exact, indices)])
      print(
        f'{title:20}{max(first - seconds, 0):10.1f}'
        f'{1e3 * seconds / arguments.queries:10.2f}{recall:10.4f}'
      )


if __name__ == '__main__':
  main()
