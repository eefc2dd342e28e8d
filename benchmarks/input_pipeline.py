"""Compares decoding images in every epoch with reading a cache of pixels.

python benchmarks/input_pipeline.py [--images=600] [--rounds=7]

Writes a fake CUB archive with JPEGs of smooth noise, of CUB's most common size,
500 x 375 pixels, and about the file size of a photograph. Then reads them in
several ways, which take turns in one process, each with one thread per
processor:

  PIL           only Pillow: decode
  PIL + resize  only Pillow: decode and resize to 256 x 256
  decoded       Split.image with cache_size=0: the same through the records
  stored        Split.image with cache_size=256
  batches, ...  train_batches of 32 with random crops and flips, for both

Prints medians over the rounds, the ratio to decoding by Pillow, the bytes of an
image, and whether all ways give the same pixels.
"""

import argparse
import io
import os
import pathlib
import statistics
import sys
import tempfile
import time
from concurrent import futures

import numpy as np
from PIL import Image

_ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / 'tests')]

import made_archives
from absl import flags

from proxy_nca_jax import datasets, input_pipeline
from proxy_nca_jax.configs import cub200

flags.FLAGS.mark_as_parsed()
_CLASSES = (1, 2, 3, 101, 102, 103)


def photo(seed: int) -> bytes:
  """Returns a JPEG with detail at all scales, as in photographs."""
  rng = np.random.default_rng(seed)
  pixels = np.zeros((375, 500, 3), np.float32)
  for side in (4, 16, 64, 256):
    noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    layer = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
    pixels += np.asarray(layer, np.float32) / 4
  buffer = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(buffer, 'JPEG', quality=90)
  return buffer.getvalue()


def load(folder: str, **fields):
  config = cub200.get_config()
  config.dataset.update(
    data_dir=f'{folder}/data',
    manual_dir=folder,
    allow_incomplete=True,
    **fields,
  )
  return datasets.load(config).train, config


def decode(encoded: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB'))


def decode_and_resize(encoded: bytes) -> np.ndarray:
  image = Image.open(io.BytesIO(encoded)).convert('RGB')
  return np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR))


def read_all(pool, read, items) -> int:
  """Reads every image, and its pixels: mapped files are read on access."""
  list(pool.map(lambda item: int(read(item)[::8, ::8].sum()), items))
  return len(items)


def read_batches(split, config, *, epochs: int) -> int:
  num_batches = epochs * len(split) // config.batch_size
  iterator = input_pipeline.train_batches(split, config)
  for _ in range(num_batches):
    next(iterator)
  iterator.close()
  return num_batches * config.batch_size


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--images', type=int, default=600, help='number of images'
  )
  parser.add_argument(
    '--rounds', type=int, default=7, help='repetitions of each measurement'
  )
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    made_archives.make_image = photo
    made_archives.write_tgz(
      f'{folder}/CUB_200_2011.tgz',
      made_archives.cub200(_CLASSES, arguments.images // 3),
    )
    plain, config = load(folder)
    stored, _ = load(folder, cache_size=256)
    files = [plain[index]['image'] for index in range(len(plain))]
    equal = all(
      np.array_equal(plain.image(i), stored.image(i))
      and np.array_equal(plain.image(i), decode_and_resize(files[i]))
      for i in range(len(plain))
    )
    rows = range(len(plain))
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      ways = {
        'PIL': lambda: read_all(pool, decode, files),
        'PIL + resize': lambda: read_all(pool, decode_and_resize, files),
        'decoded': lambda: read_all(pool, plain.image, rows),
        'stored': lambda: read_all(pool, stored.image, rows),
        'batches, decoded': lambda: read_batches(plain, config, epochs=1),
        # Enough batches to amortize starting the threads.
        'batches, stored': lambda: read_batches(stored, config, epochs=8),
      }
      rates = {name: [] for name in ways}
      for _ in range(arguments.rounds):
        for name, run in ways.items():
          start = time.perf_counter()
          num_images = run()
          rates[name].append(num_images / (time.perf_counter() - start))
  size = sum(map(len, files)) / len(files)
  print(
    f'{len(files)} images of 500 x 375, {size:,.0f} bytes each; cached '
    f'{256 * 256 * 3:,} bytes; {os.cpu_count()} threads; {arguments.rounds} '
    'rounds'
  )
  print(f'{"":18}{"images/s":>10}{"ratio":>8}')
  base = statistics.median(rates['PIL'])
  for name, values in rates.items():
    rate = statistics.median(values)
    print(f'{name:18}{rate:10.0f}{rate / base:8.2f}')
  print(f'decoded, stored and Pillow give the same pixels: {equal}')


if __name__ == '__main__':
  main()
