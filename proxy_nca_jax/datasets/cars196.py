"""Cars196: Krause et al., 3D Object Representations, 3DRR-13.

The first 98 models are for training, the other 98 for testing. There are two
sets of archives: one archive of all images, used in metric learning, and two
archives with a split of the images for classification.
"""

import os
from collections.abc import Iterator

import numpy as np
from scipy import io

from proxy_nca_jax.datasets import annotations, downloads, published
from proxy_nca_jax.runtime import errors

# The authors' own URLs are dead.
_COPY = (
  'https://huggingface.co/datasets/XiN0919/FGVC/resolve/'
  '921e8dce38536cd5982739d85d5e9235d2cb2a76'
)
_TEST_LABELS = 'cars_test_annos_withlabels.mat'


class Cars196(published.PublishedBuilder):
  """16,185 images of 196 car models, split by model."""

  homepage = 'https://huggingface.co/datasets/XiN0919/FGVC'
  files = (
    (
      downloads.RemoteFile(
        'car_ims.tgz',
        urls=(f'{_COPY}/car_ims.tgz',),
        size=1956628579,
        checksum='sha256:4d96e3e3e892c6b7e4a71959325c7de4804037d27ba5aaf1c756100fd94a5342',
      ),
      downloads.RemoteFile(
        'cars_annos.mat',
        urls=(f'{_COPY}/cars_annos.mat',),
        size=394471,
        checksum='md5:b407c6086d669747186bd1d764ff9dbc',
      ),
    ),
    (
      downloads.RemoteFile(
        'cars_train.tgz',
        size=979269282,
        checksum='sha256:512b227b30e2f0a8aab9e09485786ab4479582073a144998da74d64b801fd288',
      ),
      downloads.RemoteFile(
        'cars_test.tgz',
        size=977350468,
        checksum='sha256:bffea656d6f425cba3c91c6d83336e4c5f86c6cffd8975b0f375d3a10da8e243',
      ),
      downloads.RemoteFile(
        'car_devkit.tgz',
        size=330960,
        checksum='sha256:b97deb463af7d58b6bfaa18b2a4de9829f0f79e8ce663dfa9261bf7810e9accd',
      ),
      downloads.RemoteFile(
        _TEST_LABELS,
        size=185758,
        checksum='sha256:790f75be8ea34eeded134cc559332baf23e30e91367e9ddca97d26ed9b895f05',
      ),
    ),
    (
      downloads.RemoteFile(
        'CARS196.zip',
        urls=('http://ftp.cs.stanford.edu/cs/cvgl/CARS196.zip',),
      ),
    ),
  )
  markers = (
    ('cars_annos.mat', 'car_ims'),
    ('devkit/cars_meta.mat', _TEST_LABELS, 'cars_train', 'cars_test'),
  )
  counts = {'train': (8054, 98), 'test': (8131, 98)}

  def read_annotations(self, root):
    examples, problems = [], []
    rows = sorted(_read_all(root), key=lambda row: row[1])
    for path, number, names in rows:
      if not 1 <= number <= len(names):
        problems.append((path, f'class {number}, expected 1 to {len(names)}'))
        continue
      examples.append(
        annotations.Example(
          split='train' if number <= 98 else 'test',
          path=path,
          class_name=names[number - 1],
        )
      )
    return examples, problems


def _read_all(root: str) -> Iterator[tuple[str, int, list[str]]]:
  """Yields (path, class counted from 1, names of all classes)."""
  if os.path.exists(os.path.join(root, 'cars_annos.mat')):
    matrices = _load(root, 'cars_annos.mat')
    names = _texts(matrices['class_names'])
    for row in np.atleast_1d(matrices['annotations']):
      yield str(row['relative_im_path']), int(row['class']), names
    return
  names = _texts(_load(root, 'devkit/cars_meta.mat')['class_names'])
  for folder, file in (
    ('cars_train', 'devkit/cars_train_annos.mat'),
    ('cars_test', _TEST_LABELS),
  ):
    for row in np.atleast_1d(_load(root, file)['annotations']):
      yield os.path.join(folder, str(row['fname'])), int(row['class']), names


def _load(root: str, path: str) -> dict[str, np.ndarray]:
  try:
    return io.loadmat(os.path.join(root, path), squeeze_me=True)
  # SciPy raises many types for a broken file.
  except Exception as error:
    raise ValueError(
      f'{path} cannot be read: {errors.one_line(error)}'
    ) from error


def _texts(names: np.ndarray) -> list[str]:
  return [str(name) for name in np.atleast_1d(names)]
