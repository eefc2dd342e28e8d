"""What the papers' data sets have in common: found, checked, counted, stored.

Each is published as archives of pictures and annotations. Its builder says
which files these are, how to read the annotations, and how many pictures and
classes there must be; the rest is here. Neither archives nor annotations are
trusted.
"""

import abc
import collections
import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from proxy_nca_jax import images
from proxy_nca_jax.datasets import archives, downloads, records

_logger = logging.getLogger(__name__)

# What operating systems leave in folders and archives, in lower case.
_LITTER = ('thumbs.db', 'desktop.ini', '.ds_store')


# A name, and what is wrong with it.
Problem = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Example:
  """A line of the annotations.

  Attributes:
    split: 'train', 'test', 'query' or 'gallery'; '' for what the protocol
      leaves out.
    path: of the picture, relative to the root of the data set.
    class_name: what distinguishes the class.
    extra: the other features of the record.
  """

  split: str
  path: str
  class_name: str
  extra: Mapping[str, str | int] = dataclasses.field(default_factory=dict)


class PublishedBuilder(records.OrderedBuilder):
  """A data set of the papers; subclasses say what is below.

  Attributes:
    homepage: where people find the files.
    files: sets of files, any of which is the whole; the preferred one first.
    markers: sets of paths, any of which tells the root of an extracted copy.
    counts: {split: (pictures, classes)} as the papers have them.
    features: of a record, beside image, label and name.
    manual_dir: the user's archives or extracted folders, or ''.
    downloads: where downloads go; files that lie there are taken as well.
    allow_incomplete: whether problems are only reported.
  """

  homepage: str
  files: Sequence[Sequence[downloads.RemoteFile]]
  markers: Sequence[Sequence[str]]
  counts: Mapping[str, tuple[int, int]]
  features: Mapping[str, object] = {}
  manual_dir: str
  downloads: str
  allow_incomplete: bool

  @abc.abstractmethod
  def read_annotations(self, root: str) -> tuple[list[Example], list[Problem]]:
    """Returns the examples in their order, and what is wrong with the rest."""

  def _info(self) -> tfds.core.DatasetInfo:
    return records.make_info(self, side=None, **self.features)

  def _download_and_prepare(self, dl_manager, download_config) -> None:
    self._staging = os.path.join(self.downloads, f'{self.name}.extracted')
    try:
      super()._download_and_prepare(dl_manager, download_config)
    finally:
      shutil.rmtree(self._staging, ignore_errors=True)

  def _split_generators(self, dl_manager):
    del dl_manager
    root = self._find_root()
    examples, problems = self.read_annotations(root)
    examples, missing, unlisted = _compare_with_files(root, examples)
    splits = {
      split: _in_class_order([e for e in examples if e.split == split])
      for split in self.counts
    }
    problems = [*problems, *missing, *_compare_counts(splits, self.counts)]
    self._check(problems)
    class_names = _class_names(splits)
    self.info.metadata.update(
      class_names=class_names,
      num_train_classes=len({e.class_name for e in splits['train']}),
      labels=[],
      skipped=[*unlisted, *problems],
    )
    if 'camera' in self.features:
      self.info.metadata['cameras'] = []
    numbers = {name: number for number, name in enumerate(class_names)}
    return {
      split: self._generate_examples(root, examples, numbers)
      for split, examples in splits.items()
    }

  def _generate_examples(
    self, root: str, examples: Sequence[Example], numbers: Mapping[str, int]
  ) -> Iterator[tuple[int, dict]]:
    metadata, broken = self.info.metadata, []
    names = [example.path for example in examples]
    for example, (name, encoded) in zip(
      examples, records.read_pictures(root, names, _check_picture)
    ):
      if isinstance(encoded, ValueError):
        broken.append((name, str(encoded)))
        continue
      label = numbers[example.class_name]
      yield (
        len(metadata['labels']),
        {'image': encoded, 'label': label, 'name': name, **example.extra},
      )
      metadata['labels'].append(label)
      if 'camera' in self.features:
        metadata['cameras'].append(example.extra['camera'])
    self._check(broken)
    metadata['skipped'].extend(broken)

  def _check(self, problems: Sequence[Problem]) -> None:
    """Logs all problems, and raises ValueError unless they are allowed."""
    for name, reason in problems:
      _logger.warning('%s: %s: %s', self.name, name, reason)
    if problems and not self.allow_incomplete:
      first = '; '.join(f'{name}: {reason}' for name, reason in problems[:5])
      more = f'; and {len(problems) - 5} more' if len(problems) > 5 else ''
      raise ValueError(
        f'{self.name} is not as published (the log names every problem): '
        f'{first}{more}. Get it anew from {self.homepage}, or set '
        'config.dataset.allow_incomplete=True to go on with what is there.'
      )

  def _find_root(self) -> str:
    """Returns the folder of the extracted data set, extracting if need be.

    Raises:
      ValueError: if the files are nowhere, or hold something else.
    """
    if self.manual_dir and not os.path.isdir(self.manual_dir):
      raise ValueError(
        f'No folder {self.manual_dir!r} (config.dataset.manual_dir): name the '
        f'folder that holds {self.describe_files()}.'
      )
    os.makedirs(self.downloads, exist_ok=True)
    if self.manual_dir and (root := self._find_markers(self.manual_dir)):
      return root
    paths = self._find_archives()
    _logger.info('Extracting %s', ', '.join(paths))
    shutil.rmtree(self._staging, ignore_errors=True)
    archives.extract(paths, self._staging)
    if root := self._find_markers(self._staging):
      return root
    raise ValueError(
      f'{", ".join(paths)}: {" and ".join(self.markers[0])} are not in it. '
      f'Expected {self.name} as published at {self.homepage}.'
    )

  def is_at_hand(self) -> bool:
    """Whether the data set can be prepared without a download."""
    if self.manual_dir and self._find_markers(self.manual_dir):
      return True
    return any(all(map(self._find_file, files)) for files in self.files)

  def _find_markers(self, folder: str) -> str | None:
    roots = (archives.find_root(folder, paths) for paths in self.markers)
    return next(filter(None, roots), None)

  def _find_archives(self) -> list[str]:
    """Finds one set of files, or downloads what is missing of one."""
    found = [list(map(self._find_file, files)) for files in self.files]
    for paths in found:
      if all(paths):
        return paths
    reasons = []
    for files, paths in zip(self.files, found):
      try:
        return [
          path or downloads.fetch(file, self.downloads)
          for file, path in zip(files, paths)
        ]
      except ValueError as error:
        reasons += str(error).splitlines()
    raise ValueError(
      f'{self.name} is not prepared, and its files are not at hand: put '
      f'{self.describe_files()} into '
      f'{os.path.abspath(self.manual_dir or self.downloads)} and start again. '
      f'People find them at {self.homepage}. ({"; ".join(reasons)})'
    )

  def _find_file(self, file: downloads.RemoteFile) -> str | None:
    """Looks for a file under the names that its copies have."""
    stem = file.name.split('.')[0]
    names = [file.name]
    if file.name.endswith(('.tgz', '.zip')):
      names += [stem + s for s in ('.tgz', '.tar.gz', '.tar', '.zip')]
    for folder in filter(None, (self.manual_dir, self.downloads)):
      if path := archives.find_file(folder, names):
        if file.size not in (None, os.path.getsize(path)):
          _logger.warning(
            '%s has %d bytes, and the published %s %d.',
            path,
            os.path.getsize(path),
            file.name,
            file.size,
          )
        return path
    return None

  def describe_files(self) -> str:
    """Names each file with its size and checksum."""
    return ', or '.join(
      ' and '.join(map(_describe_file, files)) for files in self.files
    )


