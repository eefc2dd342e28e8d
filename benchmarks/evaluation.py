"""Ranks of all positives: seconds, and the floor that the products set.

python benchmarks/evaluation.py [--rounds=3]

Random embeddings of 64 dimensions, ranked all against all, with classes as in
CUB's and Cars' test halves, as in Stanford Online Products (60,502 items), and
with one class of 5,000 among small ones. Prints medians after a first round
that compiles. The floor is half of all products at the rate of one large
matrix product measured in the same process.
"""

import argparse
import pathlib
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax import retrieval  # noqa: E402

_DIM = 64


def make_labels() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  sizes = np.clip(rng.poisson(5.35, 11316), 2, 12)
  small = np.repeat(np.arange(1, 3001), 5)
  return {
    'CUB': np.arange(5924) % 100,
    'Cars': np.arange(8131) % 98,
    'SOP': np.resize(np.repeat(np.arange(len(sizes)), sizes), 60502),
    'one of 5,000': np.concatenate([np.zeros(5000, int), small]),
  }


def seconds(run, *arguments) -> float:
  start = time.perf_counter()
  run(*arguments)
  return time.perf_counter() - start


def rank(rows: np.ndarray, labels: np.ndarray) -> None:
  for _ in retrieval.positive_ranks(rows, labels):
    pass


def product_rate() -> float:
  """Floating-point operations a second of a matrix product."""
  square = jnp.ones((4096, 4096))
  multiply = jax.jit(lambda a: jnp.dot(a, a, precision='highest'))
  times = [
    seconds(lambda: multiply(square).block_until_ready()) for _ in range(6)
  ]
  return 2 * 4096**3 / statistics.median(times[1:])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()
  rate = product_rate()
  print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}, '
        f'{rate / 1e9:.0f} GFLOP/s')
  print(f'{"classes as":14}{"items":>8}{"seconds":>9}{"floor":>8}{"MiB":>7}')
  for name, labels in make_labels().items():
    rows = np.random.default_rng(1).normal(size=(len(labels), _DIM))
    rows = rows.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    times = [
      seconds(rank, rows, labels)
      for _ in range(arguments.rounds + 1)
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    floor = len(labels) ** 2 * _DIM / rate
    print(f'{name:14}{len(labels):8,}{statistics.median(times[1:]):9.2f}'
          f'{floor:8.2f}{peak:7.0f}')


if __name__ == '__main__':
  main()
