"""The user's own images: a folder, a table, or a Hugging Face dataset."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from proxy_nca_jax import images
from proxy_nca_jax.datasets import huggingface as huggingface_lib
from proxy_nca_jax.datasets import records, tables
from proxy_nca_jax.runtime import folders

# Names of the folder of validation classes, in any case.
_VALIDATION = ('val', 'valid', 'validation')
_SPLITS = ('train', 'test', *_VALIDATION)
# Class names that the log lists.
_MAX_LOGGED = 10

_logger = logging.getLogger(__name__)

# (class, its files relative to the root) of each class
_Classes = list[tuple[str, list[str]]]


@dataclasses.dataclass(kw_only=True)
class ImageFolderConfig(tfds.core.BuilderConfig):
  """The images of each class, and how they are resized.

  Attributes:
    source: the folder, table or dataset, for messages.
    read: returns the bytes of an image.
    classes: (name, images) of each class.
    num_train_classes: the first classes are for training; None splits later.
    num_validation_classes: number of the classes after those.
    resize: side of the stored images in pixels.
    resize_mode: as of `images.resize`.
    interpolation: as of `images.resize`.
    has_queries: whether the images say which of them are queries.
    has_cameras: whether the images have cameras.
  """

  source: str = ''
  read: Callable[[tables.Image], bytes] | None = None
  # Without its text of up to gigabytes, which TFDS logs.
  classes: Sequence[tuple[str, Sequence[tables.Image]]] = dataclasses.field(
    default=(), repr=False
  )
  num_train_classes: int | None = None
  num_validation_classes: int = 0
  resize: int = 0
  resize_mode: str = 'square'
  interpolation: str = 'bilinear'
  has_queries: bool = False
  has_cameras: bool = False


class ImageFolder(records.OrderedBuilder):
  """Images in folders or tables, stored upright, in RGB, and resized.

  Boxes are cropped before, nothing else is. Resizing first and cropping later
  is the protocol of the papers. It also bounds the size of a record.
  """

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.builder_config
    is_square = config.resize_mode == 'square'
    features = {}
    if config.has_queries:
      features['is_query'] = np.bool_
    if config.has_cameras:
      features['camera'] = tfds.features.Text()
    return records.make_info(
      self, side=config.resize if is_square else None, **features
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'images': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict]]:
    config = self.builder_config
    labels, class_names, skipped, queries, cameras = [], [], [], [], []
    # The number of classes up to each one that have a readable image.
    num_readable = [0]
    for class_name, members in config.classes:
      num_before = len(labels)
      for image, encoded in records.read_images(members, self._read):
        name = folders.escape(image.path)
        if isinstance(encoded, _WrongBoxError):
          raise encoded
        if isinstance(encoded, ValueError):
          skipped.append([name, str(encoded)])
          continue
        example = {'image': encoded, 'label': len(class_names), 'name': name}
        if config.has_queries:
          example['is_query'] = image.is_query
        if config.has_cameras:
          example['camera'] = image.camera
        yield len(labels), example
        labels.append(len(class_names))
        queries.append(int(image.is_query))
        cameras.append(image.camera)
      if len(labels) > num_before:
        class_names.append(class_name)
      else:
        skipped.append([class_name + os.sep, 'no readable image'])
      num_readable.append(len(class_names))
    if not labels:
      raise ValueError(
        f'No file in {config.source} is a readable image; for example, '
        f'{skipped[0][0]!r}: {skipped[0][1]}.'
      )
    num_train, num_validation = None, 0
    if config.num_train_classes is not None:
      num_train = num_readable[config.num_train_classes]
      end = config.num_train_classes + config.num_validation_classes
      num_validation = num_readable[end] - num_train
    self.info.metadata.update(
      labels=labels,
      class_names=class_names,
      num_train_classes=num_train,
      num_validation_classes=num_validation,
      skipped=skipped,
    )
    if config.has_queries:
      self.info.metadata['queries'] = queries
    if config.has_cameras:
      ids = {name: i for i, name in enumerate(sorted(set(cameras)))}
      self.info.metadata['cameras'] = [ids[name] for name in cameras]

  def _read(self, image: tables.Image) -> bytes:
    """Returns an image as it is stored.

    Raises:
      ValueError: if it cannot be read, or the box is outside of it.
      OSError: if it cannot be read.
    """
    config = self.builder_config
    decoded = images.decode(config.read(image))
    if image.box:
      _, _, right, bottom = image.box
      if right > decoded.width or bottom > decoded.height:
        raise _WrongBoxError(
          f'{config.source}, {image.where}: the box {image.box} is outside of '
          f'{image.path!r}, of {decoded.width} x {decoded.height} pixels.'
        )
      decoded = decoded.crop(image.box)
    resized = images.resize(
      decoded,
      side=config.resize,
      mode=config.resize_mode,
      interpolation=config.interpolation,
    )
    return images.encode_png(resized)


class _WrongBoxError(ValueError):
  """A box is outside of its image: the table is wrong, not the image."""


def make_builder(
  *,
  data_dir: str,
  root: str,
  table: str,
  huggingface: str,
  image_column: str,
  label_column: str,
  resize: int,
  resize_mode: str,
  interpolation: str,
) -> tuple[tfds.core.DatasetBuilder, list[list[str]]]:
  """Returns the builder of the user's images, and the files outside of classes.

  A change to any file's name, size, modification or change time makes a new
  dataset. The kernel sets the last one whenever a file is written, so that a
  file that is overwritten with one of the same size and modification time, as
  by `cp -p`, is noticed. Hashing the contents would read every file at each
  start, at 0.7 GB/s and a core.

  Args:
    data_dir: the folder of prepared datasets.
    root: the folder of the images; '' is the folder of the table.
    table: the table of the images, as of `tables.read`; '' lists the folder.
    huggingface: the dataset to read instead, as of `huggingface.read`; '' reads
      files.
    image_column: its column of images, as of `huggingface.read`.
    label_column: its column of labels, as of `huggingface.read`.
    resize: side of the stored images in pixels, as of `images.resize`.
    resize_mode: 'square' or 'shorter', as of `images.resize`.
    interpolation: 'bilinear' or 'bicubic', as of `images.resize`.

  Returns:
    (builder, skipped): skipped has [file, reason] of each file left out.

  Raises:
    ValueError: if the folder is missing or has no sub-folder with a file, if a
      folder cannot be listed, if the split is unclear, or if the table or the
      dataset is wrong.
  """
  if resize < 1:
    raise ValueError(
      f'config.dataset.resize ({resize}) must be at least 1 pixel.'
    )
  skipped = []
  if huggingface:
    source = f'{huggingface!r} (config.dataset.huggingface)'
    classes, read, origin = huggingface_lib.read(
      huggingface, image_column=image_column, label_column=label_column
    )
  else:
    root = origin = _find_root(root, table)
    source = table or f'{root!r} (config.dataset.root)'
    read = functools.partial(_read_file, root)
    if table:
      classes = tables.read(table, root)
    else:
      classes, skipped = _list_classes(root)
  if huggingface or table:
    _log_splits(source, classes)
  inputs = [origin, resize, resize_mode]
  # Datasets made before interpolation was configurable are bilinear, and valid.
  if interpolation != 'bilinear':
    inputs.append(interpolation)
  ordered = [item for members in classes.values() for item in members.items()]
  members = [image for _, class_images in ordered for image in class_images]
  config = ImageFolderConfig(
    name=_hash(inputs, classes, is_table=bool(table)),
    source=source,
    read=read,
    classes=ordered,
    num_train_classes=len(classes['train']) if 'train' in classes else None,
    num_validation_classes=len(classes.get('validation', ())),
    resize=resize,
    resize_mode=resize_mode,
    interpolation=interpolation,
    has_queries=any(image.is_query for image in members),
    has_cameras=any(image.camera for image in members),
  )
  builder = ImageFolder(
    data_dir=data_dir, config=config, file_format='array_record'
  )
  return builder, skipped


def _find_root(root: str, table: str) -> str:
  """Returns the absolute path of the folder of the images.

  Raises:
    ValueError: if it is missing.
  """
  if table and not root:
    root = os.path.dirname(table) or os.curdir
  if not root:
    raise ValueError(
      'config.dataset.root is empty: set --config.dataset.root=DIR to a folder '
      'with one sub-folder of images per class, or --config.dataset.table=FILE '
      'to a table of images.'
    )
  if not os.path.isdir(root):
    raise ValueError(
      f'No folder {root!r} (config.dataset.root): name a folder '
      f'{"of images" if table else "with one sub-folder of images per class"}.'
    )
  return os.path.abspath(root)


def _read_file(root: str, image: tables.Image) -> bytes:
  return folders.read_file(os.path.join(root, image.path))


def _hash(inputs: Sequence, classes: tables.Classes, *, is_table: bool) -> str:
  """Returns the name of a dataset: a hash of all that it is made from."""
  contents = hashlib.sha256(json.dumps(inputs).encode())
  for split, members in classes.items():
    for class_name, class_images in members.items():
      contents.update(json.dumps(class_name).encode())
      for image in class_images:
        row = [folders.escape(image.path), *image.version]
        if is_table:
          row += [split, image.is_query, image.camera, image.box]
        contents.update(json.dumps(row).encode())
  if 'train' in classes:
    contents.update(json.dumps(list(classes)).encode())
  return contents.hexdigest()[:16]


def _list_classes(root: str) -> tuple[tables.Classes, list[list[str]]]:
  """Lists the images of a folder by split and class.

  The classes are the sub-folders of `root`, with all files below them; hidden
  files are ignored and links to folders followed. Folders `train` and `test`
  hold the classes of the two splits. Beside them, a folder `val`, `valid` or
  `validation` has the validation classes; without `test`, it is the test split.

  Returns:
    (classes, skipped): skipped has [file, reason] of each file left out.
  """
  parts = _find_splits(root)
  listings = {split: _list_folder(root, part) for split, part in parts.items()}
  classes = {
    split: _group_by_class(parts[split], files)
    for split, (files, _) in listings.items()
  }
  if not any(classes.values()):
    raise ValueError(
      f'{root!r} (config.dataset.root) has no sub-folder with a file: expected '
      'one sub-folder of images per class.'
    )
  _log_classes(root, parts, classes)
  skipped = _find_other_folders(root, parts)
  for _, reasons in listings.values():
    skipped += [[folders.escape(path), why] for path, why in reasons.items()]
  by_split = {
    split: {
      folders.escape(name): [
        tables.Image(path, tables.version(listings[split][0][path]))
        for path in paths
      ]
      for name, paths in members
    }
    for split, members in classes.items()
  }
  return by_split, skipped


def _sub_folders(folder: str) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(
      entry.name
      for entry in entries
      if entry.is_dir() and not entry.name.startswith('.')
    )


def _find_splits(root: str) -> dict[str, str]:
  """Returns the folder of each split, in the order of their records.

  Returns:
    {'train': folder, 'validation': folder, 'test': folder}, without validation
    if there are two folders; {'': ''} if all sub-folders are classes.

  Raises:
    ValueError: if the folder cannot be listed, or the split is unclear.
  """
  try:
    names = _sub_folders(root)
  except OSError as error:
    raise ValueError(
      f'{root!r} (config.dataset.root) cannot be listed: {error.strerror}.'
    ) from error
  found = {name: name.lower() for name in names if name.lower() in _SPLITS}
  by_split = {}
  for name, split in found.items():
    split = 'validation' if split in _VALIDATION else split
    by_split.setdefault(split, []).append(name)
  is_unclear = any(len(names) > 1 for names in by_split.values())
  if 'train' in by_split and len(by_split) > 1 and not is_unclear:
    splits = {split: name for split, (name,) in by_split.items()}
    if 'test' not in splits:
      return {'train': splits['train'], 'test': splits['validation']}
    order = ('train', 'validation', 'test')
    return {split: splits[split] for split in order if split in splits}
  if found and (is_unclear or len(found) == len(names)):
    raise ValueError(
      f'{root!r} (config.dataset.root) has the folders {", ".join(found)}, '
      'which are named as splits: expected train and test, optionally with '
      'one of val, valid and validation; or one sub-folder per class.'
    )
  return {'': ''}


def _list_folder(
  root: str, part: str
) -> tuple[dict[str, os.stat_result], dict[str, str]]:
  """Lists the files of classes in a folder.

  Args:
    root: the folder of the images.
    part: a folder of classes in it; '' for the root itself.

  Returns:
    (files, skipped): {path: status} of files in class folders, and {path:
    reason} of all others, relative to root.

  Raises:
    ValueError: if a folder, or what may be one, cannot be listed.
  """
  listing = folders.list_files(os.path.join(root, part))
  missing = listing.unlisted | {
    path: reason
    for path, reason in listing.unreachable.items()
    if os.sep not in path
  }
  if missing:
    raise ValueError(
      f'{folders.describe(missing)} in {os.path.join(root, part)!r} '
      '(config.dataset.root) cannot be listed, and may be a class: make it '
      'readable, or move it away.'
    )
  files, skipped = {}, listing.skipped | listing.unreachable
  for path, status in listing.files.items():
    if os.sep in path:
      files[path] = status
    else:
      skipped[path] = 'not in the folder of a class'
  with_files = {path.split(os.sep)[0] for path in files}
  for name in set(_sub_folders(os.path.join(root, part))) - with_files:
    # Such as the place of a disk that is not mounted.
    skipped.setdefault(name, 'a folder without files')

  def from_root(by_path):
    return {os.path.join(part, path): x for path, x in by_path.items()}

  return from_root(files), from_root(skipped)


def _group_by_class(part: str, files: Sequence[str]) -> _Classes:
  """Returns the classes of files relative to the root, sorted by name."""
  depth = 2 if part else 1
  classes = {}
  for path in files:
    name = os.sep.join(path.split(os.sep)[:depth])
    classes.setdefault(name, []).append(path)
  return sorted(classes.items())


def _find_other_folders(root: str, parts: Mapping[str, str]) -> list[list[str]]:
  """Returns [path, reason] of what is beside the folders of the splits."""
  if '' in parts:
    return []
  with os.scandir(root) as entries:
    return sorted(
      [folders.escape(entry.name), f'not in {" or ".join(parts.values())}']
      for entry in entries
      if entry.name not in parts.values() and not entry.name.startswith('.')
    )


def _log_splits(source: str, classes: tables.Classes) -> None:
  """Logs the numbers of images and classes."""
  for split, members in classes.items():
    _logger.info(
      '%s: %d images of %d classes%s',
      source,
      sum(map(len, members.values())),
      len(members),
      f' in the {split} split' if split else '',
    )


def _log_classes(
  root: str, parts: Mapping[str, str], classes: Mapping[str, _Classes]
) -> None:
  """Logs which folders are splits and classes, and which are merged."""
  for split, part in parts.items():
    names = [folders.escape(name) for name, _ in classes[split]]
    more = ', ...' if len(names) > _MAX_LOGGED else ''
    _logger.info(
      '%d class folders%s: %s%s',
      len(names),
      f' in {part}, the {split} split' if part else '',
      ', '.join(names[:_MAX_LOGGED]),
      more,
    )
  deepest = max(
    (
      os.path.relpath(path, name)
      for members in classes.values()
      for name, paths in members
      for path in paths
    ),
    key=lambda path: path.count(os.sep),
  )
  if num_levels := deepest.count(os.sep):
    _logger.warning(
      'A class is a folder of the first level: up to %d levels of sub-folders '
      'are merged into it, as by %s.',
      num_levels,
      folders.escape(deepest),
    )
