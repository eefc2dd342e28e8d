"""Prepares a data set once and splits it by class."""

import dataclasses
import hashlib
import inspect
import logging
import os
import pathlib
import shutil
from collections.abc import Sequence

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from proxy_nca_jax import locks
from proxy_nca_jax.datasets import glyphs, image_folder

DATASETS = {
  'glyphs': glyphs.make_builder,
  'image_folder': image_folder.make_builder,
}

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Split:
  """Records of some classes, read by index.

  `split[i]` is {'image': PNG bytes, 'label': int, 'name': str}.

  Attributes:
    source: random access to the records of the whole data set.
    rows: int64 [num_records], the split's records in `source`.
    labels: int32 [num_records], in [0, num_classes).
    class_names: the names of the classes.
  """

  source: Sequence[dict]
  rows: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict:
    record = self.source[int(self.rows[index])]
    return {
      'image': record['image'],
      'label': self.labels[index],
      'name': record['name'].decode(),
    }


@dataclasses.dataclass(frozen=True)
class Datasets:
  """The two splits, what was left out, and a digest of it all.

  Attributes:
    train: the records to learn from.
    test: the records to measure on.
    skipped: (file, reason) of what could not be read.
    num_shared_classes: classes of the test split that training sees too; 0
      but where a user's own train and test folders share names.
    digest: of the records' number, labels and classes, and of the split.
  """

  train: Split
  test: Split
  skipped: tuple[tuple[str, str], ...]
  num_shared_classes: int
  digest: str


def load(config: ml_collections.ConfigDict) -> Datasets:
  """Prepares `config.dataset` unless it is prepared, and splits it by class.

  Raises:
    ValueError: if the data set is unknown, missing or too small for the split.
  """
  config = config.dataset
  if config.name not in DATASETS:
    raise ValueError(
      f'Unknown data set {config.name!r} (config.dataset.name): choose one of '
      f'{", ".join(sorted(DATASETS))}.'
    )
  data_dir = os.path.expanduser(config.data_dir) or str(
    tfds.core.constants.DATA_DIR
  )
  make_builder = DATASETS[config.name]
  fields = set(inspect.signature(make_builder).parameters) - {'data_dir'}
  builder, skipped = make_builder(
    data_dir=data_dir, **{field: config[field] for field in fields}
  )
  os.makedirs(os.path.join(data_dir, config.name), exist_ok=True)
  # Two runs that need the same data set prepare it once.
  with locks.hold(os.path.join(data_dir, config.name, 'lock')):
    _prepare(builder)
  metadata = builder.info.metadata
  skipped = [*skipped, *metadata.get('skipped', ())]
  labels = np.asarray(metadata['labels'], np.int32)
  class_names = metadata['class_names']
  train_classes, test_classes = split_classes(
    len(class_names),
    num_train_classes=metadata.get('num_train_classes'),
    num_classes=config.num_classes,
    test_fraction=config.test_fraction,
    seed=config.split_seed,
  )
  source = builder.as_data_source(
    split='images', decoders={'image': tfds.decode.SkipDecoding()}
  )
  splits = [
    _make_split(source, labels, class_names, classes)
    for classes in (train_classes, test_classes)
  ]
  train_names, test_names = (
    {os.path.basename(name) for name in split.class_names} for split in splits
  )
  return Datasets(
    *splits,
    skipped=tuple((name, reason) for name, reason in skipped),
    num_shared_classes=len(train_names & test_names),
    digest=_digest(class_names, labels, train_classes, test_classes),
  )


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
  try:
    builder.download_and_prepare(file_format='array_record')
  except RuntimeError as error:  # Of TFDS and of ArrayRecord's writer.
    raise ValueError(
      f'{builder.name} could not be prepared in {builder.data_path}: {error}'
    ) from error


def split_classes(
    total: int,
    *,
    num_train_classes: int | None,
    num_classes: int,
    test_fraction: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Divides the classes [0, total) into those to learn and those to measure.

  Args:
    total: classes of the data set.
    num_train_classes: the first so many are the train classes; None divides
      by `seed` and `test_fraction`.
    num_classes: use only so many of the classes, chosen by `seed`; 0 uses all.
    test_fraction: in (0, 1).
    seed: of the division.

  Returns:
    (train, test): int64, ascending, disjoint.

  Raises:
    ValueError: if there are too few classes for the request.
  """
  if num_classes > total or num_classes < 0:
    raise ValueError(
      f'{num_classes} classes were asked for (config.dataset.num_classes) and '
      f'the data set has {total}: ask for at most as many, or 0 for all.'
    )
  if not 0 < test_fraction < 1:
    raise ValueError(
      f'config.dataset.test_fraction ({test_fraction}) must be between 0 and 1.'
    )
  order = np.random.default_rng(seed).permutation(total)
  order = order[: num_classes or total]
  if num_train_classes is None:
    num_test = round(len(order) * test_fraction)
    test, train = order[:num_test], order[num_test:]
  else:
    train, test = order[order < num_train_classes], order[
      order >= num_train_classes
    ]
  if len(train) < 2 or len(test) < 2:
    raise ValueError(
      f'The split leaves {len(train)} train and {len(test)} test classes of '
      f'{total}, and each needs at least 2: add classes, or change '
      'config.dataset.num_classes or test_fraction.'
    )
  return np.sort(train), np.sort(test)


def _make_split(source, labels, class_names, classes):
  rows = np.flatnonzero(np.isin(labels, classes))
  return Split(
    source=source,
    rows=rows,
    labels=np.searchsorted(classes, labels[rows]).astype(np.int32),
    class_names=tuple(class_names[c] for c in classes),
  )


def _digest(class_names, *arrays) -> str:
  digest = hashlib.sha256('\0'.join(class_names).encode())
  for array in arrays:
    digest.update(np.asarray(array, np.int64).tobytes())
  return digest.hexdigest()[:16]
