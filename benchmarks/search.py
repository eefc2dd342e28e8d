"""Search in a large index: exact, and as the commands do it with FAISS.

python benchmarks/search.py [--pictures=1000000] [--dim=64] [--queries=100]
  [--classes=20000] [--k=10] [--rounds=3]

Random embeddings, in classes of unit vectors with noise around their centres;
the queries are drawn likewise. Columns:

  prepare   seconds, once: FAISS's lists, made and written beside the index
  ms        a query, of so many at once: the median over the rounds; reading the
            lists again is part of it, as it is of the command
  found     the share of the exact k nearest that are among those given

FAISS's flat index searches exactly as well.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time

import faiss
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax.search import find, index


def make_embeddings(rng, centers: np.ndarray, number: int) -> np.ndarray:
  labels = rng.integers(0, len(centers), number)
  noise = rng.normal(size=(number, centers.shape[1])).astype(np.float32)
  rows = centers[labels] + 0.5 * noise / centers.shape[1] ** 0.5
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def measure(fn, rounds: int):
  """Returns the result, the first call's seconds and the median of others."""
  seconds = []
  for _ in range(rounds + 1):
    begun = time.perf_counter()
    result = fn()
    seconds.append(time.perf_counter() - begun)
  return result, seconds[0], statistics.median(seconds[1:])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--pictures', type=int, default=1_000_000)
  parser.add_argument('--dim', type=int, default=64)
  parser.add_argument('--queries', type=int, default=100)
  parser.add_argument('--classes', type=int, default=20_000)
  parser.add_argument('--k', type=int, default=10)
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()
  rng, k = np.random.default_rng(0), arguments.k
  centers = make_embeddings(
    rng, np.zeros((1, arguments.dim), np.float32), arguments.classes
  )
  items = make_embeddings(rng, centers, arguments.pictures)
  queries = make_embeddings(rng, centers, arguments.queries)

  flat = faiss.IndexFlatIP(arguments.dim)
  flat.add(items)
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'pictures.index')
    pathlib.Path(path).touch()
    names = range(arguments.pictures)  # Only their number matters here.
    content = index.Content('', '', '', names, items)
    rows = {
      'exact': lambda: find.find(queries, items, k)[1],
      "FAISS's flat index": lambda: flat.search(queries, k)[1],
      'as the commands do': lambda: find.find_in_index(
        path, content, queries, k
      )[1],
    }
    print(f'{arguments}\n{"":20}{"prepare":>10}{"ms":>10}{"found":>10}')
    exact = None
    for title, fn in rows.items():
      found, first, seconds = measure(fn, arguments.rounds)
      exact = found if exact is None else exact
      share = np.mean([np.isin(a, b).mean() for a, b in zip(exact, found)])
      print(
        f'{title:20}{max(first - seconds, 0):10.1f}'
        f'{1e3 * seconds / arguments.queries:10.2f}{share:10.4f}'
      )


if __name__ == '__main__':
  main()
