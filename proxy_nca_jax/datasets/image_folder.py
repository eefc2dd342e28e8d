"""The user's own images, in one sub-folder per class."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from proxy_nca_jax import images
from proxy_nca_jax.datasets import records

# Files that operating systems leave in folders, in addition to hidden ones.
_LITTER = ('thumbs.db', 'desktop.ini')


@dataclasses.dataclass(kw_only=True)
class ImageFolderConfig(tfds.core.BuilderConfig):
  """The files of each class, and how the images are resized."""

  root: str = ''
  classes: Sequence[tuple[str, Sequence[str]]] = ()
  num_train_classes: int | None = None
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
    num_train_classes = config.num_train_classes

    def convert(encoded):
      image = images.resize(
        images.decode(encoded),
        side=config.resize,
        mode=config.resize_mode,
        interpolation=config.interpolation,
      )
      return images.encode_png(image)

    for number, (class_name, files) in enumerate(config.classes):
      num_before = len(labels)
      for name, encoded in records.read_images(config.root, files, convert):
        if isinstance(encoded, ValueError):
          skipped.append([name, str(encoded)])
          continue
        yield (
          len(labels),
          {
            'image': encoded,
            'label': len(class_names),
            'name': name,
          },
        )
        labels.append(len(class_names))
      if len(labels) > num_before:
        class_names.append(class_name)
      else:
        skipped.append([class_name + os.sep, 'no readable image'])
      if number + 1 == config.num_train_classes:
        num_train_classes = len(class_names)
    if not labels:
      raise ValueError(
        f'No file in {config.root!r} (config.dataset.root) is a readable '
        f'image; for example, {skipped[0][0]!r}: {skipped[0][1]}.'
      )
    self.info.metadata.update(
      labels=labels,
      class_names=class_names,
      num_train_classes=num_train_classes,
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

  A change to any file's name, size or modification time makes a new dataset.

  Args:
    data_dir: the folder of prepared datasets.
    root: the folder whose sub-folders are the classes. If it contains `train`
      and `test`, their sub-folders are the classes of the two splits.
    resize: side of the stored images in pixels, as of `images.resize`.
    resize_mode: 'square' or 'shorter', as of `images.resize`.
    interpolation: 'bilinear' or 'bicubic', as of `images.resize`.

  Returns:
    (builder, skipped): skipped has [file, reason] of each file left out.

  Raises:
    ValueError: if the folder is missing or has no sub-folder with a file.
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
  parts = ['train', 'test']
  if all(os.path.isdir(os.path.join(root, part)) for part in parts):
    train, test = (_list_classes(root, part) for part in parts)
    classes, num_train_classes = train + test, len(train)
  else:
    parts = ['']
    classes, num_train_classes = _list_classes(root, ''), None
  if not classes:
    raise ValueError(
      f'{root!r} (config.dataset.root) has no sub-folder with a file: expected '
      'one sub-folder of images per class.'
    )
  stray = [
    [os.path.join(part, name), 'not in the folder of a class']
    for part in parts
    for name in _files(os.path.join(root, part))
  ]
  inputs = [root, resize, resize_mode]
  # Datasets made before interpolation was configurable are bilinear, and valid.
  if interpolation != 'bilinear':
    inputs.append(interpolation)
  contents = hashlib.sha256(json.dumps(inputs).encode())
  for class_name, names in classes:
    contents.update(json.dumps(class_name).encode())
    for name in names:
      status = os.stat(os.path.join(root, name), follow_symlinks=True)
      row = [name, status.st_size, status.st_mtime_ns]
      contents.update(json.dumps(row).encode())
  config = ImageFolderConfig(
    name=contents.hexdigest()[:16],
    root=root,
    classes=classes,
    num_train_classes=num_train_classes,
    resize=resize,
    resize_mode=resize_mode,
    interpolation=interpolation,
  )
  builder = ImageFolder(
    data_dir=data_dir, config=config, file_format='array_record'
  )
  return builder, stray


def _list_classes(root: str, part: str) -> list[tuple[str, list[str]]]:
  """Returns (class, its files relative to root), both sorted by name."""
  classes = []
  with os.scandir(os.path.join(root, part)) as entries:
    folders = sorted(
      entry.name
      for entry in entries
      if entry.is_dir() and not entry.name.startswith('.')
    )
  for folder in folders:
    top = os.path.join(root, part, folder)
    files = sorted(
      os.path.relpath(os.path.join(where, name), root)
      for where, _, _ in os.walk(top, followlinks=False)
      for name in _files(where)
    )
    if files:
      classes.append((os.path.join(part, folder), files))
  return classes


def _files(folder: str) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(
      entry.name
      for entry in entries
      if not entry.is_dir()
      and not entry.name.startswith('.')
      and entry.name.lower() not in _LITTER
      # A dangling link has no size or time.
      and os.path.exists(entry.path)
    )
