"""A trained network for any images or vectors: called, saved and exported."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import export as jax_export
from PIL import Image
from safetensors import numpy as safetensors

from proxy_nca_jax import (
  configuration,
  fine_tuning,
  losses,
  models,
  warm_start,
)
from proxy_nca_jax import images as images_lib
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.evaluate import selection
from proxy_nca_jax.runtime import (
  errors,
  files,
  folders,
  metric_writer,
  processes,
  saved_json,
)
from proxy_nca_jax.runtime import workdir as workdir_lib

# A path, the bytes of a file, a Pillow image, or uint8 [height, width, 3] or
# [height, width].
ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray

_DESCRIPTION, _ARRAYS = 'embedder.json', 'arrays.safetensors'


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Embedder:
  """Maps images to embeddings, preprocessed as in the evaluation of its run.

  That of a run on vectors maps vectors to embeddings.

  >>> embedder = proxy_nca_jax.load('/tmp/run')  # doctest: +SKIP
  >>> embedder(['a.jpg', 'b.jpg']).shape  # doctest: +SKIP
  (2, 64)

  Attributes:
    config: the config of the run.
    params: {'backbone', 'head', 'proxies'}; 'proxies' is {} if the loss has
      none.
    model_state: batch statistics.
    class_names: names of the training classes, in the order of the proxies.
    batch_size: images embedded at a time. The last batch is padded, so that one
      compiled program serves all.
  """

  config: ml_collections.ConfigDict
  params: dict[str, Any]
  model_state: dict[str, Any]
  class_names: tuple[str, ...]
  batch_size: int = 32

  def __repr__(self):
    name, size = self.config.model.name, self.config.dataset.image_size
    source = f'{name}, {size} x {size} pixels'
    if self.vector_dim:
      source = f'{name} of {self.vector_dim} dimensions'
    return (
      f'Embedder: {source} to {self.dim} dimensions,\n'
      f'trained with {self.config.loss.name} on '
      f'{len(self.class_names):,} classes of {self.config.dataset.name}'
    )

  @property
  def dim(self) -> int:
    """The dimension of the embeddings."""
    return self.config.model.embedding_dim

  @property
  def vector_dim(self) -> int | None:
    """The dimension of the vectors that it takes; None if it takes images."""
    return _vector_dim(self.config, self.params)

  @functools.cached_property
  def digest(self) -> str:
    """16 hexadecimal digits that identify weights and preprocessing."""
    digest = hashlib.sha256(json.dumps(self._preprocessing).encode())
    network = configuration.flatten(
      {
        'backbone': self.params['backbone'],
        'head': self.params['head'],
        'model_state': self.model_state,
      }
    )
    for name, array in sorted(network.items()):
      digest.update(name.encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]

  @property
  def _preprocessing(self) -> dict[str, int | str]:
    config = self.config.dataset
    return {
      # A dataset that is not resized has images of the size of the crop.
      'side': config.resize or config.image_size,
      'mode': config.resize_mode,
      'interpolation': config.interpolation,
    }

  def read(self, image: ImageLike) -> np.ndarray:
    """Decodes, resizes and crops an image.

    Returns:
      uint8 [image_size, image_size, 3].

    Raises:
      ValueError: if it is not an image, or incomplete.
      OSError: if the file cannot be read.
    """
    resized = images_lib.resize(_decode(image), **self._preprocessing)
    return images_lib.center_crop(
      np.asarray(resized), self.config.dataset.image_size
    )

  def __call__(self, images: Iterable[ImageLike]) -> np.ndarray:
    """Embeds images of any kinds and sizes, or vectors.

    Args:
      images: paths, bytes of files, Pillow images or uint8 arrays, mixed as you
        like; or one array, uint8 [num_images, height, width, 3]. After a run on
        vectors, one array, float [num_vectors, vector_dim], which may be
        memory-mapped.

    Returns:
      float32 [num_images, dim].

    Raises:
      ValueError: if an image cannot be read; the message names it. If vectors
        are not finite or of another dimension.
    """
    if self.vector_dim:
      return self.embed(_check_vectors(images, self.vector_dim))
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
      raise ValueError('Give a list of images, even for one: [image].')
    remaining, rows = enumerate(images), []
    with futures.ThreadPoolExecutor() as pool:

      def start_reading():
        return [
          pool.submit(self._read_numbered, *numbered)
          for numbered in itertools.islice(remaining, self._batch_size)
        ]

      reading = start_reading()
      while reading:
        batch = np.stack([future.result() for future in reading])
        reading = start_reading()  # While the device computes.
        rows.append(self.embed(batch))
    return np.concatenate([np.zeros((0, self.dim), np.float32), *rows])

  def _read_numbered(self, number: int, image: ImageLike) -> np.ndarray:
    try:
      return self.read(image)
    except (ValueError, OSError, MemoryError) as error:
      name = f'number {number}'
      if isinstance(image, str | os.PathLike):
        name = f"'{folders.escape(image)}'"
      raise ValueError(
        f'Image {name} cannot be read: {errors.one_line(error)}'
      ) from error

  def embed(self, images: np.ndarray) -> np.ndarray:
    """Embeds images that `read` has returned, or vectors.

    Args:
      images: uint8 [num_images, image_size, image_size, 3], or float
        [num_vectors, vector_dim].

    Returns:
      float32 [num_images, dim].

    Raises:
      ValueError: if a vector is not finite as float32; names its row.
    """
    rows = np.zeros((len(images), self.dim), np.float32)
    for begin in range(0, len(images), self._batch_size):
      batch = images[begin : begin + self._batch_size]
      if self.vector_dim:
        batch = _as_float32(batch, begin)
      padding = [(0, 0)] * batch.ndim
      padding[0] = (0, self._batch_size - len(batch))
      embeddings = self._forward(np.pad(batch, padding))
      rows[begin : begin + len(batch)] = np.asarray(embeddings)[: len(batch)]
    return rows

  @property
  def _batch_size(self) -> int:
    """The batch size, rounded up to a multiple of the number of devices."""
    return self._mesh.size * -(-self.batch_size // self._mesh.size)

  @functools.cached_property
  def _mesh(self) -> jax.sharding.Mesh:
    processes.devices()  # A clear error if there is none.
    return mesh_lib.make_mesh(jax.local_devices())

  @functools.cached_property
  def _variables(self) -> dict[str, Any]:
    params = {name: self.params[name] for name in ('backbone', 'head')}
    return {'params': params, **self.model_state}

  @functools.cached_property
  def _forward(self) -> Callable[[np.ndarray], jax.Array]:
    """A batch of what `embed` takes -> float32 [batch, dim]."""
    model = models.create_model(self.config, vector_dim=self.vector_dim)
    replicated = mesh_lib.replicated(self._mesh)
    by_row = mesh_lib.by_row(self._mesh)
    forward = jax.jit(
      functools.partial(model.apply, train=False),
      in_shardings=(replicated, by_row),
      out_shardings=replicated,
    )
    return functools.partial(
      forward, jax.device_put(self._variables, replicated)
    )

  def add_classes(
    self, images: Iterable[ImageLike], labels: Sequence[str]
  ) -> Embedder:
    """Returns an embedder with proxies for new classes, without training.

    A new proxy is the mean embedding of its class, with the mean norm of the
    other proxies; with several centers per class, those of k-means within it.
    The network stays as it is.

    Args:
      images: as for a call.
      labels: the name of each image's class, of classes that are new.

    Raises:
      ValueError: if the loss has no proxies of classes, or a class is not new.
    """
    name, proxies = self.config.loss.name, np.asarray(self.params['proxies'])
    if not losses.LOSSES[name].has_class_proxies or not self.class_names:
      raise ValueError(
        f'Classes can be added if they have proxies and names; the loss of '
        f'this run is {name}, and it has {len(self.class_names)} names.'
      )
    labels = [str(label) for label in labels]
    new = list(dict.fromkeys(labels))
    if known := sorted(set(new) & set(self.class_names)):
      raise ValueError(
        f'{len(known)} of the {len(new)} classes have proxies already, such as '
        f'{known[0]!r}: give new classes only.'
      )
    embeddings = self(images)
    if not labels or len(embeddings) != len(labels):
      raise ValueError(
        f'There are {len(embeddings)} images and {len(labels)} labels: give '
        'one label for each image, and at least one.'
      )
    centers = warm_start.class_centers(
      lambda: [embeddings],
      np.array([new.index(label) for label in labels]),
      1 if proxies.ndim == 2 else proxies.shape[1],
      seed=self.config.seed,
    )
    norm = np.mean(np.linalg.norm(proxies, axis=-1))
    added = norm * centers.reshape(-1, *proxies.shape[1:])
    return dataclasses.replace(
      self,
      params=self.params | {'proxies': np.concatenate([proxies, added])},
      class_names=(*self.class_names, *new),
    )

  def save(self, folder: str | os.PathLike) -> None:
    """Writes everything that `load` needs into a folder.

    Raises:
      ValueError: if the folder holds other files.
    """
    os.makedirs(folder, exist_ok=True)
    if set(os.listdir(folder)) - {_DESCRIPTION, _ARRAYS}:
      raise ValueError(
        f'{os.fspath(folder)!r} holds other files: name a new folder.'
      )
    tree = {'params': self.params, 'model_state': self.model_state}
    arrays = safetensors.save(configuration.flatten(tree))
    path = os.path.join(folder, _ARRAYS)
    with files.write_atomically(path, 'wb') as file:
      file.write(arrays)
    workdir_lib.write_json(
      os.path.join(folder, _DESCRIPTION),
      {
        'config': configuration.as_json(self.config),
        'class_names': list(self.class_names),
        'sha256': hashlib.sha256(arrays).hexdigest(),
      },
    )

  def save_timm(self, path: str | os.PathLike) -> None:
    """Writes the network for timm, the head as its classifier.

    The metadata has the arguments that build it:

      with safetensors.safe_open(path, 'pt') as file:
        facts = {k: json.loads(v) for k, v in file.metadata().items()}
      net = timm.create_model(**facts['create_model'], checkpoint_path=path)

    Where `layer_norm_of_pooled_features` is true, torch's layer_norm belongs
    between net.forward_head(..., pre_logits=True) and net.get_classifier().

    Args:
      path: of the file, ending with .safetensors.

    Raises:
      ValueError: if timm has no such network, pooling or head.
    """
    if not os.fspath(path).endswith('.safetensors'):
      raise ValueError(
        f'{os.fspath(path)!r} must end with .safetensors, by which timm knows '
        'the format.'
      )
    content = models.make_file(self.config, self.params, self.model_state)
    with files.write_atomically(path, 'wb') as file:
      file.write(content)

  def export(self) -> bytes:
    """Returns the network as StableHLO, for `jax.export.deserialize`.

    The exported function maps resized images, uint8 [batch, height, width, 3]
    with any batch size and sides of at least image_size, to float32 [batch,
    dim]. It includes the central crop and normalization, but no decoding or
    resizing. That of a run on vectors maps float32 [batch, vector_dim]. It runs
    on CPUs, NVIDIA GPUs and TPUs without this package.
    """
    model = models.create_model(self.config, vector_dim=self.vector_dim)
    if self.vector_dim:
      shape = jax_export.symbolic_shape(f'batch, {self.vector_dim}')
      return _export(
        functools.partial(model.apply, self._variables, train=False),
        jax.ShapeDtypeStruct(shape, jnp.float32),
      )
    size = self.config.dataset.image_size

    def embed(images):
      top, left = ((side - size) // 2 for side in images.shape[1:3])
      start = [jnp.asarray(x) for x in (0, top, left, 0)]
      crops = jax.lax.dynamic_slice(
        images, start, (images.shape[0], size, size, 3)
      )
      return model.apply(self._variables, crops, train=False)

    shape = jax_export.symbolic_shape(
      'batch, height, width, 3',
      constraints=(f'height >= {size}', f'width >= {size}'),
    )
    return _export(embed, jax.ShapeDtypeStruct(shape, jnp.uint8))


def _export(embed: Callable, batch: jax.ShapeDtypeStruct) -> bytes:
  platforms = ('cpu', 'cuda', 'tpu')
  return jax_export.export(jax.jit(embed), platforms=platforms)(
    batch
  ).serialize()


def load(path: str | os.PathLike) -> Embedder:
  """Loads the network of a run, or one that `Embedder.save` wrote.

  A run with validation classes gives the checkpoint that they selected, any
  other run its newest checkpoint.

  Args:
    path: the workdir of a run, or the folder of a saved embedder.

  Returns:
    A function from images to embeddings; see `help(embedder)`.

  Raises:
    ValueError: if the folder is neither, or cannot be read.
  """
  path = os.path.expanduser(os.fspath(path))
  saved = os.path.join(path, _DESCRIPTION)
  fields = configuration.SAVED_FIELDS | {'sha256': saved_json.TEXT}
  if description := saved_json.read(saved, fields):
    configuration.check_saved(saved, description['config'])
    with open(os.path.join(path, _ARRAYS), 'rb') as file:
      arrays = file.read()
    if hashlib.sha256(arrays).hexdigest() != description['sha256']:
      raise ValueError(f'The bytes of {path!r} have changed: save it again.')
    tree = configuration.unflatten(safetensors.load(arrays))
    return _make_embedder(
      saved, description, tree['params'], tree.get('model_state', {})
    )
  description = configuration.read_run(path)
  if not description:
    raise ValueError(
      f'{path!r} is neither the workdir of a run nor a saved embedder: it has '
      f'no run.json and no {_DESCRIPTION}.'
    )
  config = configuration.from_json(description['config'])
  folder, step = 'checkpoints', None
  if config.dataset.validation:
    history = metric_writer.read_metrics(path)
    if selected := selection.select(config, history):
      folder, step = 'selected', selected[0]
  workdir_lib.check_path(path)
  state = state_lib.read(os.path.join(path, folder), step=step)
  return _make_embedder(
    os.path.join(path, 'run.json'),
    description,
    fine_tuning.merge(state.evaluated['params']),
    state.evaluated['model_state'],
  )


def _make_embedder(path, description, params, model_state) -> Embedder:
  config = configuration.from_json(description['config'])
  class_names = tuple(description.get('class_names') or ())
  # Groups without arrays are not in the file of a saved embedder.
  params = {'backbone': {}, 'proxies': {}, **params}
  if config.proxies.sharded and class_names:
    # Sharded proxies end with rows of padding.
    params['proxies'] = params['proxies'][: len(class_names)]
  variables = _check_arrays(path, config, params, model_state, len(class_names))
  flat = configuration.flatten({'params': params, **model_state})
  model_state = _group(flat, variables)
  params |= model_state.pop('params', {})
  return Embedder(
    config=config,
    params=jax.tree.map(np.asarray, params),
    model_state=jax.tree.map(np.asarray, model_state),
    class_names=class_names,
  )


def _group(flat: dict, variables: dict, prefix: str = '') -> dict[str, Any]:
  """Returns flattened arrays in the groups of a network's variables.

  Names of groups contain periods, such as blocks.0, so that flattened names do
  not say where they divide.
  """
  return {
    name: _group(flat, x, f'{prefix}{name}.')
    if isinstance(x, dict)
    else flat[prefix + name]
    for name, x in variables.items()
  }


def _check_arrays(path, config, params, model_state, num_classes) -> dict:
  """Raises ValueError if the saved arrays are not those of the saved config.

  Returns the variables of the network, as shapes.

  Args:
    path: the file with the config, for the message.
    config: the config.
    params: the saved parameters.
    model_state: the saved batch statistics.
    num_classes: number of saved class names; 0 if there are none.
  """
  model = models.create_model(config, vector_dim=_vector_dim(config, params))
  variables = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    model.example(1),
  )
  given = {name: params.get(name, {}) for name in ('backbone', 'head')}
  wanted, given = (
    {name: np.shape(x) for name, x in configuration.flatten(tree).items()}
    for tree in (variables, {'params': given, **model_state})
  )
  for name in sorted(wanted.keys() | given.keys()):
    if wanted.get(name) != given.get(name):
      saved_json.fail(
        path,
        f'its config has {name} of shape {wanted.get(name)}, and the saved '
        f'network {given.get(name)}',
      )
  has_classes = losses.LOSSES[config.loss.name].has_class_proxies
  if has_classes and num_classes and num_classes != len(params['proxies']):
    saved_json.fail(
      path,
      f'it has {num_classes} class_names, and the saved network '
      f'{len(params["proxies"])} proxies',
    )
  return variables


def _vector_dim(config, params) -> int | None:
  """Returns the number of rows of the first kernel; None if it takes images."""
  if not models.BACKBONES[config.model.name].takes_vectors:
    return None
  head = configuration.flatten(params.get('head', {}))
  first = 'hidden' if config.model.head_hidden else 'embedding'
  # If the kernel is missing, `_check_arrays` says so.
  return len(head.get(f'{first}.kernel', [None]))


def _check_vectors(vectors: np.ndarray, dim: int) -> np.ndarray:
  vectors = np.asanyarray(vectors)
  if vectors.dtype.kind != 'f' or vectors.shape[1:] != (dim,):
    raise ValueError(
      f'The vectors are {vectors.dtype} {vectors.shape}: expected one array, '
      f'float [num_vectors, {dim}], as in the training of this network.'
    )
  return vectors


def _as_float32(vectors: np.ndarray, begin: int) -> np.ndarray:
  """Returns rows of vectors, the first of them the row `begin`, as float32.

  Raises:
    ValueError: if one is not finite.
  """
  with np.errstate(over='ignore'):
    vectors = np.asarray(vectors, np.float32)
  wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
  if len(wrong):
    raise ValueError(
      f'The vector of row {begin + wrong[0]}, counted from 0, has NaN, '
      'infinity or a value beyond float32.'
    )
  return vectors


def _decode(image: ImageLike) -> Image.Image:
  """Returns an image, upright and in RGB.

  Raises:
    ValueError: if it is not an image, or the path is not a regular file.
    OSError: if the file cannot be read.
  """
  if isinstance(image, str | os.PathLike):
    image = folders.read_file(image)
  if isinstance(image, bytes):
    return images_lib.decode(image)
  if isinstance(image, Image.Image):
    return images_lib.as_rgb(image)
  image = np.asarray(image)
  is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
  if image.dtype != np.uint8 or not is_image or not image.size:
    raise ValueError(
      f'it is {image.dtype} {image.shape}; expected uint8 [height, width, 3] '
      'or [height, width], a path, the bytes of a file or a Pillow image'
    )
  return Image.fromarray(image).convert('RGB')
