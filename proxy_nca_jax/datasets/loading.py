"""Prepares a data set once and splits it by class."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from proxy_nca_jax import images
from proxy_nca_jax.datasets import (
  cars196,
  class_splits,
  cub200,
  glyphs,
  image_folder,
  inshop,
  market1501,
  published,
  records,
  resized,
  sop,
)
from proxy_nca_jax.runtime import lock

PUBLISHED = {
  'cars196': cars196.Cars196,
  'cub200': cub200.Cub200,
  'inshop': inshop.Inshop,
  'market1501': market1501.Market1501,
  'sop': sop.Sop,
}
DATASETS = {
  'glyphs': glyphs.make_builder,
  'image_folder': image_folder.make_builder,
} | {
  name: functools.partial(published.make_builder, builder_cls)
  for name, builder_cls in PUBLISHED.items()
}

# Those of a data set, in the order of their records.
_SPLITS = ('images', 'train', 'test', 'query', 'gallery')

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Split:
  """Records of some classes, read by index.

  Attributes:
    source: random access to the records of the whole data set.
    images: maps a row of `source` to uint8 [height, width, 3].
    rows: int64 [num_records], the split's records in `source`.
    labels: int32 [num_records], in [0, num_classes).
    class_names: the names of the classes.
    is_query: bool [num_records], True for queries, False for the gallery that
      they search; None where each record queries all others.
    cameras: int32 [num_records]; None where the protocol knows no cameras.
  """

  source: Sequence[dict]
  images: Callable[[int], np.ndarray]
  rows: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  is_query: np.ndarray | None = None
  cameras: np.ndarray | None = None

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def class_sizes(self) -> np.ndarray:
    """int64 [num_classes], the records of each class."""
    return np.bincount(self.labels, minlength=self.num_classes)

  def __len__(self) -> int:
    return len(self.rows)

  def subset(self, indices: np.ndarray) -> 'Split':
    """Returns the split of these records, int [num_taken], in this order."""
    return dataclasses.replace(
      self,
      rows=self.rows[indices],
      labels=self.labels[indices],
      is_query=None if self.is_query is None else self.is_query[indices],
      cameras=None if self.cameras is None else self.cameras[indices],
    )

  def __getitem__(self, index: int) -> dict:
    """Returns a record as it is stored, with its label in this split.

    Returns:
      {'image': bytes of a file, 'label': int, 'class_name': str, 'name': str},
      and what else the data set knows, as its camera.
    """
    record = self.source[int(self.rows[index])]
    texts = {
      name: value.decode()
      for name, value in record.items()
      if isinstance(value, bytes) and name != 'image'
    }
    return (
      record
      | texts
      | {
        'label': int(self.labels[index]),
        'class_name': self.class_names[self.labels[index]],
      }
    )

  def image(self, index: int) -> np.ndarray:
    """Returns uint8 [height, width, 3], after the recipe's first resize."""
    return self.images(int(self.rows[index]))


@dataclasses.dataclass(frozen=True)
class Datasets:
  """The splits, what was left out, and a digest of it all.

  Attributes:
    train: the records to learn from.
    validation: of classes kept from training, to select by; None if not asked.
    test: the records to measure on.
    seen: a quarter of the pictures of each train class, kept from training,
      as queries, and those that are learned as the gallery; None without
      `config.long_tail`.
    skipped: (file, reason) of what could not be read.
    num_shared_classes: classes of the test split that training sees too; 0
      but where a user's own train and test folders share names.
    is_resized_source: whether training crops from pictures that were resized
      first, where the recipe crops the original.
    digest: of the records' number, labels and classes, and of the splits.
  """

  train: Split
  validation: Split | None
  test: Split
  seen: Split | None
  skipped: tuple[tuple[str, str], ...]
  num_shared_classes: int
  is_resized_source: bool
  digest: str


