"""CUB-200-2011: birds, https://www.vision.caltech.edu/datasets/cub_200_2011/.

The first 100 species are for training, the other 100 for testing. The split in
the archive, by image, is for classification and not used.
"""

import os

from proxy_nca_jax.datasets import annotations, downloads, published

_IMAGES = 'images'


class Cub200(published.PublishedBuilder):
  """11,788 images of 200 bird species, split by species."""

  homepage = 'https://data.caltech.edu/records/65de6-vp158'
  files = (
    (
      downloads.RemoteFile(
        'CUB_200_2011.tgz',
        urls=(
          'https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1',
          'https://s3.amazonaws.com/fast-ai-imageclas/CUB_200_2011.tgz',
          'https://drive.usercontent.google.com/download?export=download&confirm=t&id=1hbzc_P1FuxMkcabkgn9ZKinBwW683j45',
        ),
        size=1150585339,
        checksum='sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081',
      ),
    ),
  )
  markers = (('images.txt', 'image_class_labels.txt', _IMAGES),)
  counts = {'train': (5864, 100), 'test': (5924, 100)}

  def read_annotations(self, root):
    paths, problems = annotations.read_rows(root, 'images.txt', ('id', 'path'))
    labels, more = annotations.read_rows(
      root, 'image_class_labels.txt', ('id', 'class_id')
    )
    problems += more
    class_ids = {row['id']: row['class_id'] for row in labels}
    examples = []
    for row in paths:
      class_id = class_ids.get(row['id'], '')
      if not class_id.isdecimal():
        problems.append((row['path'], 'no class in image_class_labels.txt'))
        continue
      examples.append(
        annotations.Example(
          split='train' if int(class_id) <= 100 else 'test',
          path=os.path.join(_IMAGES, row['path']),
          class_name=os.path.dirname(row['path']),
        )
      )
    return examples, problems
