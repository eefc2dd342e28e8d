"""The user's own images, in one sub-folder per class."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from proxy_nca_jax import images
from proxy_nca_jax.datasets import records
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
  """The files of each class, and how the images are resized."""

  root: str = ''
  classes: Sequence[tuple[str, Sequence[str]]] = ()
  num_train_classes: int | None = None
  num_validation_classes: int = 0
  resize: int = 0
  resize_mode: str = 'square'
  interpolation: str = 'bilinear'


class ImageFolder(records.OrderedBuilder):
  """Images in folders, stored upright, in RGB, and resized without cropping.

  Resizing first and cropping later is the protocol of the papers. It also
  bounds the size of a record.
  """

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.builder_config
    is_square = config.resize_mode == 'square'
    return records.make_info(self, side=config.resize if is_square else None)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'images': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict]]:
    config = self.builder_config
    labels, class_names, skipped = [], [], []
    # The number of classes up to each one that have a readable image.
    num_readable = [0]

    def convert(encoded):
      image = images.resize(
        images.decode(encoded),
        side=config.resize,
        mode=config.resize_mode,
        interpolation=config.interpolation,
      )
      return images.encode_png(image)

    for class_name, files in config.classes:
      num_before = len(labels)
      for name, encoded in records.read_images(config.root, files, convert):
        if isinstance(encoded, ValueError):
          skipped.append([folders.escape(name), str(encoded)])
          continue
        yield (
          len(labels),
          {
            'image': encoded,
            'label': len(class_names),
            'name': folders.escape(name),
          },
        )
        labels.append(len(class_names))
      if len(labels) > num_before:
        class_names.append(folders.escape(class_name))
      else:
        skipped.append(
          [folders.escape(class_name + os.sep), 'no readable image']
        )
      num_readable.append(len(class_names))
    if not labels:
      raise ValueError(
        f'No file in {config.root!r} (config.dataset.root) is a readable '
        f'image; for example, {skipped[0][0]!r}: {skipped[0][1]}.'
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


def make_builder(
  *,
  data_dir: str,
  root: str,
  resize: int,
  resize_mode: str,
  interpolation: str,
) -> tuple[tfds.core.DatasetBuilder, list[list[str]]]:
  """Returns the builder of an image folder, and the files outside of classes.

  A change to any file's name, size, modification or change time makes a new
  dataset. The kernel sets the last one whenever a file is written, so that a
  file that is overwritten with one of the same size and modification time, as
  by `cp -p`, is noticed. Hashing the contents would read every file at each
  start, at 0.7 GB/s and a core.
  The classes are the sub-folders of `root`, with all files below them; hidden
  files are ignored and links to folders followed. Folders `train` and `test`
  hold the classes of the two splits. Beside them, a folder `val`, `valid` or
  `validation` has the validation classes; without `test`, it is the test split.

  Args:
    data_dir: the folder of prepared datasets.
    root: the folder of the images.
    resize: side of the stored images in pixels, as of `images.resize`.
    resize_mode: 'square' or 'shorter', as of `images.resize`.
    interpolation: 'bilinear' or 'bicubic', as of `images.resize`.

  Returns:
    (builder, skipped): skipped has [file, reason] of each file left out.

  Raises:
    ValueError: if the folder is missing or has no sub-folder with a file, if a
      folder cannot be listed, or if the split is unclear.
  """
  if not root:
    raise ValueError(
      'config.dataset.root is empty: set --config.dataset.root=DIR to a folder '
      'with one sub-folder of images per class.'
    )
  if not os.path.isdir(root):
    raise ValueError(
      f'No folder {root!r} (config.dataset.root): name a folder with one '
      'sub-folder of images per class.'
    )
  if resize < 1:
    raise ValueError(
      f'config.dataset.resize ({resize}) must be at least 1 pixel.'
    )
  root = os.path.abspath(root)
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
  status = {
    path: status
    for files, _ in listings.values()
    for path, status in files.items()
  }
  inputs = [root, resize, resize_mode]
  # Datasets made before interpolation was configurable are bilinear, and valid.
  if interpolation != 'bilinear':
    inputs.append(interpolation)
  contents = hashlib.sha256(json.dumps(inputs).encode())
  ordered = sum(classes.values(), [])
  for class_name, names in ordered:
    contents.update(json.dumps(folders.escape(class_name)).encode())
    for name in names:
      row = [
        folders.escape(name),
        status[name].st_size,
        status[name].st_mtime_ns,
        status[name].st_ctime_ns,
      ]
      contents.update(json.dumps(row).encode())
  is_split = 'train' in parts
  contents.update(json.dumps(list(parts)).encode() if is_split else b'')
  config = ImageFolderConfig(
    name=contents.hexdigest()[:16],
    root=root,
    classes=ordered,
    num_train_classes=len(classes['train']) if is_split else None,
    num_validation_classes=len(classes.get('validation', ())),
    resize=resize,
    resize_mode=resize_mode,
    interpolation=interpolation,
  )
  builder = ImageFolder(
    data_dir=data_dir, config=config, file_format='array_record'
  )
  return builder, skipped


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
