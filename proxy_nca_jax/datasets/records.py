"""What the records of every data set have in common."""

import itertools

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils


def make_info(
    builder: tfds.core.DatasetBuilder, *, side: int
) -> tfds.core.DatasetInfo:
  """Describes square pictures with a label and a name, in a given order.

  The metadata, filled when the records are written, holds `labels` of all
  records and `class_names`, so that a split by class reads no record.
  """
  return tfds.core.DatasetInfo(
    builder=builder,
    description=builder.__doc__,
    features=tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(
          shape=(side, side, 3), encoding_format='png'
        ),
        'label': np.int64,
        'name': tfds.features.Text(),
      }
    ),
    metadata=tfds.core.MetadataDict(),
    disable_shuffling=True,
  )


class OrderedBuilder(tfds.core.GeneratorBasedBuilder):
  """Writes records as they are yielded, holding a few at a time.

  TFDS's own writer sorts them first: up to 1 GB in memory, beyond that on disk
  with the help of TensorFlow. Subclasses yield (anything, record).
  """

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = []

  def _download_and_prepare(self, dl_manager, download_config) -> None:
    del download_config
    # A second info: it takes the folder of now, which is renamed when whole.
    info = self._info()
    writer = tfds.core.SequentialWriter(
      info, max_examples_per_shard=2**16, file_format='array_record'
    )
    for split, examples in self._split_generators(dl_manager).items():
      writer.initialize_splits([split])
      with tqdm_utils.tqdm(unit=' images', desc=self.name) as progress:
        # The writer saves its progress at each call: not for each record.
        while chunk := list(itertools.islice(examples, 1000)):
          writer.add_examples({split: [example for _, example in chunk]})
          progress.update(len(chunk))
    writer.close_all()
    self.info.set_splits(info.splits)
