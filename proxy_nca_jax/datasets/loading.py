"""Loads the datasets of a run: prepared records, resized and split by class."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from proxy_nca_jax import images as images_lib
from proxy_nca_jax.datasets import (
  class_splits,
  embeddings,
  preparation,
  records,
  resized,
  splits,
)
from proxy_nca_jax.runtime import folders

_logger = logging.getLogger(__name__)

# Stored splits, in the order of their records in the source.
_STORED_SPLITS = ('images', 'train', 'test', 'query', 'gallery')


def load(config: ml_collections.ConfigDict) -> splits.Datasets:
  """Loads `config.dataset`: prepares it if necessary and splits it by class.

  Raises:
    ValueError: if the dataset is unknown, unavailable or too small for the
      split, or its fields contradict each other.
  """
  config = config.dataset
  if config.name == embeddings.NAME:
    source, metadata = embeddings.open_dataset(
      data_dir=config.data_dir, root=config.root
    )
    train_images = eval_images = source.__getitem__
    stored_splits, skipped = np.repeat('images', len(source)), ()
  else:
    builder, skipped = preparation.prepare(config)
    metadata = builder.info.metadata
    source, stored_splits = _open_records(builder)
    eval_images = make_read_image(builder, source, config, side=config.resize)
    train_images = eval_images
    if config.crop == 'random_resized' and not is_resized_source(config):
      # The recipe crops from the original images.
      train_images = make_read_image(builder, source, config, side=0)

  train_classes, validation_classes, test_classes = _split_classes(
    config, metadata
  )
  make_split = functools.partial(
    _make_split, source, stored_splits=stored_splits, metadata=metadata
  )
  train = make_split(train_images, train_classes)
  test = make_split(eval_images, test_classes)
  validation = seen = None
  if config.validation:
    validation = make_split(eval_images, validation_classes)
  if 'queries' in metadata:
    _check_queries(test)
  if config.long_tail:
    train, seen = _split_long_tail(
      config, train, make_split(eval_images, train_classes)
    )
  digest = _digest(
    metadata,
    train_classes,
    validation_classes,
    test_classes,
    *(() if seen is None else (train.rows, seen.rows)),
  )
  return splits.Datasets(
    train=train,
    validation=validation,
    test=test,
    seen=seen,
    skipped=tuple((name, reason) for name, reason in skipped),
    num_shared_classes=_count_shared_names(train, test, config),
    is_resized_source=is_resized_source(config),
    digest=digest,
    records_digest=_digest(metadata),
  )


def find_files(
  config: ml_collections.ConfigDict,
) -> tuple[list[str], str] | None:
  """Finds the records of an image folder, without reading them.

  Args:
    config: `dataset` of a run's config.

  Returns:
    The escaped path of each record in the folder, in their order, and the
    digest of all records, as `Datasets.records_digest`; None if the dataset is
    not an image folder, or not prepared from its files as they are now.
  """
  if config.name != 'image_folder' or config.table or config.huggingface:
    return None
  builder = preparation.find_prepared(config)
  if builder is None:
    return None
  metadata = builder.info.metadata
  skipped = {name for name, _ in metadata['skipped']}
  names = [
    folders.escape(image.path)
    for _, members in builder.builder_config.classes
    for image in members
  ]
  return [name for name in names if name not in skipped], _digest(metadata)


def is_resized_source(config: ml_collections.ConfigDict) -> bool:
  """Whether the recipe crops original images but only resized ones are stored.

  Args:
    config: `dataset` of a run's config.
  """
  is_resized = bool(config.cache_size) or config.name == 'image_folder'
  return config.crop == 'random_resized' and is_resized


def _open_records(
  builder: tfds.core.DatasetBuilder,
) -> tuple[records.StoredRecords, np.ndarray]:
  """Opens the records of all stored splits as one source.

  Returns:
    (source, stored_splits): stored_splits has the name of the stored split of
    each record, [num_records].
  """
  infos = builder.info.splits
  names = [name for name in _STORED_SPLITS if name in infos]
  return (
    records.StoredRecords(builder, names),
    np.repeat(names, [infos[name].num_examples for name in names]),
  )


def make_read_image(
  builder: tfds.core.DatasetBuilder,
  source: Sequence[dict],
  config: ml_collections.ConfigDict,
  *,
  side: int,
) -> Callable[[int], np.ndarray]:
  """Makes the function that reads a record's image, decoded and resized.

  With `config.dataset.cache_size`, images are decoded and resized once and then
  read from a file; the pixels are the same.

  Args:
    builder: the prepared dataset.
    source: its records.
    config: the config of the dataset.
    side: as of `images.resize`; 0 keeps the original size.

  Returns:
    A function that maps an index of `source` to uint8 [height, width, 3].
  """
  read = functools.partial(
    _read_image,
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
    'records': _digest(info.metadata),
    'side': side,
    'mode': config.resize_mode,
  }
  # Caches made before interpolation was configurable are bilinear, and valid.
  if config.interpolation != 'bilinear':
    inputs['interpolation'] = config.interpolation
  data_dir = preparation.find_data_dir(config.data_dir)
  cached = resized.load_or_write(
    os.path.join(data_dir, 'resized'), inputs, read, len(source)
  )
  return cached.__getitem__


def _read_image(source: Sequence[dict], row: int, **resize) -> np.ndarray:
  # EXIF rotation is ignored, as in the code behind all published numbers.
  # Images of image_folder were rotated when they were stored.
  record = source[row]
  try:
    image = images_lib.decode(record['image'], upright=False)
    return np.asarray(images_lib.resize(image, **resize))
  except ValueError as error:
    name = record['name'].decode()
    raise ValueError(
      f'The image of {name!r} cannot be read: {error}'
    ) from error


def _split_classes(
  config: ml_collections.ConfigDict, metadata: Mapping
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the train, validation and test classes, int64 and ascending."""
  train, test = class_splits.split_classes(
    len(metadata['class_names']),
    num_train_classes=metadata.get('num_train_classes'),
    num_classes=config.num_classes,
    test_fraction=config.test_fraction,
    seed=config.split_seed,
  )
  # Validation classes of the data are stored between the two splits.
  num_between = metadata.get('num_validation_classes', 0)
  if num_between:
    is_between = test < metadata['num_train_classes'] + num_between
    between, test = test[is_between], test[~is_between]
  if config.validation == class_splits.FOLDER and not num_between:
    raise ValueError(
      f'config.dataset.validation={class_splits.FOLDER} needs an image '
      'folder with train, test, and one of val, valid and validation, or a '
      'table whose column split has these.'
    )
  if config.validation == class_splits.COLUMN and not num_between:
    raise ValueError(
      f'config.dataset.validation={class_splits.COLUMN} needs vectors with a '
      'split of train, validation and test.'
    )
  if config.validation in class_splits.STORED.values():
    validation = between
  else:
    if num_between:
      _logger.warning(
        'The %d validation classes of the dataset are not used: '
        'config.dataset.validation=%s selects a checkpoint by them.',
        num_between,
        class_splits.STORED[config.name],
      )
    train, validation = class_splits.split_validation(train, config.validation)
  sizes = {'test': len(test), 'validation': len(validation)}
  for name, size in sizes.items():
    if size == 1 or (size == 0 and name == 'test'):
      raise ValueError(
        f'The {name} split has {size} classes, but needs at least 2.'
      )
  train = class_splits.choose_classes(
    train, config.num_train_classes, seed=config.split_seed
  )
  return train, validation, test


