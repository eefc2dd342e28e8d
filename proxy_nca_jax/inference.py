"""A trained network for any pictures: a run -> an embedder -> a file."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import export as jax_export
from PIL import Image
from safetensors import numpy as safetensors

from proxy_nca_jax import images, models
from proxy_nca_jax import images as images_lib
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import default
from proxy_nca_jax.evaluate import embed as embed_lib
from proxy_nca_jax.evaluate import selection
from proxy_nca_jax.runtime import files
from proxy_nca_jax.runtime import workdir as workdir_lib

# What a picture may be: the name of a file, its bytes, a Pillow image, or
# uint8 [height, width, 3] or [height, width].
Picture = str | os.PathLike | bytes | Image.Image | np.ndarray

_DESCRIPTION, _ARRAYS = 'embedder.json', 'arrays.safetensors'


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
  """Maps pictures to embeddings, prepared as for the scores of its run.

  embedder(pictures) gives float32 [number, dim].

  Attributes:
    config: of the run.
    params: {'backbone', 'head', 'proxies'}; 'proxies' is {} where the loss has
      none.
    model_state: batch statistics.
    class_names: of the classes that were learned, in the order of the proxies.
    batch_size: pictures at a time; the last ones are filled up to as many, so
      that one program serves all.
  """

  config: ml_collections.ConfigDict
  params: dict[str, Any]
  model_state: dict[str, Any]
  class_names: tuple[str, ...]
  batch_size: int = 32

  @property
  def dim(self) -> int:
    return self.config.model.embedding_dim

  @functools.cached_property
  def digest(self) -> str:
    """16 digits that tell its weights and its preparation from all others."""
    digest = hashlib.sha256(json.dumps(self._preparation).encode())
    for name, array in sorted(self._network.items()):
      digest.update(name.encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]

  @property
  def _preparation(self) -> dict:
    config = self.config.dataset
    return {
      # Where nothing is resized, the pictures of the data set have this size.
      'side': config.resize or config.image_size,
      'mode': config.resize_mode,
      'interpolation': config.interpolation,
    }

  @property
  def _network(self) -> dict[str, np.ndarray]:
    return workdir_lib.flatten(
      {
        'backbone': self.params['backbone'],
        'head': self.params['head'],
        'model_state': self.model_state,
      }
    )

  def read(self, picture: Picture) -> np.ndarray:
    """Decodes, resizes and crops, uint8 [image_size, image_size, 3].

    Raises:
      ValueError: if it is no picture, or not a whole one.
      OSError: if the file cannot be read.
    """
    image = images_lib.resize(_decode(picture), **self._preparation)
    return images.center_crop(np.asarray(image), self.config.dataset.image_size)

  def __call__(self, pictures: Iterable[Picture]) -> np.ndarray:
    """Embeds pictures of any mix of kinds and sizes.

    Args:
      pictures: an iterable of names of files, bytes, Pillow images or arrays,
        or uint8 [number, height, width, 3].

    Returns:
      float32 [number, dim].

    Raises:
      ValueError, OSError: if one cannot be read; the message tells which.
    """
    if isinstance(pictures, str | bytes | os.PathLike | Image.Image):
      raise ValueError('Give a list of pictures, even of one: [picture].')
    rest, rows = enumerate(pictures), []
    with futures.ThreadPoolExecutor() as pool:
      take = lambda: [
        pool.submit(self._read_numbered, *numbered)
        for numbered in itertools.islice(rest, self._rows)
      ]
      reading = take()
      while reading:
        batch = np.stack([future.result() for future in reading])
        reading = take()  # While the device computes.
        rows.append(self.embed(batch))
    return np.concatenate([np.zeros((0, self.dim), np.float32), *rows])

  def _read_numbered(self, number: int, picture: Picture) -> np.ndarray:
    try:
      return self.read(picture)
    except (ValueError, OSError) as error:
      name = f'number {number}'
      if isinstance(picture, str | os.PathLike):
        name = repr(os.fspath(picture))
      raise ValueError(f'Picture {name} cannot be read: {error}') from error

  def embed(self, images: np.ndarray) -> np.ndarray:
    """Embeds what `read` gives.

    Args:
      images: uint8 [number, image_size, image_size, 3].

    Returns:
      float32 [number, dim].
    """
    rows = np.zeros((len(images), self.dim), np.float32)
    for begin in range(0, len(images), self._rows):
      batch = images[begin : begin + self._rows]
      filling = ((0, self._rows - len(batch)), (0, 0), (0, 0), (0, 0))
      embeddings = self._forward(np.pad(batch, filling))
      rows[begin : begin + len(batch)] = np.asarray(embeddings)[: len(batch)]
    return rows

  @property
  def _rows(self) -> int:
    """The batch size, as the devices can share it."""
    return self._mesh.size * -(-self.batch_size // self._mesh.size)

  @functools.cached_property
  def _mesh(self) -> jax.sharding.Mesh:
    return mesh_lib.make_mesh(jax.local_devices())

  @functools.cached_property
  def _forward(self) -> Callable[[np.ndarray], jax.Array]:
    """uint8 [batch, image_size, image_size, 3] -> float32 [batch, dim]."""
    embed_fn = embed_lib.make_embed_fn(
      models.create_model(self.config),
      embed_lib.make_normalize(self.config),
      self._mesh,
    )
    state = state_lib.TrainState(
      step=jnp.int32(0),
      params=self.params,
      loss_state={},
      model_state=self.model_state,
      opt_state=(),
    )
    state = jax.device_put(state, mesh_lib.replicated(self._mesh))
    return lambda batch: embed_fn(state, {'image': batch})

  def save(self, folder: str | os.PathLike) -> None:
    """Writes all that `load` needs into a folder, to take elsewhere.

    Raises:
      ValueError: if there is something else.
    """
    os.makedirs(folder, exist_ok=True)
    if set(os.listdir(folder)) - {_DESCRIPTION, _ARRAYS}:
      raise ValueError(
        f'{os.fspath(folder)!r} holds other files: name a new folder.'
      )
    tree = {'params': self.params, 'model_state': self.model_state}
    arrays = safetensors.save(workdir_lib.flatten(tree))
    path = os.path.join(folder, _ARRAYS)
    with files.write_atomically(path, 'wb') as file:
      file.write(arrays)
    workdir_lib.write_json(
      os.path.join(folder, _DESCRIPTION),
      {
        'config': workdir_lib.as_json(self.config),
        'class_names': list(self.class_names),
        'sha256': hashlib.sha256(arrays).hexdigest(),
      },
    )

  def export(self) -> bytes:
    """Returns the network as StableHLO, for `jax.export.deserialize`.

    It maps resized pictures, uint8 [batch, height, width, 3] of any number and
    of any size from image_size up, to float32 [batch, dim]: central crop and
    normalisation are inside, decoding and resizing are not. It runs on CPUs,
    NVIDIA GPUs and TPUs, where this package need not be.
    """
    model = models.create_model(self.config)
    normalize = embed_lib.make_normalize(self.config)
    size = self.config.dataset.image_size
    variables = {
      'params': {name: self.params[name] for name in ('backbone', 'head')},
      **self.model_state,
    }

    def embed(pictures):
      top, left = ((side - size) // 2 for side in pictures.shape[1:3])
      start = [jnp.asarray(x) for x in (0, top, left, 0)]
      pictures = jax.lax.dynamic_slice(
        pictures, start, (pictures.shape[0], size, size, 3)
      )
      return model.apply(variables, normalize(pictures), train=False)

    shape = jax_export.symbolic_shape(
      'batch, height, width, 3',
      constraints=(f'height >= {size}', f'width >= {size}'),
    )
    return jax_export.export(jax.jit(embed), platforms=('cpu', 'cuda', 'tpu'))(
      jax.ShapeDtypeStruct(shape, jnp.uint8)
    ).serialize()


def load(path: str | os.PathLike) -> Embedder:
  """Loads the network of a run, or what `Embedder.save` wrote.

  Of a run with validation classes it is the state that they selected, else the
  newest one.

  Args:
    path: a workdir, or a folder.

  Raises:
    ValueError: if there is neither, or it cannot be read.
  """
  path = os.fspath(path)
  if description := workdir_lib.read_json(os.path.join(path, _DESCRIPTION)):
    with open(os.path.join(path, _ARRAYS), 'rb') as file:
      arrays = file.read()
    if hashlib.sha256(arrays).hexdigest() != description['sha256']:
      raise ValueError(f'The bytes of {path!r} have changed: save it again.')
    tree = _unflatten(safetensors.load(arrays))
    return _make_embedder(
      description, tree['params'], tree.get('model_state', {})
    )
  description = workdir_lib.read_json(os.path.join(path, 'run.json'))
  if not description:
    raise ValueError(
      f'{path!r} is neither the workdir of a run nor a saved embedder: it has '
      f'no run.json and no {_DESCRIPTION}.'
    )
  config = _as_config(description['config'])
  folder, step = 'checkpoints', None
  if config.dataset.validation:
    if selected := selection.select(config, path):
      folder, step = 'selected', selected[0]
  state = state_lib.read(os.path.join(path, folder), step=step)
  return _make_embedder(description, state.params, state.model_state)


def _make_embedder(description, params, model_state) -> Embedder:
  config = _as_config(description['config'])
  class_names = tuple(description.get('class_names', ()))
  params = {'proxies': {}, **params}
  if config.proxies.sharded and class_names:
    # Devices share them, filled up with rows of 0.
    params['proxies'] = params['proxies'][: len(class_names)]
  return Embedder(
    config=config,
    params=jax.tree.map(np.asarray, params),
    model_state=jax.tree.map(np.asarray, model_state),
    class_names=class_names,
  )


def _as_config(saved: dict) -> ml_collections.ConfigDict:
  """Returns a config as it was saved; what is younger has its default."""
  config = workdir_lib.flatten(workdir_lib.as_json(default.get_config()))
  return ml_collections.ConfigDict(
    _unflatten(config | workdir_lib.flatten(saved))
  )


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  """Undoes `workdir.flatten`."""
  tree = {}
  for name, value in flat.items():
    *path, last = name.split('.')
    group = tree
    for part in path:
      group = group.setdefault(part, {})
    group[last] = value
  return tree


def _decode(picture: Picture) -> Image.Image:
  """Returns a picture upright and in RGB.

  Raises:
    ValueError: if it is none.
    OSError: if the file cannot be read.
  """
  if isinstance(picture, str | os.PathLike):
    with open(picture, 'rb') as file:
      picture = file.read()
  if isinstance(picture, bytes):
    return images_lib.decode(picture)
  if isinstance(picture, Image.Image):
    return images_lib.as_rgb(picture)
  picture = np.asarray(picture)
  is_image = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)
  if picture.dtype != np.uint8 or not is_image or not picture.size:
    raise ValueError(
      f'it is {picture.dtype} {picture.shape}; expected uint8 [height, width, '
      '3] or [height, width], the name of a file, its bytes or a Pillow image'
    )
  return Image.fromarray(picture).convert('RGB')