def _describe_file(file: downloads.RemoteFile) -> str:
  facts = [f'{file.size:,} bytes'] if file.size else []
  facts += [file.checksum] if file.checksum else []
  return f'{file.name} ({", ".join(facts)})' if facts else file.name


def _check_picture(encoded: bytes) -> bytes:
  images.decode(encoded)
  return encoded


def _compare_with_files(
  root: str, examples: Sequence[Example]
) -> tuple[list[Example], list[Problem], list[Problem]]:
  """Compares the annotated paths with the files beside them.

  A path in another case than its file is taken for it: some copies of the
  archives were made where case does not count.

  Returns:
    (the examples that are there, missing and double ones, files that no
    example names).
  """
  files = _list_files(root, {os.path.dirname(e.path) for e in examples})
  by_lower_case = {path.lower(): path for path in files}
  there, problems, seen = [], [], set()
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
      there.append(dataclasses.replace(example, path=path))
  unlisted = [
    (path, 'left by an operating system' if _is_litter(path) else 'unlisted')
    for path in sorted(files - seen)
  ]
  return there, problems, unlisted


def _list_files(root: str, folders: set[str]) -> set[str]:
  """Returns the paths of the files in some folders and in their parents.

  A folder outside the root, which only a forged annotation names, has none.
  """
  paths = set()
  for folder in folders | {os.path.dirname(folder) for folder in folders}:
    where = os.path.join(root, folder)
    is_inside = folder and os.path.normpath(folder) == folder
    if (
      is_inside
      and folder.split(os.sep)[0] not in ('', '..')
      and (os.path.isdir(where))
    ):
      with os.scandir(where) as entries:
        paths |= {
          os.path.join(folder, e.name) for e in entries if not e.is_dir()
        }
  return paths


