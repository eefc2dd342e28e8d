"""Reads tensors from torch's .pth files safely, without torch.

A .pth file is a pickle, and unpickling can run any code that the file names.
Here only the few names that tensors consist of are allowed, and map to
functions of this file; any other name is an error. Both formats are supported:
the zip archive of torch 1.6 and later, and the pickle stream before.
"""

import collections
import functools
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

# https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_PROTOCOL = 1001

_STORAGE_TYPES = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}

# Keys of the weights in checkpoints that contain more than them.
_WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'teacher')


class _Storage(NamedTuple):
  """A flat array of the file: its key, dtype, and number of elements."""

  key: str
  dtype: np.dtype
  size: int


class _Tensor(NamedTuple):
  """A strided view of a storage; offset and strides count elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def read_tensors(path: str) -> dict[str, np.ndarray]:
  """Returns the tensors of a state dict that `torch.save` wrote.

  The state dict can also be the entry 'state_dict', 'model_state_dict', 'model'
  or 'teacher' of a checkpoint. The prefix 'module.' of data-parallel training
  is removed.

  Args:
    path: of the file.

  Returns:
    {name: array}, with the dtypes of the file.

  Raises:
    ValueError: if the file is damaged, or contains more than tensors.
  """
  try:
    if zipfile.is_zipfile(path):
      tree, read = _read_zip(path)
    else:
      tree, read = _read_stream(path)
    tensors = _find_state_dict(tree)
    return {name: _view(tensor, read) for name, tensor in tensors.items()}
  except ValueError as error:
    raise ValueError(f'Could not read {path!r}: {error}') from error
  # Damaged files raise errors of many types in pickle, zipfile and struct.
  except Exception as error:
    raise ValueError(
      f'{path!r} is a damaged file of torch.save ({error or "truncated"}): '
      'download it again.'
    ) from error


def _read_zip(path: str):
  archive = zipfile.ZipFile(path)
  # torch compresses nothing, so a file cannot unpack to more than its size.
  if any(member.compress_type for member in archive.infolist()):
    raise ValueError('it is compressed, unlike files of torch.save.')
  names = {name.split('/', 1)[-1]: name for name in archive.namelist()}
  if 'data.pkl' not in names:
    raise ValueError(
      'it is a zip archive without data.pkl, not a file of torch.save.'
    )
  if 'byteorder' in names and archive.read(names['byteorder']) != b'little':
    raise ValueError('its byte order is not little-endian.')
  with archive.open(names['data.pkl']) as file:
    tree = _unpickle(io.BytesIO(file.read())).load()

  # Tensors that share a storage share its memory.
  @functools.cache
  def read(storage):
    content = archive.read(names[f'data/{storage.key}'])
    return np.frombuffer(content, storage.dtype, storage.size)

  return tree, read


def _read_stream(path: str):
  with open(path, 'rb') as file:
    # The tar archives of torch's first versions fail here as any other file.
    if _unpickle(file).load() != _STREAM_MAGIC:
      raise ValueError('it is not a file of torch.save.')
    if _unpickle(file).load() != _STREAM_PROTOCOL:
      raise ValueError('its protocol is unknown.')
    if not _unpickle(file).load().get('little_endian', True):
      raise ValueError('its byte order is not little-endian.')
    unpickler = _unpickle(file)
    tree = unpickler.load()
    storages, num_bytes = {}, os.path.getsize(path)
    for key in _unpickle(file).load():
      storage = unpickler.storages[key]
      (size,) = struct.unpack('<q', file.read(8))
      if size != storage.size:
        raise ValueError(
          f'its storage {key} has {size} elements instead of {storage.size}.'
        )
      # `read` would allocate the memory before it finds the end of the file.
      if not 0 <= size * storage.dtype.itemsize <= num_bytes - file.tell():
        raise ValueError(f'its storage {key} exceeds the file.')
      content = file.read(size * storage.dtype.itemsize)
      storages[key] = np.frombuffer(content, storage.dtype, size)
  return tree, lambda storage: storages[storage.key]


class _Unpickler(pickle.Unpickler):
  """An unpickler that allows only the names that tensors consist of."""

  def __init__(self, file: BinaryIO):
    # Files written by Python 2 have byte strings as names.
    super().__init__(file, encoding='latin1')
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Callable:
    if module == 'torch' and name in _STORAGE_TYPES:
      return _STORAGE_TYPES[name]
    known = _KNOWN.get((module, name))
    if known is None:
      raise ValueError(
        f'it contains {module}.{name}, but only tensors are loaded from a '
        'pickle, because other objects can run code. Save only the state_dict, '
        'or use safetensors.'
      )
    return known

  def persistent_load(self, identity: tuple) -> _Storage:
    # The device and, in older files, a view are ignored.
    kind, dtype, key, _, size, *_ = identity
    if kind != 'storage' or dtype not in _STORAGE_TYPES.values():
      raise ValueError(f'it refers to {kind!r}, not to a storage.')
    storage = _Storage(str(key), np.dtype(dtype), int(size))
    return self.storages.setdefault(storage.key, storage)


def _unpickle(file: BinaryIO) -> _Unpickler:
  """Returns the unpickler of the pickle at the position of a file.

  Raises:
    ValueError: if the pickle numbers an object by more than its size; the
      unpickler would take memory for all numbers below.
  """
  start = file.tell()
  for operation, argument, _ in pickletools.genops(file):
    if 'PUT' in operation.name and int(argument) > file.tell() - start:
      raise ValueError('its pickle is damaged.')
  file.seek(start)
  return _Unpickler(file)


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_) -> _Tensor:
  return tensor


_KNOWN = {
  ('collections', 'OrderedDict'): collections.OrderedDict,
  ('torch._utils', '_rebuild_tensor'): _rebuild_tensor,
  ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
  ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
}


def _find_state_dict(tree) -> Mapping[str, _Tensor]:
  seen = []
  while isinstance(tree, Mapping) and not any(tree is x for x in seen):
    seen.append(tree)
    if tree and all(isinstance(value, _Tensor) for value in tree.values()):
      prefix = 'module.'
      if all(name.startswith(prefix) for name in tree):
        return {name[len(prefix) :]: value for name, value in tree.items()}
      return tree
    wrappers = [name for name in _WRAPPERS if name in tree]
    if not wrappers:
      break
    tree = tree[wrappers[0]]
  raise ValueError(
    'it has no state dict, neither at the top level nor under '
    f'{", ".join(_WRAPPERS)}.'
  )


def _view(tensor: _Tensor, read) -> np.ndarray:
  # Strides of 0 repeat numbers: a few bytes would ask for gigabytes.
  if math.prod(tensor.shape) > tensor.storage.size:
    raise ValueError(
      f'a tensor of shape {tensor.shape} has more elements than its storage.'
    )
  flat = read(tensor.storage)
  last = tensor.offset + sum(
    (length - 1) * stride
    for length, stride in zip(tensor.shape, tensor.strides, strict=True)
  )
  least = min(tensor.offset, *tensor.shape, *tensor.strides, 0)
  if least < 0 or (math.prod(tensor.shape) and last >= flat.size):
    raise ValueError('a tensor exceeds its storage.')
  return np.lib.stride_tricks.as_strided(
    flat[tensor.offset :],
    tensor.shape,
    [stride * flat.itemsize for stride in tensor.strides],
    writeable=False,
  )
