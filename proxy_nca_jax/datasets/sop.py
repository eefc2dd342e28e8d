"""Stanford Online Products, https://cvgl.stanford.edu/projects/lifted_struct/.

A few photos of each product for sale; Ebay_train.txt and Ebay_test.txt split
the products.
"""

import tensorflow_datasets as tfds

from proxy_nca_jax.datasets import annotations, downloads, published


class Sop(published.PublishedBuilder):
  """120,053 images of 22,634 products in 12 categories, split by product."""

  homepage = 'https://cvgl.stanford.edu/projects/lifted_struct/'
  files = (
    (
      downloads.RemoteFile(
        'Stanford_Online_Products.zip',
        urls=(
          'http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip',
          'ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip',
          'https://drive.usercontent.google.com/download?export=download&confirm=t&id=1TclrpQOF_ullUP99wk_gjGN8pKvtErG8',
        ),
        size=3083860082,
        checksum='sha256:b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48',
      ),
    ),
  )
  markers = (('Ebay_train.txt', 'Ebay_test.txt'),)
  counts = {'train': (59551, 11318), 'test': (60502, 11316)}
  features = {'super_class': tfds.features.Text()}

  def read_annotations(self, root):
    fields = ('image_id', 'class_id', 'super_class_id', 'path')
    examples, problems = [], []
    for split in self.counts:
      rows, more = annotations.read_rows(
        root, f'Ebay_{split}.txt', fields, skip=1
      )
      problems += more
      examples += [
        annotations.Example(
          split=split,
          path=row['path'],
          class_name=row['class_id'],
          extra={'super_class': row['path'].split('_final/')[0]},
        )
        for row in rows
      ]
    return examples, problems
