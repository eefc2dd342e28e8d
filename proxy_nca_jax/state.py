"""The state of training: created, saved, restored. All Orbax calls are here."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

from proxy_nca_jax import losses, proxies
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.runtime import errors, processes, signals

if TYPE_CHECKING:
  # Who trains without a config does without the library.
  import ml_collections

_logger = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a training step reads and writes.

  Attributes:
    step: int32 [], steps done.
    params: {'backbone', 'head', 'proxies'}: trees of arrays, the optimiser's
      groups; 'proxies' is {} where the loss has none.
    loss_state: what the loss is given besides, not learned: `centers` that
      follow the embeddings, or the `assignment` of classes to proxies.
    model_state: what the network carries beside them: batch statistics.
    opt_state: of the optimiser.
  """

  step: jax.Array
  params: dict[str, Any]
  loss_state: dict[str, jax.Array]
  model_state: dict[str, Any]
  opt_state: optax.OptState


def create_loss_arrays(
  config: ml_collections.ConfigDict,
  keys: Sequence[jax.Array],
  *,
  class_sizes: np.ndarray,
) -> dict[str, jax.Array]:
  """Draws the arrays that `losses.NEEDS` tells of the loss, by their names.

  Args:
    config: of the run.
    keys: three, of proxies, centers and assignment.
    class_sizes: int [num_classes], the training examples of each.
  """
  needs, num_classes = losses.NEEDS[config.loss.name], len(class_sizes)
  num_free = config.loss.num_proxies or num_classes

  def draw(key, form):
    num_centers = config.loss.num_centers if form == 'several' else 1
    number = num_free if form == 'free' else num_classes * num_centers
    points = proxies.init_proxies(
      key, number, config.model.embedding_dim, norm=config.proxies.init_norm
    )
    if form == 'several':
      return points.reshape(num_classes, num_centers, -1)
    return points

  arrays = {}
  if needs.proxies:
    arrays['proxies'] = draw(keys[0], needs.proxies)
  if needs.centers:
    arrays['centers'] = draw(keys[1], needs.centers)
  if needs.assignment:
    arrays['assignment'] = (
      proxies.assignment_by_size(class_sizes, num_free)
      if config.proxies.by_size
      else proxies.random_assignment(keys[2], num_classes, num_free)
    )
  return arrays


def abstract(
  config: ml_collections.ConfigDict,
  model,
  optimizer: optax.GradientTransformation,
  *,
  class_sizes: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns the shapes, dtypes and shardings of what `create` returns."""
  init, shardings = _make_init(config, model, optimizer, class_sizes, mesh)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    jax.eval_shape(init, jax.random.key(config.seed)),
    shardings,
  )


def create(
  config: ml_collections.ConfigDict,
  model,
  optimizer: optax.GradientTransformation,
  *,
  class_sizes: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Initialises everything from `config.seed`, on the devices of a mesh.

  Each has a copy; but with `config.proxies.sharded` they share the rows of the
  proxies, and of what the optimiser keeps of them, filled up with rows of 0.
  """
  init, shardings = _make_init(config, model, optimizer, class_sizes, mesh)
  # An argument: one program serves all seeds.
  return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))


def _make_init(config, model, optimizer, class_sizes, mesh):
  """Returns (key -> TrainState) and where its arrays lie."""

  def init(key):
    model_key, *loss_keys = jax.random.split(key, 4)
    size = config.dataset.image_size
    images = jnp.zeros((1, size, size, 3))
    variables = model.init(model_key, images, train=False)
    params = variables.pop('params')
    loss_state = create_loss_arrays(config, loss_keys, class_sizes=class_sizes)
    params['proxies'] = loss_state.pop('proxies', {})
    if config.proxies.sharded:
      params['proxies'] = mesh_lib.pad_rows(params['proxies'], mesh)
    return TrainState(
      step=jnp.int32(0),
      params=params,
      loss_state=loss_state,
      model_state=variables,
      opt_state=optimizer.init(params),
    )

  def sharding(path, array):
    is_of_proxies = jax.tree_util.DictKey('proxies') in path and array.ndim > 1
    if config.proxies.sharded and is_of_proxies:
      return mesh_lib.by_row(mesh)
    return mesh_lib.replicated(mesh)

  shardings = jax.tree_util.tree_map_with_path(
    sharding, jax.eval_shape(init, jax.random.key(config.seed))
  )
  return init, shardings


