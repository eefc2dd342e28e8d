"""Measures the peak memory of preparing Stanford Online Products.

python benchmarks/preparation.py

Writes a fake archive with the published layout and numbers of images and
classes, where each image has a few hundred bytes, prepares it in a separate
process, and prints the peak memory of that process. Needs about 1 GB of disk.
"""

import argparse
import io
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
from PIL import Image

_ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(_ROOT))

_COUNTS = {'train': (59551, 11318), 'test': (60502, 11316)}
_DIR = 'Stanford_Online_Products'


def make_archive(path: str) -> None:
  rng = np.random.default_rng(0)
  header = 'image_id class_id super_class_id path\n'
  image_id = class_id = 0
  with zipfile.ZipFile(path, 'w') as archive:
    for split, (num_images, num_classes) in _COUNTS.items():
      lines = [header]
      for members in np.array_split(np.arange(num_images), num_classes):
        class_id += 1
        for index in range(len(members)):
          image_id += 1
          name = f'chair_final/{110000000000 + class_id}_{index}.JPG'
          lines.append(f'{image_id} {class_id} 3 {name}\n')
          buffer = io.BytesIO()
          pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
          Image.fromarray(pixels).save(buffer, 'JPEG')
          archive.writestr(f'{_DIR}/{name}', buffer.getvalue())
      archive.writestr(f'{_DIR}/Ebay_{split}.txt', ''.join(lines))


def peak_mib() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prepare(folder: str) -> None:
  from proxy_nca_jax import datasets

  before, start = peak_mib(), time.monotonic()
  builder, skipped = datasets.prepare(
    {
      'name': 'sop',
      'data_dir': f'{folder}/data',
      'manual_dir': folder,
      'allow_incomplete': False,
    }
  )
  seconds = time.monotonic() - start
  data = pathlib.Path(builder.data_path)
  shards = [path.stat().st_size / 2**20 for path in data.glob('*array_record*')]
  print(f'images                    {builder.info.splits.total_num_examples:,}')
  print(f'skipped                   {len(skipped)}')
  print(f'seconds                   {seconds:.0f}')
  print(f'peak after imports        {before:.0f} MiB')
  print(f'peak after preparation    {peak_mib():.0f} MiB')
  print(f'largest shard             {max(shards):.0f} MiB')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--folder', help='only prepare the archive in this folder'
  )
  arguments = parser.parse_args()
  if arguments.folder:
    prepare(arguments.folder)
    return
  with tempfile.TemporaryDirectory() as folder:
    make_archive(f'{folder}/{_DIR}.zip')
    size = os.path.getsize(f'{folder}/{_DIR}.zip') / 2**20
    print(f'archive                   {size:.0f} MiB')
    # A new process, so that writing the archive does not count.
    subprocess.run([sys.executable, __file__, f'--folder={folder}'], check=True)


if __name__ == '__main__':
  main()
