"""Features of a backbone, computed once for each image and stored on disk.

A backbone that is not trained gives the same features in every run. They are
stored below `config.dataset.data_dir`, in one folder for each combination of
records, weights and preprocessing. A file holds the features of a range of
records and appears when it is complete, so that a run which is stopped keeps
the features computed so far. The files are .npz, whose checksum is verified
when they are read.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
import tqdm

from proxy_nca_jax import datasets, models
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.datasets import preparation
from proxy_nca_jax.evaluate import embed as embed_lib
from proxy_nca_jax.runtime import files, lock

# Records in a file: four batches of an evaluation, 5 MB at 1,280 features.
_RECORDS_PER_FILE = 1024

_logger = logging.getLogger(__name__)

# Maps a split to the features of its records, float32 [len(split), width].
# Vectors are their own features, which are not read here.
Extract = Callable[[datasets.Split], np.ndarray | datasets.Vectors]


def make_extract(
  config: ml_collections.ConfigDict,
  model,
  state: state_lib.TrainState,
  mesh: jax.sharding.Mesh,
  *,
  records_digest: str,
  weights_digest: str | None,
) -> Extract:
  """Returns the function from a split to the pooled features of its images.

  Features of random weights are not stored, and neither are those of a run of
  several processes, or where the data folder cannot be written.

  Args:
    config: the run's config.
    model: its method `features` gives the features.
    state: has the weights of the backbone.
    mesh: the devices that share the work.
    records_digest: the hash of all records of the dataset.
    weights_digest: the hash of the file of weights; None for random weights.
  """
  if models.BACKBONES[config.model.name].takes_vectors:
    return lambda split: split.vectors
  embed_fn = embed_lib.make_embed_fn(model, mesh, method='features')
  # Of the weights themselves, also if their averages are evaluated.
  state = dataclasses.replace(state, averages={})
  compute = functools.partial(embed_lib.embed_split, embed_fn, config, state)
  if not weights_digest or jax.process_count() > 1:
    return compute
  folder = _folder(config, records_digest, weights_digest)

  def extract(split):
    try:
      os.makedirs(folder, exist_ok=True)
      with lock.locked(os.path.join(folder, 'lock')):
        return _read_or_compute(compute, split, folder)
    except OSError as error:
      _logger.warning('Features are computed, but not stored: %s', error)
      return compute(split)

  return extract


def _folder(
  config: ml_collections.ConfigDict, records_digest: str, weights_digest: str
) -> str:
  """Returns the folder of the features of some records, weights and config."""
  inputs = {
    'records': records_digest,
    'weights': weights_digest,
    **{
      name: config.model[name]
      for name in ('name', 'dtype', 'pooling', 'layer_norm')
    },
    **{
      name: config.dataset[name]
      for name in ('image_size', 'resize', 'resize_mode', 'interpolation')
    },
  }
  digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
  return os.path.join(
    preparation.find_data_dir(config.dataset.data_dir),
    'features',
    digest.hexdigest()[:16],
  )


def read_by_file(
  config: ml_collections.ConfigDict, weights_digest: str
) -> dict[str, np.ndarray]:
  """Reads the stored features of the files of an image folder.

  Args:
    config: the config of a run whose backbone is not trained.
    weights_digest: the hash of its file of weights.

  Returns:
    {escaped path in the folder: float32 [width]}; {} if the dataset is not an
    image folder, if a file has changed since, or if features are missing.
  """
  found = datasets.find_files(config.dataset)
  if not found:
    return {}
  names, records_digest = found
  folder = _folder(config, records_digest, weights_digest)
  rows = []
  for begin in range(0, len(names), _RECORDS_PER_FILE):
    rows.append(_read(_path(folder, begin // _RECORDS_PER_FILE)))
    if rows[-1] is None:
      return {}
  rows = np.concatenate(rows)
  return dict(zip(names, rows)) if len(rows) == len(names) else {}


def _read_or_compute(compute, split: datasets.Split, folder: str) -> np.ndarray:
  """Returns the features of a split; writes the files that are missing."""
  numbers = np.unique(split.rows // _RECORDS_PER_FILE)
  parts = {number: _read(_path(folder, number)) for number in numbers}
  missing = [number for number, part in parts.items() if part is None]
  if len(missing) < len(numbers):
    _logger.info('Reading the features of images from %s', folder)
  for number in tqdm.tqdm(
    missing, desc='features', unit='file', disable=None, leave=False, delay=1
  ):
    begin = number * _RECORDS_PER_FILE
    end = min(begin + _RECORDS_PER_FILE, len(split.source))
    records = dataclasses.replace(
      split,
      rows=np.arange(begin, end),
      labels=np.zeros(end - begin, np.int32),
    )
    parts[number] = compute(records)
    with files.write_atomically(_path(folder, number), 'wb') as file:
      np.savez(file, features=parts[number])
  positions = np.searchsorted(numbers, split.rows // _RECORDS_PER_FILE)
  starts = np.cumsum([0, *(len(parts[number]) for number in numbers)])
  rows = starts[positions] + split.rows % _RECORDS_PER_FILE
  return np.concatenate([parts[number] for number in numbers])[rows]


def _path(folder: str, number: int) -> str:
  return os.path.join(folder, f'{number:06}.npz')


def _read(path: str) -> np.ndarray | None:
  """Returns the features in a file; None if it is missing or damaged."""
  if not os.path.exists(path):
    return None
  try:
    with np.load(path) as arrays:
      return arrays['features']
  except (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    RuntimeError,  # zipfile's, if a damaged bit marks a file as encrypted.
    zipfile.BadZipFile,
  ) as error:
    _logger.warning('%s is damaged (%s) and written again', path, error)
    return None