def load(config: ml_collections.ConfigDict) -> Datasets:
  """Prepares `config.dataset` unless it is prepared, and splits it by class.

  Raises:
    ValueError: if the data set is unknown, missing or too small for the split,
      or the fields do not fit each other.
  """
  config = config.dataset
  is_resized_source = _check_resizes(config)
  builder, skipped = prepare(config)
  metadata = builder.info.metadata
  labels = np.asarray(metadata['labels'], np.int32)
  class_names = metadata['class_names']
  train_classes, validation_classes, test_classes = _split_classes(
    config, metadata
  )
  names = [name for name in _SPLITS if name in builder.info.splits]
  source = records.StoredRecords(builder, names)
  roles = np.repeat(
    names, [builder.info.splits[name].num_examples for name in names]
  )
  evaluated = make_pictures(builder, source, config, side=config.resize)
  trained = evaluated
  if config.crop == 'random_resized' and not is_resized_source:
    trained = make_pictures(builder, source, config, side=0)

  def make_split(classes, images):
    rows = np.flatnonzero(np.isin(labels, classes))
    cameras = metadata.get('cameras')
    is_query = roles[rows] == 'query'
    return Split(
      source=source,
      images=images,
      rows=rows,
      labels=np.searchsorted(classes, labels[rows]).astype(np.int32),
      class_names=tuple(class_names[c] for c in classes),
      is_query=is_query if np.any(is_query) else None,
      cameras=np.asarray(cameras, np.int32)[rows] if cameras else None,
    )

  train = make_split(train_classes, trained)
  test = make_split(test_classes, evaluated)
  seen = None
  if config.long_tail:
    train, seen = _thin_out(config, train, make_split(train_classes, evaluated))
  train_names, test_names = (
    {os.path.basename(name) for name in split.class_names}
    for split in (train, test)
  )
  return Datasets(
    train=train,
    validation=(
      make_split(validation_classes, evaluated) if config.validation else None
    ),
    test=test,
    seen=seen,
    skipped=tuple((name, reason) for name, reason in skipped),
    num_shared_classes=len(train_names & test_names),
    is_resized_source=is_resized_source,
    digest=_digest(
      class_names,
      labels,
      train_classes,
      validation_classes,
      test_classes,
      *(() if seen is None else (train.rows, seen.rows)),
    ),
  )


