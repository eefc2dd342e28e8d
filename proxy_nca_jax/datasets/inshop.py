"""In-Shop Clothes Retrieval of DeepFashion, the standard 256-pixel images.

Liu et al., DeepFashion, CVPR 2016. Queries search a gallery of other images of
the same items; the items for training are different ones.
"""

import os

import tensorflow_datasets as tfds

from proxy_nca_jax.datasets import annotations, downloads, published

_PARTITION = 'list_eval_partition.txt'


class Inshop(published.PublishedBuilder):
  """52,712 images of 7,982 clothing items, split by item."""

  homepage = (
    'https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html '
    '(Img/img.zip and Eval)'
  )
  files = (
    (
      downloads.RemoteFile('img.zip'),
      downloads.RemoteFile(
        _PARTITION,
        checksum='sha256:'
        'cfada103c44df866db5e2ee9ecc2301ca691a4d0cdb3c875fe4051b62570894c',
      ),
    ),
  )
  # The extracted archives side by side, or in the published folders.
  markers = ((_PARTITION, 'img'), (f'Eval/{_PARTITION}', 'Img/img'))
  counts = {
    'train': (25882, 3997),
    'query': (14218, 3985),
    'gallery': (12612, 3985),
  }
  features = {'super_class': tfds.features.Text()}

  def read_annotations(self, root):
    is_flat = os.path.exists(os.path.join(root, _PARTITION))
    rows, problems = annotations.read_rows(
      root,
      _PARTITION if is_flat else f'Eval/{_PARTITION}',
      ('image_name', 'item_id', 'evaluation_status'),
      skip=2,
    )
    examples = []
    for row in sorted(rows, key=lambda row: row['item_id']):
      path, split = row['image_name'], row['evaluation_status']
      if split in self.counts:
        examples.append(
          annotations.Example(
            split=split,
            path=path if is_flat else os.path.join('Img', path),
            class_name=row['item_id'],
            extra={'super_class': '/'.join(path.split('/')[1:3])},
          )
        )
      else:
        problems.append((path, f'expected train, query or gallery: {split!r}'))
    return examples, problems
