"""What the records of every data set have in common."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from proxy_nca_jax.runtime import errors, signals


def make_info(
  builder: tfds.core.DatasetBuilder, *, side: int | None, **features
) -> tfds.core.DatasetInfo:
  """Describes pictures with a label and a name, in a given order.

  The metadata, filled when the records are written, holds `labels` of all
  records and `class_names`, so that a split by class reads no record.

  Args:
    builder: the info is its.
    side: of the square pictures, in pixels; None if they are of any size.
    **features: what else a record holds.
  """
  return tfds.core.DatasetInfo(
    builder=builder,
    description=builder.__doc__,
    features=tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(
          shape=(side, side, 3), encoding_format='png' if side else None
        ),
        'label': np.int64,
        'name': tfds.features.Text(),
        **features,
      }
    ),
    metadata=tfds.core.MetadataDict(),
    disable_shuffling=True,
  )


def read_pictures(
  root: str, names: Sequence[str], convert: Callable[[bytes], bytes]
) -> Iterator[tuple[str, bytes | ValueError]]:
  """Reads files in threads and in order, a bounded number of them ahead.

  Args:
    root: the folder that the names are in.
    names: of the files.
    convert: checks a file's bytes, and returns those to store.

  Yields:
    (name, what `convert` returned, or the error that it raised).
  """

  def read(name):
    try:
      with open(os.path.join(root, name), 'rb') as file:
        return convert(file.read())
    except ValueError as error:
      return error
    except OSError as error:
      return ValueError(error.strerror)

  with futures.ThreadPoolExecutor() as pool:
    for start in range(0, len(names), 64):
      chunk = names[start : start + 64]
      yield from zip(chunk, pool.map(read, chunk))


class StoredRecords(Sequence):
  """Prepared records by index; an error names the file that is at fault."""

  def __init__(self, builder: tfds.core.DatasetBuilder, splits: Sequence[str]):
    self._source = builder.as_data_source(
      split='+'.join(splits), decoders={'image': tfds.decode.SkipDecoding()}
    )
    infos = [builder.info.splits[split] for split in splits]
    self._files = [str(path) for info in infos for path in info.filepaths]
    self._ends = np.cumsum([n for info in infos for n in info.shard_lengths])

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict:
    """Reads a record, its image as the bytes of a file.

    Raises:
      ValueError: if it cannot be read.
    """
    try:
      record = self._source[index]
      # From a file that was cut short ArrayRecord reads None, and no error.
      if record['image'] is not None:
        return record
      reason = 'it is cut short'
    except Exception as error:  # ArrayRecord's are RuntimeErrors, TFDS's any.
      reason = errors.one_line(error)
    path = self._files[np.searchsorted(self._ends, index, side='right')]
    raise ValueError(
      f'Record {index} cannot be read from {path!r} ({reason}). Restore that '
      'file, or delete its folder, so that it is prepared again; then start '
      'the same command: the run goes on from its last checkpoint.'
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
      title = f'{self.name} {split}'
      with tqdm.tqdm(unit=' images', desc=title, disable=None) as progress:
        # The writer saves its progress at each call: not for each record.
        while chunk := list(itertools.islice(examples, 256)):
          signals.check()
          writer.add_examples({split: [example for _, example in chunk]})
          progress.update(len(chunk))
    writer.close_all()
    self.info.set_splits(info.splits)
