"""Compares evaluation with other libraries, at the size of SOP.

python benchmarks/evaluation.py [--rounds=3] [--dims=64,512]

Needs Linux, and: pip install faiss-cpu torch pytorch-metric-learning

The embeddings are 60,502 random unit vectors around 11,316 class centers, as
many as Stanford Online Products (SOP) tests on; classes have 2 to 12 items.
The libraries take turns in one process, with two threads each. Prints medians
after a first round that compiles, and ratios to the other library.

* Ranking: Recall@{1,10,100,1000} only, and with MAP@R and the other scores that
  need all positives, against a search in FAISS's flat index with k = 1001,
  which Recall@1000 needs. The values of Recall are compared.
* Recall@1, R-precision and MAP@R against pytorch-metric-learning's
  AccuracyCalculator, at the first dimension. The scores are compared.
* 20 iterations of k-means with 11,316 clusters against FAISS's from the same
  initial centroids, at the first dimension. The assignments are compared.
* NMI of two partitions with 11,316 parts against scikit-learn's.

"floor" is the time that the matrix products alone would take at the speed of
one large product in the same process: half of all pairs for ranking, all points
with all centroids for k-means. Memory is the peak beyond the embeddings, read
from /proc, in the second run of a separate process: the first run compiles, and
its freed memory is returned to the system in between.
"""

import argparse
import ctypes
import os
import pathlib
import statistics
import subprocess
import sys
import time


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--rounds', type=int, default=3, help='repetitions of each measurement'
  )
  parser.add_argument(
    '--dims', default='64,512', help='dimensions of the embeddings'
  )
  parser.add_argument('--memory', default='', help=argparse.SUPPRESS)
  return parser.parse_args()


# Parsed here because --help must work without the packages imported below.
_ARGUMENTS = _parse()
_THREADS = 2
if hasattr(os, 'sched_setaffinity'):
  # XLA starts one thread per processor that the process may use.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_THREADS])

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytorch_metric_learning
import sklearn
import torch
from pytorch_metric_learning.utils.accuracy_calculator import (
  AccuracyCalculator,
)
from sklearn.metrics import normalized_mutual_info_score

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax import clustering, metrics, retrieval

_NUM_ITEMS, _NUM_CLASSES = 60502, 11316
_RECALL_AT = (1, 10, 100, 1000)