def _split_classes(
  config: ml_collections.ConfigDict, metadata: Mapping
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the classes to train on, to validate on and to test on."""
  train, test = class_splits.split_classes(
    len(metadata['class_names']),
    num_train_classes=metadata.get('num_train_classes'),
    num_classes=config.num_classes,
    test_fraction=config.test_fraction,
    seed=config.split_seed,
  )
  train, validation = class_splits.split_validation(train, config.validation)
  train = class_splits.choose_classes(
    train, config.num_train_classes, seed=config.split_seed
  )
  return train, validation, test


def _thin_out(
  config: ml_collections.ConfigDict, train: Split, evaluated: Split
) -> tuple[Split, Split]:
  """Returns the long tail of a train split, and what is measured on it.

  Args:
    config: of the data set.
    train: the split with the pictures of training.
    evaluated: the same records with the pictures of evaluation.
  """
  learned, held_out = class_splits.thin_out(
    train.labels, config.long_tail, seed=config.split_seed
  )
  everything = np.sort(np.concatenate([learned, held_out]))
  seen = dataclasses.replace(
    evaluated.subset(everything), is_query=np.isin(everything, held_out)
  )
  return train.subset(learned), seen


def find_data_dir(data_dir: str) -> str:
  """Returns where prepared data sets lie; '' is TFDS's own place."""
  return os.path.expanduser(data_dir or str(tfds.core.constants.DATA_DIR))


def prepare(
  fields: Mapping[str, str | int],
) -> tuple[tfds.core.DatasetBuilder, list[tuple[str, str]]]:
  """Prepares a data set unless it is prepared.

  Args:
    fields: its `name`, `data_dir`, and what its builder takes; the part
      `dataset` of a run's config has them all.

  Returns:
    (builder, skipped): skipped holds (file, reason).

  Raises:
    ValueError: if the data set is unknown, or cannot be had or written.
  """
  name = fields['name']
  if name not in DATASETS:
    raise ValueError(
      f'Unknown data set {name!r} (config.dataset.name): choose one of '
      f'{", ".join(sorted(DATASETS))}.'
    )
  data_dir = find_data_dir(fields['data_dir'])
  names = set(inspect.signature(DATASETS[name]).parameters)
  names -= {'builder_cls', 'data_dir'}
  os.makedirs(os.path.join(data_dir, name), exist_ok=True)
  # Two runs that need the same data set prepare it once. A builder reads what
  # is prepared when it is made: so after the wait.
  with lock.locked(os.path.join(data_dir, name, 'lock')):
    builder, skipped = DATASETS[name](
      data_dir=data_dir, **{field: fields[field] for field in names}
    )
    _prepare(builder)
  return builder, [*skipped, *builder.info.metadata.get('skipped', ())]


def _check_resizes(config: ml_collections.ConfigDict) -> bool:
  """Returns whether the recipe crops originals and is given resized ones.

  Raises:
    ValueError: if the fields do not fit, or this is so and is not allowed.
  """
  images.resize(
    Image.new('RGB', (1, 1)),
    side=0,
    mode=config.resize_mode,
    interpolation=config.interpolation,
  )
  if config.crop not in ('random', 'random_resized'):
    raise ValueError(
      f'Unknown config.dataset.crop {config.crop!r}: choose random or '
      'random_resized.'
    )
  if config.resize < 0 or (config.name in PUBLISHED and config.resize < 1):
    raise ValueError(
      f'config.dataset.resize ({config.resize}) must be at least 1 pixel.'
    )
  if config.cache_size not in (0, config.resize):
    raise ValueError(
      f'config.dataset.cache_size ({config.cache_size}) must be 0, or '
      f'config.dataset.resize ({config.resize}): the cache holds what the '
      'recipe crops from.'
    )
  if config.crop == 'random':
    return False
  is_resized_source = bool(config.cache_size) or config.name == 'image_folder'
  if is_resized_source and not config.allow_resized_source:
    what = (
      'config.dataset.cache_size stores'
      if config.cache_size
      else 'image_folder stores'
    )
    raise ValueError(
      'config.dataset.crop=random_resized crops the original pictures, and '
      f'{what} resized ones: other pixels. Set '
      'config.dataset.allow_resized_source=True to train on those all the '
      'same; the report tells.'
    )
  return is_resized_source


def make_pictures(
  builder: tfds.core.DatasetBuilder,
  source: Sequence[dict],
  config: ml_collections.ConfigDict,
  *,
  side: int,
) -> Callable[[int], np.ndarray]:
  """Returns a function from a row to its picture, uint8 [height, width, 3].

  The picture is decoded and resized, now or from what `config.cache_size` has
  stored: the same pixels.
  """
  read = functools.partial(
    _read_picture,
    source,
    side=side,
    mode=config.resize_mode,
    interpolation=config.interpolation,
  )
  if not config.cache_size:
    return read
  info = builder.info
  inputs = {
    'dataset': info.full_name,
    'bytes': int(info.dataset_size),
    'records': _digest(info.metadata['class_names'], info.metadata['labels']),
    'side': side,
    'mode': config.resize_mode,
  }
  # What was stored before there was a choice is bilinear, and stays valid.
  if config.interpolation != 'bilinear':
    inputs['interpolation'] = config.interpolation
  folder = os.path.join(find_data_dir(config.data_dir), 'resized')
  return resized.prepare(folder, inputs, read, len(source)).__getitem__


def _read_picture(source, row, **resize):
  # As every published number: no data set of the papers is turned by EXIF.
  # What image_folder stores is upright already.
  picture = images.decode(source[row]['image'], upright=False)
  return np.asarray(images.resize(picture, **resize))


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
  """Writes the records, unless they are there; half-written ones are removed.

  Raises:
    ValueError: if they cannot be written.
  """
  if os.path.exists(builder.data_path):
    return
  _logger.info('Preparing %s in %s', builder.name, builder.data_path)
  for left in pathlib.Path(builder.data_path).parent.glob('incomplete.*'):
    shutil.rmtree(left)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    # What it prints is said already.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(file_format='array_record')
  except RuntimeError as error:  # Of TFDS and of ArrayRecord's writer.
    raise ValueError(
      f'{builder.name} could not be prepared in {builder.data_path}: {error}'
    ) from error


def _digest(class_names, *arrays) -> str:
  digest = hashlib.sha256('\0'.join(class_names).encode())
  for array in arrays:
    digest.update(np.asarray(array, np.int64).tobytes())
  return digest.hexdigest()[:16]
