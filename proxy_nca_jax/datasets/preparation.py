"""Prepares datasets: writes their records once, for all later runs."""

import contextlib
import errno
import functools
import inspect
import io
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping

import tensorflow_datasets as tfds

from proxy_nca_jax.datasets import (
  cars196,
  cub200,
  glyphs,
  image_folder,
  inshop,
  market1501,
  published,
  sop,
)
from proxy_nca_jax.runtime import errors, folders, lock

PUBLISHED = {
  'cars196': cars196.Cars196,
  'cub200': cub200.Cub200,
  'inshop': inshop.Inshop,
  'market1501': market1501.Market1501,
  'sop': sop.Sop,
}
# {name: function of `data_dir` and config fields -> (builder, skipped files)}
DATASETS = {
  'glyphs': glyphs.make_builder,
  'image_folder': image_folder.make_builder,
} | {
  name: functools.partial(published.make_builder, builder_cls)
  for name, builder_cls in PUBLISHED.items()
}

# Fields that are paths, or may be.
_PATHS = ('root', 'table', 'huggingface', 'manual_dir', 'fonts_dir')

_logger = logging.getLogger(__name__)


def find_data_dir(data_dir: str) -> str:
  """Returns the folder of prepared datasets; '' selects TFDS's default."""
  return os.path.expanduser(data_dir or str(tfds.core.constants.DATA_DIR))


def prepare(
  fields: Mapping[str, str | int],
) -> tuple[tfds.core.DatasetBuilder, list[tuple[str, str]]]:
  """Prepares a dataset, unless an earlier run has done so.

  Args:
    fields: the dataset's `name`, `data_dir` and the arguments of its builder;
      `config.dataset` has them all.

  Returns:
    (builder, skipped): skipped has (file, reason) of each file left out.

  Raises:
    ValueError: if the dataset is unknown, unavailable or cannot be written.
  """
  # Of two runs that need the same dataset, one prepares it and the other waits.
  # A builder reads the prepared state when it is created, so that comes after.
  make_builder, folder = _find_builder(fields)
  with locked(folder), _without_warnings():
    builder, skipped = make_builder()
    _write_records(builder)
  return builder, [*skipped, *builder.info.metadata.get('skipped', ())]


def find_prepared(
  fields: Mapping[str, str | int],
) -> tfds.core.DatasetBuilder | None:
  """Returns the builder of a dataset as it is now; None if not prepared."""
  make_builder, _ = _find_builder(fields)
  with _without_warnings():
    builder, _ = make_builder()
  return builder if os.path.exists(builder.data_path) else None


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
  """Mutes TFDS, which logs each config of a builder that is not its own."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


def _find_builder(
  fields: Mapping[str, str | int],
) -> tuple[Callable[[], tuple], str]:
  """Returns the function that makes a dataset's builder, and its folder."""
  name = fields['name']
  if name not in DATASETS:
    raise ValueError(
      f'Unknown dataset {name!r} (config.dataset.name): choose one of '
      f'{", ".join(sorted(DATASETS))}.'
    )
  data_dir = find_data_dir(fields['data_dir'])
  folders.check_utf8(data_dir, 'The folder of datasets (data_dir)')
  names = set(inspect.signature(DATASETS[name]).parameters)
  names -= {'builder_cls', 'data_dir'}
  arguments = {field: _expand(field, fields[field]) for field in names}
  return (
    functools.partial(DATASETS[name], data_dir=data_dir, **arguments),
    os.path.join(data_dir, name),
  )


def _expand(field: str, value: str | int) -> str | int:
  """Expands ~ at the start of a path."""
  is_path = field in _PATHS
  return os.path.expanduser(value) if is_path else value


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
  """Locks a dataset's folder, unless it exists and is read-only.

  Nothing needs to be written to a shared folder of prepared datasets. If the
  dataset is not prepared, writing it fails with an error of its own.
  """
  with contextlib.ExitStack() as stack:
    try:
      os.makedirs(folder, exist_ok=True)
      stack.enter_context(lock.locked(os.path.join(folder, 'lock')))
    except OSError as error:
      if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        raise
      if not os.path.isdir(folder):
        raise
    yield


def _write_records(builder: tfds.core.DatasetBuilder) -> None:
  """Writes the records unless they exist; removes leftovers of a killed run.

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
    # TFDS prints what the line above has logged.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(file_format='array_record')
  except RuntimeError as error:  # Raised by TFDS and by ArrayRecord's writer.
    raise ValueError(
      f'Cannot prepare {builder.name} in {builder.data_path}: '
      f'{errors.one_line(error, max_length=None)}'
    ) from error