def _is_litter(path: str) -> bool:
  name = os.path.basename(path).lower()
  return name.startswith('._') or name in _LITTER


def _in_class_order(examples: Sequence[Example]) -> list[Example]:
  """Brings the examples of a class together, in order of first appearance."""
  by_class = collections.defaultdict(list)
  for example in examples:
    by_class[example.class_name].append(example)
  return [example for members in by_class.values() for example in members]


def _class_names(splits: Mapping[str, Sequence[Example]]) -> list[str]:
  """Returns the classes, those of train first.

  Raises:
    ValueError: if a class is in train and in another split.
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


def _compare_counts(
  splits: Mapping[str, Sequence[Example]],
  counts: Mapping[str, tuple[int, int]],
) -> list[Problem]:
  problems = []
  for split, (num_pictures, num_classes) in counts.items():
    classes = {example.class_name for example in splits[split]}
    if (len(splits[split]), len(classes)) != (num_pictures, num_classes):
      problems.append(
        (
          split,
          f'{len(splits[split]):,} pictures of {len(classes):,} classes, '
          f'expected {num_pictures:,} of {num_classes:,}',
        )
      )
  return problems


def read_rows(
  root: str, path: str, fields: Sequence[str], *, skip: int = 0
) -> tuple[list[dict[str, str]], list[Problem]]:
  """Reads a table of words from an annotation file.

  Args:
    root: of the data set.
    path: of the file, relative to the root.
    fields: the names of the columns; the last takes the rest of a line.
    skip: lines of the header.

  Returns:
    (rows, problems): a row is {field: word}; lines with too few words are
    problems, empty lines are nothing.
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


def make_builder(
  builder_cls: type[PublishedBuilder],
  *,
  data_dir: str,
  manual_dir: str,
  allow_incomplete: bool,
) -> tuple[PublishedBuilder, list[Problem]]:
  """Returns the builder, and nothing that was left out so far.

  With `allow_incomplete`, what is not as published is kept apart from what is,
  by the folder that it came from.
  """
  builder = builder_cls(data_dir=data_dir, file_format='array_record')
  if allow_incomplete and not os.path.exists(builder.data_path):
    digest = hashlib.sha256(os.path.abspath(manual_dir).encode()).hexdigest()
    config = tfds.core.BuilderConfig(name=f'incomplete-{digest[:16]}')
    builder = builder_cls(
      data_dir=data_dir, config=config, file_format='array_record'
    )
  builder.downloads = os.path.join(data_dir, 'downloads')
  builder.manual_dir = os.path.expanduser(manual_dir)
  builder.allow_incomplete = allow_incomplete
  return builder, []
