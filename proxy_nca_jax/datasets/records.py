"""Records, common to all datasets: features, writing and random access."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import TypeVar

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from proxy_nca_jax.runtime import errors, signals

_T = TypeVar('_T')

# Files per chunk of `read_images`, and records per call of TFDS's writer, which
# saves its progress at each call.
_NUM_FILES, _NUM_RECORDS = 64, 256
_MAX_RECORDS_PER_SHARD = 2**16


def make_info(
  builder: tfds.core.DatasetBuilder, *, side: int | None, **features
) -> tfds.core.DatasetInfo:
  """Describes records of an image, a label and a name, in a fixed order.

  The metadata has the `labels` of all records and the `class_names`, filled in
  while the records are written, so that a split by class reads no record.

  Args:
    builder: the builder that the info belongs to.
    side: side of the images in pixels if all are squares of one size, which are
      stored as PNG; None for files of any size and format.
    **features: further features of a record.
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


def read_images(
  images: Sequence[_T], read: Callable[[_T], bytes]
) -> Iterator[tuple[_T, bytes | ValueError]]:
  """Reads images in parallel threads, yielding them in order.

  Memory is bounded: images are read in chunks.

  Args:
    images: names of files, or other arguments of `read`.
    read: returns the bytes to store; raises ValueError or OSError for a file
      that is not a readable image.

  Yields:
    (image, bytes or the error).
  """

  def try_to_read(image):
    try:
      return read(image)
    except ValueError as error:
      return error
    except OSError as error:
      return ValueError(error.strerror or errors.one_line(error))
    except MemoryError:
      return ValueError('there is not enough memory for it')

  with futures.ThreadPoolExecutor() as pool:
    for start in range(0, len(images), _NUM_FILES):
      chunk = images[start : start + _NUM_FILES]
      yield from zip(chunk, pool.map(try_to_read, chunk))


class StoredRecords(Sequence):
  """Random access to prepared records; errors name the file at fault."""

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
    """Reads a record, whose image is the bytes of an encoded file.

    Raises:
      ValueError: if the record cannot be read.
    """
    try:
      record = self._source[index]
      # From a truncated file, ArrayRecord reads None without an error.
      if record['image'] is not None:
        return record
      reason = 'the file is truncated'
    except Exception as error:  # ArrayRecord and TFDS raise many types.
      reason = errors.one_line(error)
    path = self._files[np.searchsorted(self._ends, index, side='right')]
    raise ValueError(
      f'Record {index} cannot be read from {path!r} ({reason}). Restore that '
      'file, or delete its folder to prepare the dataset again; then start the '
      'same command to resume from the last checkpoint.'
    )


def _update_digest(digest, example: Mapping) -> None:
  """Adds the name, the image and every other feature of a record."""
  for feature, value in sorted(example.items()):
    content = value if isinstance(value, bytes) else str(value).encode()
    # With the length, no two records have the same sequence of bytes.
    digest.update(f'\0{feature} {len(content)}\0'.encode())
    digest.update(content)


class OrderedBuilder(tfds.core.GeneratorBasedBuilder):
  """Base of builders that write records in the order they are generated.

  TFDS's default writer sorts records first, in up to 1 GB of memory and beyond
  that on disk, with TensorFlow. This one holds a few records at a time and
  ignores the keys that `_generate_examples` yields. `digest` in the metadata is
  a hash of all records, by which a run recognizes its dataset.
  """

  # 2.0.0: the metadata has the digest of the records.
  VERSION = tfds.core.Version('2.0.0')
  BUILDER_CONFIGS = []

  def _download_and_prepare(self, dl_manager, download_config) -> None:
    del download_config
    # A second info, bound to the temporary folder that TFDS renames at the end.
    info = self._info()
    writer = tfds.core.SequentialWriter(
      info,
      max_examples_per_shard=_MAX_RECORDS_PER_SHARD,
      file_format='array_record',
    )
    digest = hashlib.sha256()
    for split, examples in self._split_generators(dl_manager).items():
      writer.initialize_splits([split])
      digest.update(split.encode())
      title = f'{self.name} {split}'
      with tqdm.tqdm(unit=' images', desc=title, disable=None) as progress:
        while chunk := list(itertools.islice(examples, _NUM_RECORDS)):
          signals.check()
          writer.add_examples({split: [example for _, example in chunk]})
          for _, example in chunk:
            _update_digest(digest, example)
          progress.update(len(chunk))
    writer.close_all()
    self.info.metadata['digest'] = digest.hexdigest()
    self.info.set_splits(info.splits)
