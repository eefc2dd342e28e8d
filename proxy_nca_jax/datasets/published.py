"""The common builder of published datasets: find, verify, count and store.

Each dataset is published as archives of images and annotations. A subclass
lists the files, reads the annotations and states the published counts; the
builder does the rest. Archives and annotations are untrusted.
"""

import abc
import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from proxy_nca_jax import images
from proxy_nca_jax.datasets import annotations, archives, downloads, records
from proxy_nca_jax.runtime import errors, folders
from proxy_nca_jax.runtime import files as files_lib

_logger = logging.getLogger(__name__)


class PublishedBuilder(records.OrderedBuilder):
  """Builds a published dataset; subclasses set the attributes up to `features`.

  Attributes:
    homepage: where people find the files.
    files: alternative sets of files, each the complete dataset; the preferred
      one first.
    markers: alternative sets of paths, each of which identifies the root of an
      extracted copy.
    counts: the published {split: (num_images, num_classes)}.
    features: features of a record, in addition to image, label and name.
    manual_dir: a folder with the user's archives or extracted copy, or ''.
    downloads: the folder for downloads; files that already exist in it are
      used.
    allow_incomplete: whether to log deviations from the publication instead of
      raising an error.
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
  def read_annotations(
    self, root: str
  ) -> tuple[list[annotations.Example], list[annotations.Problem]]:
    """Returns the examples in order, and what is wrong with other lines."""

  @property
  def problems_path(self) -> str:
    """The text file that lists all problems of the last preparation."""
    return os.path.join(self.downloads, f'{self.name}.problems.txt')

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
    examples, mismatches, unlisted = annotations.match_files(root, examples)
    splits = {
      split: annotations.group_by_class(
        [e for e in examples if e.split == split]
      )
      for split in self.counts
    }
    miscounts = annotations.compare_counts(splits, self.counts)
    problems = [*problems, *mismatches, *miscounts]
    self._problems = list(unlisted)
    self._check(problems)
    for split, members in splits.items():
      self._check_not_empty(split, len(members))
    class_names = annotations.list_classes(splits)
    self.info.metadata.update(
      class_names=class_names,
      num_train_classes=len({e.class_name for e in splits['train']}),
      labels=[],
      skipped=[*unlisted, *problems],
    )
    if 'camera' in self.features:
      self.info.metadata['cameras'] = []
    labels = {name: label for label, name in enumerate(class_names)}
    return {
      split: self._generate_examples(root, split, examples, labels)
      for split, examples in splits.items()
    }

  def _generate_examples(
    self,
    root: str,
    split: str,
    examples: Sequence[annotations.Example],
    labels: Mapping[str, int],
  ) -> Iterator[tuple[int, dict]]:
    metadata, broken = self.info.metadata, []

    def read(example):
      encoded = folders.read_file(os.path.join(root, example.path))
      images.decode(encoded)  # Or an error.
      return encoded

    for example, encoded in records.read_images(examples, read):
      name = example.path
      if isinstance(encoded, ValueError):
        broken.append((name, str(encoded)))
        continue
      label = labels[example.class_name]
      yield (
        len(metadata['labels']),
        {'image': encoded, 'label': label, 'name': name, **example.extra},
      )
      metadata['labels'].append(label)
      if 'camera' in self.features:
        metadata['cameras'].append(example.extra['camera'])
    self._check(broken)
    self._check_not_empty(split, len(examples) - len(broken))
    metadata['skipped'].extend(broken)

  def _check_not_empty(self, split: str, num_images: int) -> None:
    if not num_images:
      raise ValueError(
        f'{self.name} has no image of the {split} split in these files '
        f'({self.problems_path} lists every problem): download it again from '
        f'{self.homepage}.'
      )

  def _check(self, problems: Sequence[annotations.Problem]) -> None:
    """Logs and writes the problems; raises ValueError unless allowed."""
    self._problems += problems
    if not self._problems:
      with contextlib.suppress(FileNotFoundError):
        os.remove(self.problems_path)  # Of an earlier attempt.
      return
    with files_lib.write_atomically(self.problems_path) as file:
      file.writelines(f'{name}: {reason}\n' for name, reason in self._problems)
    if not problems:
      return
    for name, reason in problems[: errors.MAX_NAMED]:
      _logger.warning('%s: %s: %s', self.name, name, reason)
    if len(problems) > errors.MAX_NAMED:
      _logger.warning(
        '%s: %s. %s lists all of them.',
        self.name,
        errors.count_kinds(reason for _, reason in problems),
        self.problems_path,
      )
    if not self.allow_incomplete:
      first = '; '.join(f'{name}: {reason}' for name, reason in problems[:5])
      more = f'; and {len(problems) - 5} more' if len(problems) > 5 else ''
      raise ValueError(
        f'{self.name} differs from its publication ({self.problems_path} lists '
        f'every problem): {first}{more}. Download it again from '
        f'{self.homepage}, or set config.dataset.allow_incomplete=True to use '
        'the files as they are.'
      )

  def _find_root(self) -> str:
    """Returns the root of the extracted dataset, extracting it if necessary.

    Raises:
      ValueError: if the files are not found, or hold something else.
      OSError: if manual_dir cannot be listed.
    """
    if self.manual_dir and not os.path.isdir(self.manual_dir):
      raise ValueError(
        f'No folder {self.manual_dir!r} (config.dataset.manual_dir): name the '
        f'folder that holds {self.describe_files()}.'
      )
    if self.manual_dir:
      os.listdir(self.manual_dir)  # Or an error: no download replaces it.
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

  def is_available(self) -> bool:
    """Whether the dataset can be prepared without a download."""
    if self.manual_dir and self._find_markers(self.manual_dir):
      return True
    return any(all(map(self._find_file, files)) for files in self.files)

  def _find_markers(self, folder: str) -> str | None:
    roots = (archives.find_root(folder, paths) for paths in self.markers)
    return next(filter(None, roots), None)

  def _find_archives(self) -> list[str]:
    """Finds one set of files, or downloads the missing files of one."""
    found = [list(map(self._find_file, files)) for files in self.files]
    for paths in found:
      if all(paths):
        return paths
    self._check_not_in_part()
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
      f'{self.name} is not prepared and cannot be downloaded '
      f'({"; ".join(reasons)}). Get {self.describe_files()} from '
      f'{self.homepage}, put it into '
      f'{os.path.abspath(self.manual_dir or self.downloads)} and start again.'
    )

  def _check_not_in_part(self) -> None:
    """Raises ValueError if manual_dir has an extracted copy with a gap.

    Such a gap is better known before gigabytes are downloaded.
    """
    archive_names = {file.name for files in self.files for file in files}
    for paths in self.markers if self.manual_dir else ():
      present = [
        path for path in paths if archives.find_root(self.manual_dir, [path])
      ]
      missing = [path for path in paths if path not in present]
      # A file that is published on its own says nothing about an archive.
      if set(present) - archive_names:
        raise ValueError(
          f'{self.manual_dir} (config.dataset.manual_dir) has '
          f'{" and ".join(present)} of {self.name}, but not '
          f'{" and ".join(missing)}, in one folder. Add what is missing, or '
          'name another manual_dir to download the archives.'
        )

  def _find_file(self, file: downloads.RemoteFile) -> str | None:
    """Finds a file under the published name or those of common copies."""
    stem = file.name.split('.')[0]
    names = [file.name]
    if file.name.endswith(('.tgz', '.zip')):
      names += [stem + s for s in ('.tgz', '.tar.gz', '.tar', '.zip')]
    for folder in filter(None, (self.manual_dir, self.downloads)):
      if path := archives.find_file(folder, names):
        if file.size not in (None, os.path.getsize(path)):
          _logger.warning(
            '%s has %d bytes; the published %s has %d.',
            path,
            os.path.getsize(path),
            file.name,
            file.size,
          )
        return path
    return None

  def describe_files(self) -> str:
    """Lists the files with their sizes and checksums."""
    return ', or '.join(
      ' and '.join(map(_describe_file, files)) for files in self.files
    )


def _describe_file(file: downloads.RemoteFile) -> str:
  facts = [f'{file.size:,} bytes'] if file.size else []
  facts += [file.checksum] if file.checksum else []
  return f'{file.name} ({", ".join(facts)})' if facts else file.name


def make_builder(
  builder_cls: type[PublishedBuilder],
  *,
  data_dir: str,
  manual_dir: str,
  allow_incomplete: bool,
) -> tuple[PublishedBuilder, list[annotations.Problem]]:
  """Returns the builder of a published dataset and an empty list of problems.

  With `allow_incomplete`, a dataset that deviates from its publication is
  stored separately from the complete one, under a name derived from
  `manual_dir`.
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
