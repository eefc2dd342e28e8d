"""Evaluation at the size of Stanford Online Products, beside its peers'.

python benchmarks/evaluation.py [--rounds=3] [--dims=64,512]

Needs faiss-cpu, scikit-learn, torch and pytorch-metric-learning besides. The
embeddings are random points of unit norm around 11,316 class centres; classes
have 2 to 12 of the 60,502 items. In one process, each with two threads, in
turn: medians after a first round that compiles, and ratios to the peer's.

* Ranking: Recall@{1,10,100,1000} by the nearest positives alone, and with MAP@R
  and the other scores of all positives, against the search of FAISS's flat
  index at k = 1001, which Recall@1000 needs. Recall is compared.
* pytorch-metric-learning's AccuracyCalculator for Recall@1, R-precision and
  MAP@R, at the first dimension; scores are compared.
* 20 iterations of k-means with 11,316 clusters against FAISS's from the same
  start, at the first dimension; assignments are compared.
* NMI of two partitions into 11,316 parts against scikit-learn's.

The floor is the time of the products alone at the rate of one large product
measured in the same process: half of all pairs for ranking, all points with all
centroids for k-means. Memory is the peak above the embeddings, of a process of
its own that runs twice: of the second run, so that the compiler's is not
counted, and after what the first one freed was given back. It is read from
/proc: Linux alone.
"""

import argparse
import ctypes
import os
import pathlib
import statistics
import subprocess
import sys
import time

_THREADS = 2
if hasattr(os, 'sched_setaffinity'):
  # XLA takes as many threads as the process has processors.
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
  centres = rng.standard_normal((_NUM_CLASSES, dim), np.float32)
  noise = rng.standard_normal((_NUM_ITEMS, dim), np.float32)
  rows = centres[labels] + 1.2 * noise
  return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def ranks(rows, labels, nearest_only: bool):
  return [
    r
    for _, r in retrieval.positive_ranks(
      rows, labels, nearest_only=nearest_only
    )
  ]


def recall_here(rows, labels) -> list[float]:
  first = np.concatenate([r[:, 0] for r in ranks(rows, labels, True)])
  return [float(np.mean(first[first > 0] <= k)) for k in _RECALL_AT]


def scores_here(rows, labels) -> list[float]:
  """Recall@K, then MAP@R, R-precision, MRR and mAP."""
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


def recall_by_faiss(rows, labels) -> list[float]:
  index = faiss.IndexFlatIP(rows.shape[1])
  index.add(rows)
  _, found = index.search(rows, max(_RECALL_AT) + 1)
  is_self = found == np.arange(len(rows))[:, None]
  is_match = (labels[found] == labels[:, None]) & ~is_self
  place = np.cumsum(~is_self, axis=1)
  first = np.where(is_match, place, len(rows)).min(axis=1)
  return [float(np.mean(first <= k)) for k in _RECALL_AT]


def product_rate() -> float:
  """Floating-point operations a second of a matrix product."""
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
  """Runs each in turn; returns the medians without the first, and results."""
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


def compare_ranking(dim: int, rounds: int, rate: float) -> None:
  rows, labels = make_split(dim)
  medians, results = alternate(
    {
      'Recall@K': lambda: recall_here(rows, labels),
      'all scores': lambda: scores_here(rows, labels),
      'FAISS, k = 1001': lambda: recall_by_faiss(rows, labels),
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
    floor=_NUM_ITEMS**2 * dim / rate,
  )
  for name in ('Recall@K', 'all scores'):
    output = subprocess.run(
      [sys.executable, __file__, f'--memory={name}', f'--dims={dim}'],
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    print(f'{"":22}{name:28}{output.strip()} MiB above the embeddings')


def print_memory(name: str, dim: int) -> None:
  rows, labels = make_split(dim)
  run = recall_here if name == 'Recall@K' else scores_here
  run(rows, labels)
  ctypes.CDLL(None).malloc_trim(0)
  before = _memory('VmRSS')
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  run(rows, labels)
  print(round(_memory('VmHWM') - before))


def _memory(field: str) -> float:
  """A field of this process's status, in MiB."""
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
      'here': lambda: scores_here(rows, labels),
      'AccuracyCalculator': lambda: calculator.get_accuracy(queries, targets),
    },
    rounds,
  )
  values, scores = results.values()
  texts = {
    'here': [values[0], *values[4:6]],
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


def compare_kmeans(dim: int, rounds: int, rate: float) -> None:
  rows, _ = make_split(dim)
  rng = np.random.default_rng(1)
  start = rows[rng.choice(len(rows), _NUM_CLASSES, replace=False)]

  def here():
    clusters = clustering.kmeans(
      rows, num_clusters=_NUM_CLASSES, init=start, max_iterations=20
    )
    return np.asarray(clusters.assignments)

  def by_faiss():
    kmeans = faiss.Kmeans(
      dim,
      _NUM_CLASSES,
      niter=20,
      min_points_per_centroid=1,
      max_points_per_centroid=_NUM_ITEMS,
    )
    kmeans.train(rows, init_centroids=start)
    return kmeans.index.search(rows, 1)[1][:, 0]

  medians, results = alternate({'here': here, 'FAISS': by_faiss}, rounds)
  same = np.mean(results['here'] == results['FAISS'])
  texts = {name: f'{100 * same:.3f}% assigned alike' for name in results}
  # 20 iterations, and the assignment to the last centroids.
  floor = 21 * 2 * _NUM_ITEMS * _NUM_CLASSES * dim / rate
  print_rows(f'k-means x {dim}', medians, texts, peer='FAISS', floor=floor)


def compare_nmi(rounds: int) -> None:
  _, labels = make_split(2)
  clusters = np.random.default_rng(2).permutation(labels)
  clusters = np.where(np.arange(len(labels)) % 3 > 0, labels, clusters)
  medians, results = alternate(
    {
      'here': lambda: metrics.normalized_mutual_information(labels, clusters),
      'scikit-learn': lambda: normalized_mutual_info_score(labels, clusters),
    },
    5 * rounds,
  )
  texts = {name: f'{value:.15f}' for name, value in results.items()}
  print_rows(
    f'NMI of {_NUM_ITEMS:,}', medians, texts, peer='scikit-learn', floor=None
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--dims', default='64,512')
  parser.add_argument('--memory', default='', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  dims = [int(dim) for dim in arguments.dims.split(',')]
  faiss.omp_set_num_threads(_THREADS)
  torch.set_num_threads(_THREADS)
  if arguments.memory:
    print_memory(arguments.memory, dims[0])
    return
  rate = product_rate()
  print(
    f'jax {jax.__version__}, faiss {faiss.__version__}, '
    f'pytorch-metric-learning {pytorch_metric_learning.__version__}, '
    f'scikit-learn {sklearn.__version__}; {jax.devices()[0].device_kind}, '
    f'{_THREADS} threads, {rate / 1e9:.0f} GFLOP/s'
  )
  columns = f'{"median":>10}{"ratio":>8}{"floor":>8}{"over":>7}'
  print(f'{"":50}{columns}   results, percent')
  for dim in dims:
    compare_ranking(dim, arguments.rounds, rate)
  compare_calculator(dims[0], arguments.rounds)
  compare_kmeans(dims[0], arguments.rounds, rate)
  compare_nmi(arguments.rounds)


if __name__ == '__main__':
  main()