def _make_split(
  source: records.StoredRecords,
  images: Callable[[int], np.ndarray],
  classes: np.ndarray,
  *,
  stored_splits: np.ndarray,
  metadata: Mapping,
) -> splits.Split:
  """Returns the split of all records of some classes, int64 and ascending."""
  labels = np.asarray(metadata['labels'], np.int32)
  rows = np.flatnonzero(np.isin(labels, classes))
  if 'queries' in metadata:
    is_query = np.asarray(metadata['queries'], bool)[rows]
  else:
    is_query = stored_splits[rows] == 'query'
  cameras = metadata.get('cameras')
  return splits.Split(
    source=source,
    images=images,
    rows=rows,
    labels=np.searchsorted(classes, labels[rows]).astype(np.int32),
    class_names=tuple(metadata['class_names'][c] for c in classes),
    is_query=is_query if np.any(is_query) else None,
    cameras=np.asarray(cameras, np.int32)[rows] if cameras else None,
  )


def _check_queries(test: splits.Split) -> None:
  """Raises ValueError if the test images are all queries, or none is."""
  if test.is_query is None or np.all(test.is_query):
    missing = 'query' if test.is_query is None else 'gallery image'
    raise ValueError(
      f'The test split has no {missing} among its {len(test)} images: mark '
      'queries of more classes, set config.dataset.split_seed to another '
      'split, or define the split by the column split of the table.'
    )


def _split_long_tail(
  config: ml_collections.ConfigDict,
  train: splits.Split,
  evaluated: splits.Split,
) -> tuple[splits.Split, splits.Split]:
  """Makes a train split long-tailed and holds out records of its classes.

  Args:
    config: the config of the dataset.
    train: the train split with the images for training.
    evaluated: the same records with the images for evaluation.

  Returns:
    (train, seen), as in `splits.Datasets`.
  """
  learned, held_out = class_splits.make_long_tailed(
    train.labels, config.long_tail, seed=config.split_seed
  )
  both = np.sort(np.concatenate([learned, held_out]))
  seen = dataclasses.replace(
    evaluated.subset(both), is_query=np.isin(both, held_out)
  )
  return train.subset(learned), seen


def _count_shared_names(
  train: splits.Split, test: splits.Split, config: ml_collections.ConfigDict
) -> int:
  # In a folder, train/a and test/a share a name; elsewhere, a label is one.
  is_folder = not (
    config.table or config.huggingface or config.name == embeddings.NAME
  )
  name = os.path.basename if is_folder else str
  return len(
    set(map(name, train.class_names)) & set(map(name, test.class_names))
  )


def _digest(metadata: Mapping, *arrays) -> str:
  """Hashes the records and class names of a dataset, and arrays of integers."""
  digest = hashlib.sha256(metadata['digest'].encode())
  digest.update(json.dumps(metadata['class_names']).encode())
  for array in arrays:
    digest.update(b'\0')
    digest.update(np.asarray(array, np.int64).tobytes())
  return digest.hexdigest()[:16]
