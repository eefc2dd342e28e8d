"""Datasets of Hugging Face, read with the library `datasets`."""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence

from proxy_nca_jax.datasets import tables
from proxy_nca_jax.runtime import errors, folders

# Files that `save_to_disk` writes.
_MARKERS = ('dataset_dict.json', 'state.json')
_SPLITS = ('train', 'validation', 'valid', 'val', 'test')
# Types of columns; those of the first line that a dataset has are considered.
_TYPES = {
  'image': (('Image',),),
  'label': (('ClassLabel',), ('string', 'large_string')),
}


def read(
  name: str, *, image_column: str, label_column: str
) -> tuple[tables.Classes, Callable[[tables.Image], bytes], list]:
  """Reads a dataset of images and labels.

  Args:
    name: a folder that `save_to_disk` wrote or `load_dataset` reads, or a name
      on the Hub or in the local cache.
    image_column: the column of images; '' finds it by its type.
    label_column: the column of labels; '' finds it by its type.

  Returns:
    (classes, read, versions): the images as of `tables.read`, whose paths are
    the split and the row; a function that returns the bytes of an image; and
    the names, sizes and times of the files that hold the dataset.

  Raises:
    ValueError: if it cannot be loaded, or a column or a split is unclear.
  """
  if not importlib.util.find_spec('datasets'):
    raise ValueError(
      f'{name!r} (config.dataset.huggingface) needs the library datasets: '
      'pip install datasets.'
    )
  parts = _load(name)
  splits = _name_splits(name, list(parts))
  features = next(iter(parts.values())).features
  image_column = _find_column(name, features, 'image', image_column)
  label_column = _find_column(name, features, 'label', label_column)
  images, classes, versions = {}, {}, []
  for part, split in splits.items():
    images[part] = _undecoded(parts[part], image_column)
    members = classes.setdefault(split, {})
    width = len(str(len(parts[part])))
    labels = _read_labels(
      parts[part], label_column, where=f'{name!r}, split {part!r}'
    )
    for row, label in enumerate(labels):
      image = tables.Image(f'{part}/{row:0{width}}', ())
      members.setdefault(label, []).append(image)
    for file in parts[part].cache_files:
      path = file['filename']
      versions.append([part, path, *tables.version(os.stat(path))])

  def read_image(image):
    part, row = image.path.rsplit('/', 1)
    value = images[part][int(row)][image_column]
    if value and value['bytes'] is not None:
      return value['bytes']
    if not (value and value['path']):
      raise ValueError('there is no image in this row')
    return folders.read_file(value['path'])

  versions += [image_column, label_column]
  return tables.arrange(classes), read_image, versions


def _load(name: str) -> dict:
  """Returns {split: dataset}; a dataset without splits has the name 'all'."""
  import datasets

  if not sys.stderr.isatty():
    datasets.disable_progress_bars()
  is_saved = any(os.path.exists(os.path.join(name, x)) for x in _MARKERS)
  try:
    # In memory, it would have no files by which a change is noticed.
    load = datasets.load_from_disk if is_saved else datasets.load_dataset
    loaded = load(name, keep_in_memory=False)
  except Exception as error:  # The library raises many types.
    raise ValueError(
      f'{name!r} (config.dataset.huggingface) cannot be loaded: '
      f'{errors.one_line(error)}'
    ) from error
  return {'all': loaded} if isinstance(loaded, datasets.Dataset) else loaded


def _name_splits(name: str, parts: Sequence[str]) -> dict[str, str]:
  """Returns {its name: 'train', 'validation' or 'test'}; '' is split later."""
  if len(parts) == 1:
    return {parts[0]: ''}
  splits = {
    part: tables.SPLITS[part.lower()][0]
    for part in parts
    if part.lower() in _SPLITS
  }
  found = list(splits.values())
  if len(splits) < len(parts) or len(set(found)) < 2 or 'train' not in found:
    raise ValueError(
      f'{name!r} (config.dataset.huggingface) has the splits '
      f'{", ".join(parts)}; expected train and test, optionally validation, or '
      'a single one.'
    )
  return splits


def _find_column(name: str, features, kind: str, column: str) -> str:
  """Returns the column of images or labels.

  Args:
    name: of the dataset, for messages.
    features: {column: type}, as of `datasets.Features`.
    kind: 'image' or 'label'.
    column: what the user has set; '' finds the column by its type.
  """
  types = {
    key: getattr(value, 'dtype', '')
    if type(value).__name__ == 'Value'
    else type(value).__name__
    for key, value in features.items()
  }
  field = f'config.dataset.{kind}_column'
  if column in types:
    return column
  for names in () if column else _TYPES[kind]:
    found = [key for key, value in types.items() if value in names]
    if len(found) == 1:
      return found[0]
    if found:
      raise ValueError(
        f'{name!r} has {len(found)} columns that may be the {kind}: set '
        f'--{field} to one of {", ".join(found)}.'
      )
  raise ValueError(
    f'{name!r} has no {kind} column{f" {column!r}" if column else ""}: set '
    f'--{field} to one of '
    f'{", ".join(f"{key} ({value})" for key, value in types.items())}.'
  )


def _undecoded(dataset, column: str):
  """Returns a dataset of the encoded images only."""
  import datasets

  images = dataset.select_columns([column]).with_format(None)
  try:
    return images.cast_column(column, datasets.Image(decode=False))
  except Exception as error:  # Of PyArrow.
    raise ValueError(
      f'The column {column!r} (config.dataset.image_column) holds no images: '
      f'{errors.one_line(error)}'
    ) from error


def _read_labels(dataset, column: str, *, where: str) -> list[str]:
  """Returns the label of each row as text.

  Raises:
    ValueError: if a row has none; names the row, and `where` it is.
  """
  dataset = dataset.select_columns([column]).with_format(None)
  values, feature = dataset[:][column], dataset.features[column]
  names = getattr(feature, 'names', None)
  labels = []
  for row, value in enumerate(values):
    if names and value is not None:
      value = names[value] if 0 <= value < len(names) else None
    label = '' if value is None else str(value).strip()
    if not label:
      raise ValueError(f'{where}, row {row}: the label ({column}) is empty.')
    labels.append(label)
  return labels
