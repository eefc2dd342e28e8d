"""Compares time and memory of Proxy-NCA with pytorch-metric-learning.

python benchmarks/losses.py [--rounds=11]

Needs Linux, and: pip install torch pytorch-metric-learning

* Time of a forward and backward pass, with gradients for embeddings and
  proxies: both libraries take turns in one process, with two threads each.
  Prints medians and their ratio.
* Peak memory beyond inputs and parameters, each library in its own process,
  without that of the compiler. It is read from /proc.
* A million proxies in chunks: memory beyond inputs, parameters and gradients,
  and the largest difference from the unchunked loss with a tenth of the
  proxies.
"""

import argparse
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
    '--rounds', type=int, default=11, help='repetitions of each measurement'
  )
  parser.add_argument(
    '--peak',
    metavar='NAME',
    help='only print the peak memory of one contender, for --size',
  )
  parser.add_argument(
    '--size', type=int, nargs=3, metavar=('BATCH', 'CLASSES', 'DIM')
  )
  return parser.parse_args()


# Parsed here because --help must work without the packages imported below.
_ARGUMENTS = _parse()
_THREADS = 2
if hasattr(os, 'sched_setaffinity'):
  # XLA starts one thread per processor that the process may use.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_THREADS])

import jax
import jax.numpy as jnp
import numpy as np
import pytorch_metric_learning as peer
import torch
from pytorch_metric_learning import losses as peer_losses

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax import proxy_nca_loss

# Batch, classes, dim.
_SIZES = (
  (32, 11318, 64),
  (192, 11318, 64),
  (192, 11318, 512),
  (1024, 11318, 64),
  (1024, 11318, 512),
  (192, 100000, 512),
)
_MILLION = (256, 1_000_000, 128)
_CHUNK = 4000


def make_inputs(size):
  batch, num_classes, dim = size
  rng = np.random.default_rng(0)
  return (
    rng.standard_normal((batch, dim), dtype=np.float32),
    rng.standard_normal((num_classes, dim), dtype=np.float32),
    rng.integers(0, num_classes, batch).astype(np.int32),
  )


def make_ours(embeddings, proxies, labels, **kwargs):
  """Returns a function that computes the loss and both gradients."""
  arrays = jax.block_until_ready(
    [jnp.asarray(array) for array in (embeddings, proxies, labels)]
  )
  step = (
    jax.jit(
      jax.value_and_grad(
        lambda x, p, y: proxy_nca_loss(x, p, y, **kwargs).mean(), (0, 1)
      )
    )
    .lower(*arrays)
    .compile()
  )
  return lambda: jax.block_until_ready(step(*arrays))


def make_peer(embeddings, proxies, labels):
  loss = peer_losses.ProxyNCALoss(*proxies.shape, softmax_scale=9)
  loss.proxies.data = torch.from_numpy(proxies)
  embeddings = torch.from_numpy(embeddings).requires_grad_()
  labels = torch.from_numpy(labels).long()

  def step():
    embeddings.grad = loss.proxies.grad = None
    loss(embeddings, labels).backward()

  return step


CONTENDERS = {
  'ours': make_ours,
  'softmax form': lambda *inputs: make_ours(
    *inputs, positive_in_denominator=True
  ),
  'peer': make_peer,
}


def milliseconds(steps, rounds: int) -> dict[str, float]:
  """Returns the median time of each step; they take turns of three calls.

  The first call of a turn is not counted: threads of the previous contender
  still spin, and the caches hold its arrays.
  """
  times = {name: [] for name in steps}
  for _ in range(rounds):
    for name, step in steps.items():
      step()
      for _ in range(2):
        start = time.perf_counter()
        step()
        times[name].append(1e3 * (time.perf_counter() - start))
  return {name: statistics.median(row) for name, row in times.items()}


def read_peak() -> float:
  """Returns the peak resident memory of this process, in MiB."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmHWM'):
      return int(line.split()[1]) / 1024
  raise ValueError('/proc/self/status has no VmHWM: Linux is needed.')


def print_peak(contender: str, size: tuple[int, ...]) -> None:
  """Prints the MiB that a step needs beyond its inputs and parameters."""
  make = CONTENDERS.get(contender)
  if make is None:
    make = lambda *inputs: make_ours(*inputs, proxy_chunk=_CHUNK)
  make(*make_inputs((4, 8, 16)))()  # Starts the threads.
  inputs = make_inputs(size)  # Kept alive: reused memory would not count.
  step = make(*inputs)
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # Resets the peak.
  before = read_peak()
  step()
  step()
  print(read_peak() - before)


def peak(contender: str, size: tuple[int, ...]) -> float:
  command = [sys.executable, __file__, f'--peak={contender}', '--size']
  return float(
    subprocess.run(
      [*command, *map(str, size)], check=True, capture_output=True, text=True
    ).stdout
  )


def print_million() -> None:
  batch, num_proxies, dim = _MILLION
  gradients = 4 * dim * (batch + num_proxies) / 2**20
  above = peak('chunks', _MILLION) - gradients
  step = make_ours(*make_inputs(_MILLION), proxy_chunk=_CHUNK)
  step()
  start = time.perf_counter()
  step()
  seconds = time.perf_counter() - start
  inputs = make_inputs((batch, num_proxies // 10, dim))
  plain, chunks = (
    make_ours(*inputs, proxy_chunk=chunk)() for chunk in (None, _CHUNK)
  )
  worst = max(
    float(jnp.max(jnp.abs(a - b)))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(chunks))
  )
  print(
    f'{num_proxies:,} x {dim}, batch {batch}, chunks of {_CHUNK}: '
    f'{seconds:.1f} s, {above:.0f} MiB beyond inputs, parameters and gradients '
    f'(the similarities alone: {4 * batch * num_proxies / 2**20:.0f} MiB); '
    f'largest difference from the unchunked loss {worst:.1e}'
  )


def main() -> None:
  arguments = _ARGUMENTS
  torch.set_num_threads(_THREADS)
  if arguments.peak:
    print_peak(arguments.peak, tuple(arguments.size))
    return
  print(
    f'jax {jax.__version__}, torch {torch.__version__}, '
    f'pytorch-metric-learning {peer.__version__}, {_THREADS} threads, '
    f'{arguments.rounds} rounds'
  )
  print(
    f'{"batch, classes, dim":22}{"milliseconds":>42}{"ratio":>9}'
    f'{"MiB":>18}{"ratio":>9}'
  )
  print(
    f'{"":22}'
    + ''.join(f'{name:>14}' for name in CONTENDERS)
    + f'{"":9}{"ours":>9}{"peer":>9}'
  )
  for size in _SIZES:
    inputs = make_inputs(size)
    steps = {name: make(*inputs) for name, make in CONTENDERS.items()}
    times = milliseconds(steps, arguments.rounds)
    del steps, inputs
    memory = {name: peak(name, size) for name in ('ours', 'peer')}
    print(
      f'{", ".join(map(str, size)):22}'
      + ''.join(f'{milli:14.1f}' for milli in times.values())
      + f'{times["peer"] / times["ours"]:9.1f}'
      + f'{memory["ours"]:9.0f}{memory["peer"]:9.0f}'
      + f'{memory["ours"] / memory["peer"]:9.2f}'
    )
  print_million()


if __name__ == '__main__':
  main()
