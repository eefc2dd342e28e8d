"""Measures training on a file of vectors: memory, and vectors per second.

python benchmarks/vectors.py [--folder=DIR] [--vectors=1000000] [--dim=768]
  [--classes=10000] [--steps=200] [--batch_size=1024] [--format=npy]

Writes vectors of noise around a mean for each class, then trains on them with
configs/embeddings.py in a process of its own, and on 10,000 others in another.
A fiftieth of the classes are test classes, since all pairs of test vectors are
compared. Prints, for both, the vectors per second, those of reading batches
without training, and two peaks: of the memory that the process itself
allocated, and of the pages of mapped files, which the operating system drops
when memory is short.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

_ROOT = pathlib.Path(__file__).parent.parent
_SMALL = 10_000
_BLOCK = 10_000


def write(folder: str, arguments: argparse.Namespace, num_vectors: int) -> str:
  """Writes vectors in the format that is asked for; returns the file."""
  num_classes = max(arguments.classes * num_vectors // arguments.vectors, 200)
  rng = np.random.default_rng(0)
  labels = rng.integers(0, num_classes, num_vectors)
  means = rng.normal(size=(num_classes, arguments.dim)).astype(np.float32)
  path = f'{folder}/{num_vectors}.npy'
  matrix = np.lib.format.open_memmap(
    path, 'w+', np.float32, (num_vectors, arguments.dim)
  )
  for begin in range(0, num_vectors, _BLOCK):
    block = labels[begin : begin + _BLOCK]
    noise = rng.standard_normal((len(block), arguments.dim), np.float32)
    matrix[begin : begin + _BLOCK] = means[block] + 2 * noise
  if arguments.format == 'npy':
    np.save(f'{folder}/{num_vectors}.labels.npy', labels)
    return path
  name = f'{folder}/{num_vectors}.{arguments.format}'
  if arguments.format == 'npz':
    np.savez(name, embeddings=matrix, labels=labels)
  else:
    _write_parquet(name, matrix, labels)
  os.remove(path)
  return name


def _write_parquet(path: str, matrix: np.ndarray, labels: np.ndarray) -> None:
  import pyarrow
  from pyarrow import parquet

  kind = pyarrow.list_(pyarrow.float32(), matrix.shape[1])
  schema = pyarrow.schema([('embedding', kind), ('label', pyarrow.int64())])
  with parquet.ParquetWriter(path, schema) as writer:
    for begin in range(0, len(matrix), _BLOCK):
      rows = np.ascontiguousarray(matrix[begin : begin + _BLOCK])
      vectors = pyarrow.FixedSizeListArray.from_arrays(
        rows.reshape(-1), matrix.shape[1]
      )
      columns = [vectors, pyarrow.array(labels[begin : begin + _BLOCK])]
      writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def train(folder: str, path: str, arguments: argparse.Namespace) -> None:
  """Trains in this process, and prints what it took as JSON."""
  sys.path.insert(0, str(_ROOT))
  from absl import flags

  flags.FLAGS.mark_as_parsed()
  from proxy_nca_jax import datasets, input_pipeline
  from proxy_nca_jax import train as train_lib
  from proxy_nca_jax.configs import embeddings

  config = embeddings.get_config()
  with config.unlocked():
    config.dataset.update(root=path, data_dir=f'{folder}/data')
    config.dataset.test_fraction = 0.02
    config.num_epochs, config.num_steps = 0.0, arguments.steps
    config.batch_size = arguments.batch_size
    config.log_every = config.save_every = arguments.steps // 2
    config.evaluation.kmeans_iterations = 0
  peaks = {'RssAnon': 0, 'RssFile': 0}
  threading.Thread(target=_watch, args=(peaks,), daemon=True).start()
  begin = time.perf_counter()
  train_lib.train_and_evaluate(config, f'{path}.run')
  seconds = time.perf_counter() - begin
  split = datasets.load(config).train
  batches = input_pipeline.train_batches(split, config)
  for _ in range(5):
    next(batches)
  begin = time.perf_counter()
  for _ in range(arguments.steps):
    next(batches)
  read = arguments.steps * config.batch_size / (time.perf_counter() - begin)
  batches.close()
  rows = pathlib.Path(f'{path}.run/metrics.jsonl').read_text().splitlines()
  rates = [
    row['images_per_second']
    for row in map(json.loads, rows)
    if 'images_per_second' in row
  ]
  print(json.dumps(peaks | {'train': rates[-1], 'read': read, 's': seconds}))


def _watch(peaks: dict[str, int]) -> None:
  """Keeps the largest sizes that Linux reports, in MB."""
  while True:
    for line in pathlib.Path('/proc/self/status').read_text().splitlines():
      name, _, value = line.partition(':')
      if name in peaks:
        peaks[name] = max(peaks[name], int(value.split()[0]) // 1000)
    time.sleep(0.05)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, value, text in (
    ('vectors', 10**6, 'number of vectors'),
    ('dim', 768, 'their dimension'),
    ('classes', 10**4, 'number of classes'),
    ('steps', 200, 'training steps'),
    ('batch_size', 1024, 'vectors of a step'),
  ):
    parser.add_argument(f'--{name}', type=int, default=value, help=text)
  parser.add_argument(
    '--format', choices=('npy', 'npz', 'parquet'), default='npy'
  )
  parser.add_argument('--folder', help='where the files are written')
  parser.add_argument('--train', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.train:
    return train(arguments.folder, arguments.train, arguments)
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    print(
      f'{"vectors":>10}{"trained/s":>12}{"read/s":>12}{"own MB":>10}'
      f'{"mapped MB":>11}{"seconds":>9}'
    )
    for num_vectors in (min(_SMALL, arguments.vectors), arguments.vectors):
      path = write(folder, arguments, num_vectors)
      output = subprocess.run(
        [
          *(sys.executable, __file__, f'--folder={folder}', f'--train={path}'),
          f'--steps={arguments.steps}',
          f'--batch_size={arguments.batch_size}',
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
      ).stdout
      row = json.loads(output.splitlines()[-1])
      print(
        f'{num_vectors:10,}{row["train"]:12,.0f}{row["read"]:12,.0f}'
        f'{row["RssAnon"]:10,}{row["RssFile"]:11,}{row["s"]:9.0f}',
        flush=True,
      )


if __name__ == '__main__':
  main()
