"""Annotations of published datasets: read, and compared with the image files.

Annotations are untrusted: every deviation from the files and from the published
counts is collected as a problem.
"""

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence

from proxy_nca_jax.runtime import folders as folders_lib

# Files that operating systems leave in folders and archives, in lower case.
_LITTER = ('thumbs.db', 'desktop.ini', '.ds_store')

# (file or split, what is wrong with it)
Problem = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Example:
  """An annotated image.

  Attributes:
    split: 'train', 'test', 'query' or 'gallery'; '' if the protocol ignores it.
    path: the image file, relative to the root of the dataset.
    class_name: a unique name of its class.
    extra: further features of the record.
  """

  split: str
  path: str
  class_name: str
  extra: Mapping[str, str | int] = dataclasses.field(default_factory=dict)


def read_rows(
  root: str, path: str, fields: Sequence[str], *, skip: int = 0
) -> tuple[list[dict[str, str]], list[Problem]]:
  """Reads a table of words separated by white space.

  Args:
    root: the root of the dataset.
    path: the annotation file, relative to the root.
    fields: the names of the columns; the last takes the rest of a line.
    skip: the number of header lines.

  Returns:
    (rows, problems): a row is {field: word}; a line with too few words is a
    problem; empty lines are ignored.
  """
  rows, problems = [], []
  with open(os.path.join(root, path), encoding='utf-8', errors='replace') as f:
    for number, line in enumerate(f, 1):
      words = line.strip().split(None, len(fields) - 1)
      if number <= skip or not words:
        continue
      if len(words) == len(fields):
        rows.append(dict(zip(fields, words)))
      else:
        problems.append(
          (f'{path}:{number}', f'expected {" ".join(fields)}: {line.strip()!r}')
        )
  return rows, problems


def match_files(
  root: str, examples: Sequence[Example]
) -> tuple[list[Example], list[Problem], list[Problem]]:
  """Compares the annotated paths with the files in their folders.

  A path that differs from a file only in case refers to that file: some copies
  of the archives were made on case-insensitive file systems.

  Returns:
    (matched, problems, unlisted): the examples whose file exists, with its
    exact path; missing files and duplicates; files that no example refers to.
  """
  files = _list_files(root, {os.path.dirname(e.path) for e in examples})
  by_lower_case = {path.lower(): path for path in files}
  matched, problems, seen = [], [], set()
  for example in examples:
    path = example.path
    if path not in files:
      path = by_lower_case.get(path.lower())
    if path is None:
      problems.append((example.path, 'annotated, but missing'))
    elif path in seen:
      problems.append((example.path, 'annotated twice'))
    else:
      seen.add(path)
      matched.append(dataclasses.replace(example, path=path))
  unlisted = [
    (path, 'left by an operating system' if _is_litter(path) else 'unlisted')
    for path in sorted(files - seen)
  ]
  return matched, problems, unlisted


def _list_files(root: str, folders: set[str]) -> set[str]:
  """Returns the paths of the files in some folders and in their parents.

  Folders outside the root, which only forged annotations name, are ignored.
  """
  paths = set()
  for folder in folders | {os.path.dirname(folder) for folder in folders}:
    absolute = os.path.join(root, folder)
    is_normal = folder and os.path.normpath(folder) == folder
    is_inside = is_normal and folder.split(os.sep)[0] not in ('', '..')
    if is_inside and os.path.isdir(absolute):
      with os.scandir(absolute) as entries:
        # A name that is not UTF-8 is in no annotation.
        paths |= {
          folders_lib.escape(os.path.join(folder, e.name))
          for e in entries
          if not e.is_dir()
        }
  return paths


def _is_litter(path: str) -> bool:
  name = os.path.basename(path).lower()
  return name.startswith('._') or name in _LITTER


def group_by_class(examples: Sequence[Example]) -> list[Example]:
  """Makes examples of a class consecutive, in order of first appearance."""
  by_class = collections.defaultdict(list)
  for example in examples:
    by_class[example.class_name].append(example)
  return [example for members in by_class.values() for example in members]


def list_classes(splits: Mapping[str, Sequence[Example]]) -> list[str]:
  """Returns the names of all classes, those of the train split first.

  Raises:
    ValueError: if the train split shares a class with another split.
  """
  names = {
    split: dict.fromkeys(e.class_name for e in examples)
    for split, examples in splits.items()
  }
  train = names.pop('train')
  others = {name: None for part in names.values() for name in part}
  if shared := sorted(train.keys() & others.keys()):
    raise ValueError(
      f'{len(shared)} classes are in train and in {" and ".join(names)}, such '
      f'as {shared[0]!r}: this is not the published split by class.'
    )
  return [*train, *others]


def compare_counts(
  splits: Mapping[str, Sequence[Example]],
  counts: Mapping[str, tuple[int, int]],
) -> list[Problem]:
  """Compares each split with its published (num_images, num_classes)."""
  problems = []
  for split, (num_images, num_classes) in counts.items():
    classes = {example.class_name for example in splits[split]}
    if (len(splits[split]), len(classes)) != (num_images, num_classes):
      problems.append(
        (
          split,
          f'{len(splits[split]):,} images of {len(classes):,} classes, '
          f'expected {num_images:,} of {num_classes:,}',
        )
      )
  return problems
