"""Market-1501: people seen by six cameras, for re-identification.

Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015. File
names contain the person and the camera: 0002_c1s1_000451_03.jpg.
"""

import os
import re

import numpy as np

from proxy_nca_jax.datasets import annotations, downloads, published

_FOLDERS = {
  'train': 'bounding_box_train',
  'query': 'query',
  'gallery': 'bounding_box_test',
}
_NAME = re.compile(r'(-1|\d+)_c([1-6])s\d.*\.jpe?g', re.IGNORECASE)
_JUNK = '-1'


class Market1501(published.PublishedBuilder):
  """32,217 images of 1,501 people, split by person.

  Person 0000 of the gallery is a class of distractors that matches no query.
  Images of person -1 are junk, which the protocol ignores.
  """

  homepage = 'https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html'
  files = (
    (
      downloads.RemoteFile(
        'Market-1501-v15.09.15.zip',
        urls=(
          'http://188.138.127.15:81/Datasets/Market-1501-v15.09.15.zip',
          'https://drive.usercontent.google.com/download?export=download&confirm=t&id=0B8-rUzbwVRk0c054eEozWG9COHM',
        ),
        checksum='md5:65005ab7d12ec1c44de4eeafe813e68a',
      ),
    ),
  )
  markers = (tuple(_FOLDERS.values()),)
  # 750 people and the distractors 0000.
  counts = {
    'train': (12936, 751),
    'query': (3368, 750),
    'gallery': (15913, 751),
  }
  features = {'camera': np.int64}

  def read_annotations(self, root):
    examples, problems = [], []
    for split, folder in _FOLDERS.items():
      for name in sorted(os.listdir(os.path.join(root, folder))):
        match = _NAME.fullmatch(name)
        if match:
          examples.append(
            annotations.Example(
              split=split if match[1] != _JUNK else '',
              path=os.path.join(folder, name),
              class_name=match[1],
              extra={'camera': int(match[2])},
            )
          )
        elif name.lower().endswith(('.jpg', '.jpeg')) and name[0] != '.':
          path = os.path.join(folder, name)
          problems.append(
            (path, 'expected a name such as 0002_c1s1_000451_03.jpg')
          )
    return examples, problems