def make_split(dim: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  sizes = np.clip(rng.poisson(5.35, _NUM_CLASSES), 2, 12)
  labels = np.resize(np.repeat(np.arange(_NUM_CLASSES), sizes), _NUM_ITEMS)
  centers = rng.standard_normal((_NUM_CLASSES, dim), np.float32)
  noise = rng.standard_normal((_NUM_ITEMS, dim), np.float32)
  rows = centers[labels] + 1.2 * noise
  return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def ranks(rows, labels, nearest_only: bool):
  return [
    r
    for _, r in retrieval.positive_ranks(
      rows, labels, nearest_only=nearest_only
    )
  ]


def our_recall(rows, labels) -> list[float]:
  first = np.concatenate([r[:, 0] for r in ranks(rows, labels, True)])
  return [float(np.mean(first[first > 0] <= k)) for k in _RECALL_AT]


def our_scores(rows, labels) -> list[float]:
  """Returns Recall@K, then MAP@R, R-precision, MRR and mAP."""
  parts = ranks(rows, labels, False)
  fns = [lambda r, k=k: metrics.recall_at_k(r, k) for k in _RECALL_AT]
  fns += [
    metrics.map_at_r,
    metrics.r_precision,
    metrics.reciprocal_rank,
    metrics.average_precision,
  ]
  return [
    float(np.nanmean(np.concatenate([fn(part) for part in parts])))
    for fn in fns
  ]


def faiss_recall(rows, labels) -> list[float]:
  index = faiss.IndexFlatIP(rows.shape[1])
  index.add(rows)
  _, neighbors = index.search(rows, max(_RECALL_AT) + 1)
  is_self = neighbors == np.arange(len(rows))[:, None]
  is_match = (labels[neighbors] == labels[:, None]) & ~is_self
  ranks = np.cumsum(~is_self, axis=1)
  first = np.where(is_match, ranks, len(rows)).min(axis=1)
  return [float(np.mean(first <= k)) for k in _RECALL_AT]


def measure_flops() -> float:
  """Returns floating-point operations per second of a large matrix product."""
  square = jnp.ones((4096, 4096))
  multiply = jax.jit(lambda a: jnp.dot(a, a, precision='highest'))
  times = [
    timed(lambda: multiply(square).block_until_ready())[0] for _ in range(6)
  ]
  return 2 * 4096**3 / statistics.median(times[1:])


def timed(run):
  start = time.perf_counter()
  result = run()
  return time.perf_counter() - start, result


def alternate(runs: dict, rounds: int) -> tuple[dict, dict]:
  """Runs all in turn; returns medians without the first round, and results."""
  times, results = {name: [] for name in runs}, {}
  for _ in range(rounds + 1):
    for name, run in runs.items():
      seconds, results[name] = timed(run)
      times[name].append(seconds)
  return {n: statistics.median(t[1:]) for n, t in times.items()}, results


def print_rows(title, medians, results, *, peer, floor) -> None:
  for name, seconds in medians.items():
    cells = f'{seconds:8.2f} s{medians[peer] / seconds:7.2f}x'
    if floor and name != peer:
      cells += f'{floor:8.2f}{seconds / floor:7.2f}'
    print(f'{title:22}{name:28}{cells:34}  {results[name]}', flush=True)


def compare_ranking(dim: int, rounds: int, flops: float) -> None:
  rows, labels = make_split(dim)
  medians, results = alternate(
    {
      'Recall@K': lambda: our_recall(rows, labels),
      'all scores': lambda: our_scores(rows, labels),
      'FAISS, k = 1001': lambda: faiss_recall(rows, labels),
    },
    rounds,
  )
  texts = {
    name: ' '.join(f'{100 * x:.3f}' for x in values)
    for name, values in results.items()
  }
  print_rows(
    f'{_NUM_ITEMS:,} x {dim}',
    medians,
    texts,
    peer='FAISS, k = 1001',
    floor=_NUM_ITEMS**2 * dim / flops,
  )
  for name in ('Recall@K', 'all scores'):
    output = subprocess.run(
      [sys.executable, __file__, f'--memory={name}', f'--dims={dim}'],
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    print(f'{"":22}{name:28}{output.strip()} MiB beyond the embeddings')


def print_memory(name: str, dim: int) -> None:
  rows, labels = make_split(dim)
  run = our_recall if name == 'Recall@K' else our_scores
  run(rows, labels)
  ctypes.CDLL(None).malloc_trim(0)
  before = _memory('VmRSS')
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  run(rows, labels)
  print(round(_memory('VmHWM') - before))


def _memory(field: str) -> float:
  """Returns a field of this process's status, in MiB."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(field):
      return int(line.split()[1]) / 1024
  raise ValueError(f'/proc/self/status has no {field}.')


def compare_calculator(dim: int, rounds: int) -> None:
  rows, labels = make_split(dim)
  names = ('precision_at_1', 'mean_average_precision_at_r', 'r_precision')
  calculator = AccuracyCalculator(
    include=names, k='max_bin_count', device=torch.device('cpu')
  )
  queries, targets = torch.tensor(rows), torch.tensor(labels)
  medians, results = alternate(
    {
      'ours': lambda: our_scores(rows, labels),
      'AccuracyCalculator': lambda: calculator.get_accuracy(queries, targets),
    },
    rounds,
  )
  values, scores = results.values()
  texts = {
    'ours': [values[0], *values[4:6]],
    'AccuracyCalculator': [scores[name] for name in names],
  }
  texts = {
    name: ' '.join(f'{100 * x:.3f}' for x in row) for name, row in texts.items()
  }
  print_rows(
    f'{_NUM_ITEMS:,} x {dim}',
    medians,
    texts,
    peer='AccuracyCalculator',
    floor=None,
  )


def compare_kmeans(dim: int, rounds: int, flops: float) -> None:
  rows, _ = make_split(dim)
  rng = np.random.default_rng(1)
  start = rows[rng.choice(len(rows), _NUM_CLASSES, replace=False)]

  def ours():
    clusters = clustering.kmeans(
      rows, num_clusters=_NUM_CLASSES, init=start, max_iterations=20
    )
    return np.asarray(clusters.assignments)

  def theirs():
    kmeans = faiss.Kmeans(
      dim,
      _NUM_CLASSES,
      niter=20,
      min_points_per_centroid=1,
      max_points_per_centroid=_NUM_ITEMS,
    )
    kmeans.train(rows, init_centroids=start)
    return kmeans.index.search(rows, 1)[1][:, 0]

  medians, results = alternate({'ours': ours, 'FAISS': theirs}, rounds)
  same = np.mean(results['ours'] == results['FAISS'])
  texts = {
    name: f'{100 * same:.3f}% of the assignments agree' for name in results
  }
  # 20 iterations, and the final assignment.
  floor = 21 * 2 * _NUM_ITEMS * _NUM_CLASSES * dim / flops
  print_rows(f'k-means x {dim}', medians, texts, peer='FAISS', floor=floor)


def compare_nmi(rounds: int) -> None:
  _, labels = make_split(2)
  clusters = np.random.default_rng(2).permutation(labels)
  clusters = np.where(np.arange(len(labels)) % 3 > 0, labels, clusters)
  medians, results = alternate(
    {
      'ours': lambda: metrics.normalized_mutual_information(labels, clusters),
      'scikit-learn': lambda: normalized_mutual_info_score(labels, clusters),
    },
    5 * rounds,
  )
  texts = {name: f'{value:.15f}' for name, value in results.items()}
  print_rows(
    f'NMI of {_NUM_ITEMS:,}', medians, texts, peer='scikit-learn', floor=None
  )


def main() -> None:
  arguments = _ARGUMENTS
  dims = [int(dim) for dim in arguments.dims.split(',')]
  faiss.omp_set_num_threads(_THREADS)
  torch.set_num_threads(_THREADS)
  if arguments.memory:
    print_memory(arguments.memory, dims[0])
    return
  flops = measure_flops()
  print(
    f'jax {jax.__version__}, faiss {faiss.__version__}, '
    f'pytorch-metric-learning {pytorch_metric_learning.__version__}, '
    f'scikit-learn {sklearn.__version__}; {jax.devices()[0].device_kind}, '
    f'{_THREADS} threads, {flops / 1e9:.0f} GFLOP/s'
  )
  columns = f'{"median":>10}{"ratio":>8}{"floor":>8}{"/floor":>7}'
  print(f'{"":50}{columns}   results, percent')
  for dim in dims:
    compare_ranking(dim, arguments.rounds, flops)
  compare_calculator(dims[0], arguments.rounds)
  compare_kmeans(dims[0], arguments.rounds, flops)
  compare_nmi(arguments.rounds)


if __name__ == '__main__':
  main()