class Checkpoints:
  """The saved states of a run, in a folder of its workdir.

  A save happens in the background. It becomes visible by a rename when it is
  whole, so that a killed process leaves the states before it. Each state
  carries sums over its bytes: Orbax does not notice changed ones.
  """

  def __init__(self, workdir: str, *, keep: int, folder: str = 'checkpoints'):
    self._directory = os.path.join(os.path.abspath(workdir), folder)
    self._keep = keep
    self._checkpointer = None
    self._open()

  def _open(self):
    if self._checkpointer is not None:
      self._checkpointer.close()
    self._checkpointer = ocp.training.Checkpointer(
      self._directory,
      preservation_policy=ocp.training.preservation_policies.LatestN(
        self._keep
      ),
      cleanup_tmp_directories=True,
    )
    self._pending = None

  @property
  def steps(self) -> list[int]:
    """The steps of the saved states, ascending."""
    return processes.run_on_primary(
      lambda: sorted(entry.step for entry in self._checkpointer.checkpoints)
    )

  def save(self, step: int, state: TrainState) -> None:
    """Begins to save a state, unless that step is saved; waits for the last."""
    self.wait()
    if step not in self.steps:
      self._pending = self._checkpointer.save_async(
        step, {'state': _as_dict(state), 'sums': _sums(state)}
      )

  def wait(self) -> None:
    """Waits for the save that is under way.

    Raises:
      OSError: if it failed, such as for a full disk.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def restore(
    self, like: TrainState, *, step: int | None = None
  ) -> TrainState | None:
    """Restores the newest whole state, placed as `like`; None if none is saved.

    A state that cannot be read, or whose bytes have changed, is named, moved
    aside to STEP.broken, and the one before it is taken.

    Args:
      like: a state of the same structure and sharding.
      step: the only one to take; by default any.

    Raises:
      ValueError: if such states are saved and none can be read.
    """
    steps = [s for s in self.steps if step in (None, s)]
    for step in reversed(steps):
      state = None
      try:
        state = self._restore_step(step, like)
      except Exception as error:  # Orbax lets the types of its readers through.
        _logger.warning(
          'The checkpoint of step %d cannot be used (%s: %s). It is moved to '
          '%d.broken.',
          step,
          type(error).__name__,
          errors.one_line(error),
          step,
        )
      if processes.true_on_all(state is not None):
        return state
      processes.run_on_primary(functools.partial(self._move_aside, step))
      self._open()
    if steps:
      raise ValueError(
        f'None of the checkpoints of steps {steps} in {self._directory!r} can '
        'be read. Use another workdir, or delete this one to start again.'
      )
    return None

  def _restore_step(self, step, like):
    like_saved = {'state': _as_dict(like), 'sums': _sums(like)}
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      like_saved,
    )
    # Rows of 0 are added to sharded proxies for another number of devices, or
    # taken away; the sums do not see them, and would see any others.
    context = ocp.Context()
    context.array.loading.enable_padding_and_truncation = True
    with context:
      saved = self._checkpointer.load(step, abstract)
    state = TrainState(**saved['state'])
    wrong = np.flatnonzero(np.asarray(_sums(state) != saved['sums']))
    if wrong.size or int(state.step) != step:
      raise ValueError(f'the bytes of {max(wrong.size, 1)} arrays have changed')
    return state

  def _move_aside(self, step):
    path = os.path.join(self._directory, str(step))
    target, number = f'{path}.broken', 1
    while os.path.exists(target):
      number += 1
      target = f'{path}.broken{number}'
    os.rename(path, target)

  def close(self) -> None:
    self.wait()
    self._checkpointer.close()


def read(folder: str, *, step: int | None = None) -> TrainState:
  """Reads a saved state onto one device, without what the optimiser keeps.

  It needs no state alike, and disturbs no run that is at work there.

  Args:
    folder: of checkpoints.
    step: of the state; by default the newest.

  Returns:
    The state; `opt_state` is ().

  Raises:
    ValueError: if there is none, it cannot be read, or its bytes have changed.
  """
  names = os.listdir(folder) if os.path.isdir(folder) else []
  steps = [int(name) for name in names if name.isdigit()]
  if not steps or step not in (None, *steps):
    which = '' if step is None else f' of step {step}'
    raise ValueError(f'There is no checkpoint{which} in {folder!r}.')
  path = os.path.join(os.path.abspath(folder), str(step or max(steps)))
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    # Orbax takes a Ctrl-C for a broken file, or hangs.
    with context, signals.StopSignals() as stop_signals:
      abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        ocp.metadata(path).metadata,
      )
      del abstract['state']['opt_state']
      saved = ocp.load(path, abstract)
    stop_signals.check()
  except Exception as error:  # Orbax lets the types of its readers through.
    raise ValueError(
      f'The checkpoint {path!r} cannot be read ({type(error).__name__}: '
      f'{errors.one_line(error)}).'
    ) from error
  state = TrainState(**saved['state'], opt_state=())
  # Those of the optimiser's arrays are the last.
  sums = _sums(state)
  if not np.array_equal(sums, saved['sums'][: sums.size]):
    raise ValueError(f'The bytes of the checkpoint {path!r} have changed.')
  return state


def _as_dict(state: TrainState) -> dict[str, Any]:
  return {
    field.name: getattr(state, field.name)
    for field in dataclasses.fields(state)
  }


@jax.jit
def _sums(state: TrainState) -> jax.Array:
  """Sums the words of each array, weighted by place, modulo 2^32.

  Weights are odd, so that no change of one word is lost. Integer sums do not
  depend on their order, nor on how an array is divided among devices.
  """

  def words_sum(array):
    if array.dtype == bool:
      array = array.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, bits).reshape(-1)
    weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return jnp.sum(words.astype(jnp.uint32) * weights, dtype=jnp.uint32)

  return jnp.stack([words_sum(array) for array in jax.tree.leaves(state)])
