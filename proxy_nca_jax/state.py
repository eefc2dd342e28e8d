"""The training state: created, saved, restored. Only this module uses Orbax."""

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

from proxy_nca_jax import fine_tuning, losses, proxies
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.runtime import errors, processes, signals

if TYPE_CHECKING:
  # benchmarks/train_step.py runs without ml_collections.
  import ml_collections

_logger = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The arrays that a training step reads and writes.

  Attributes:
    step: int32 [], the number of steps taken, skipped ones included.
    params: {'backbone', 'head', 'proxies'}: trees of arrays, the groups of the
      optimizer; 'proxies' is {} if the loss has none.
    loss_state: arrays of the loss that are not trained: `centers`, which follow
      the embeddings, the `assignment` of classes to proxies, or the `memory` of
      earlier batches.
    model_state: untrained variables of the network: batch statistics.
    averages: {'params', 'model_state'}, exponential moving averages of both
      over the steps; {} without `config.optimizer.ema_decay`.
    skipped_steps: int32 [], steps skipped because they were not finite.
    skipped_in_row: int32 [], how many of them were the most recent steps.
    opt_state: the state of the optimizer; the last field, so that the checksums
      of all others come first.
  """

  step: jax.Array
  params: dict[str, Any]
  loss_state: dict[str, Any]
  model_state: dict[str, Any]
  averages: dict[str, Any]
  skipped_steps: jax.Array
  skipped_in_row: jax.Array
  opt_state: optax.OptState

  @property
  def evaluated(self) -> dict[str, Any]:
    """{'params', 'model_state'} to evaluate: the averages, if there are any."""
    return self.averages or _without_averages(self)

  def restart_averages(self) -> TrainState:
    """Returns the state; its averages, if it has any, are its values."""
    if not self.averages:
      return self
    # A training step donates its arguments: no array may be there twice.
    copies = jax.tree.map(jnp.copy, _without_averages(self))
    return dataclasses.replace(self, averages=copies)

  def skip_step(self) -> TrainState:
    """Returns the state after a step that is counted and changes nothing."""
    return dataclasses.replace(
      self,
      step=self.step + 1,
      skipped_steps=self.skipped_steps + 1,
      skipped_in_row=self.skipped_in_row + 1,
    )


def _without_averages(state: TrainState) -> dict[str, Any]:
  return {'params': state.params, 'model_state': state.model_state}


def create_loss_arrays(
  config: ml_collections.ConfigDict,
  keys: Sequence[jax.Array],
  *,
  class_sizes: np.ndarray,
) -> dict[str, Any]:
  """Draws the arrays that the loss takes beyond embeddings and labels.

  Args:
    config: the run's config.
    keys: three keys, for proxies, centers and assignment.
    class_sizes: int [num_classes], training examples of each class.

  Returns:
    Those of `proxies`, `centers` and `assignment` that the loss's row in
    `losses.LOSSES` names, and `memory` if it is configured.
  """
  loss, num_classes = losses.LOSSES[config.loss.name], len(class_sizes)
  num_unassigned = config.loss.num_proxies or num_classes
  dim, norm = config.model.embedding_dim, config.proxies.init_norm
  if config.proxies.init in ('kaiming', 'xavier'):
    norm = proxies.initial_norm(config.proxies.init, num_classes, dim)

  def draw(key, form):
    if form == losses.UNASSIGNED:
      return proxies.init_proxies(key, num_unassigned, dim, norm=norm)
    num_centers = config.loss.num_centers if form == losses.MULTI_CENTER else 1
    rows = proxies.init_proxies(key, num_classes * num_centers, dim, norm=norm)
    if form == losses.MULTI_CENTER:
      return rows.reshape(num_classes, num_centers, dim)
    return rows

  arrays = {}
  if loss.proxies:
    arrays['proxies'] = draw(keys[0], loss.proxies)
  if loss.centers:
    arrays['centers'] = draw(keys[1], loss.centers)
  if loss.has_assignment:
    arrays['assignment'] = (
      proxies.assignment_by_size(class_sizes, num_unassigned)
      if config.proxies.by_size
      else proxies.random_assignment(keys[2], num_classes, num_unassigned)
    )
  if config.loss.memory_size:
    arrays['memory'] = losses.init_memory(config.loss.memory_size, dim)
  return arrays


def abstract(
  config: ml_collections.ConfigDict,
  model,
  optimizer: optax.GradientTransformation,
  *,
  class_sizes: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns the shapes, dtypes and shardings of the state from `create`."""
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
  """Initializes everything from `config.seed`, on the devices of a mesh.

  A backbone that gets pretrained weights (`config.model.init_from`) is 0.

  Arrays are replicated. With `config.proxies.sharded` the rows of the proxies,
  and of their optimizer state, are divided among the devices, with rows of 0 as
  padding.
  """
  init, shardings = _make_init(config, model, optimizer, class_sizes, mesh)
  # The key is an argument: one compiled program serves all seeds.
  return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))


def _make_init(config, model, optimizer, class_sizes, mesh):
  """Returns (key -> TrainState) and the shardings of its arrays."""

  def init(key):
    model_key, *loss_keys = jax.random.split(key, 4)
    example = model.example(1)
    images = jnp.zeros(example.shape, example.dtype)
    variables = model.init(model_key, images, train=False)
    # A backbone of vectors has no parameters.
    params = {'backbone': {}, **variables.pop('params')}
    if config.model.init_from:
      # Random weights would be replaced, after seconds to compile them.
      params['backbone'] = jax.tree.map(jnp.zeros_like, params['backbone'])
    if config.model.lora_rank:
      params['adapters'] = fine_tuning.make_adapters(
        jax.random.fold_in(model_key, 1),
        params['backbone'],
        rank=config.model.lora_rank,
        layers=config.model.lora_layers,
      )
    loss_state = create_loss_arrays(config, loss_keys, class_sizes=class_sizes)
    params['proxies'] = loss_state.pop('proxies', {})
    if config.proxies.sharded:
      params['proxies'] = mesh_lib.pad_rows(params['proxies'], mesh)
    averages = {}
    if config.optimizer.ema_decay:
      averages = {'params': params, 'model_state': variables}
    return TrainState(
      step=jnp.int32(0),
      params=params,
      loss_state=loss_state,
      model_state=variables,
      averages=averages,
      skipped_steps=jnp.int32(0),
      skipped_in_row=jnp.int32(0),
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
  """The checkpoints of a run, in a folder of its workdir.

  Saving is asynchronous. A checkpoint becomes visible by a rename when it is
  complete, so a killed process leaves the previous checkpoints intact. Each one
  carries checksums of its arrays, since Orbax does not detect changed bytes.
  """

  def __init__(self, workdir: str, *, keep: int, folder: str = 'checkpoints'):
    self.directory = os.path.join(os.path.abspath(workdir), folder)
    self._keep = keep
    self._checkpointer = None
    self._open()

  def _open(self):
    if self._checkpointer is not None:
      self._checkpointer.close()
    self._checkpointer = ocp.training.Checkpointer(
      self.directory,
      preservation_policy=ocp.training.preservation_policies.LatestN(
        self._keep
      ),
      cleanup_tmp_directories=True,
    )
    self._pending = None

  @property
  def steps(self) -> list[int]:
    """Steps of the checkpoints, ascending."""
    return processes.run_on_primary(
      lambda: sorted(entry.step for entry in self._checkpointer.checkpoints)
    )

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving a state, unless its step is saved; waits for the last."""
    self.wait()
    if step not in self.steps:
      self._pending = self._checkpointer.save_async(
        step, {'state': _as_dict(state), 'checksums': _checksums(state)}
      )

  def wait(self) -> None:
    """Waits for the save in progress.

    Raises:
      OSError: if it failed, for instance because the disk is full.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def read_back(self, step: int, state: TrainState) -> None:
    """Makes sure that a saved state can be restored.

    Args:
      step: the step of the checkpoint.
      state: the state that was saved.

    Raises:
      ValueError: if the checkpoint cannot be read or differs from the state.
    """
    self.wait()
    try:
      restored = self._restore_step(step, state)
      if np.any(_checksums(restored) != _checksums(state)):
        raise ValueError('it differs from the state that was saved')
    except Exception as error:  # Orbax lets the types of its readers through.
      raise ValueError(
        f'The first checkpoint of this run, of step {step} in '
        f'{self.directory!r}, cannot be read back ({type(error).__name__}: '
        f'{errors.one_line(error)}). Use a workdir on another file system.'
      ) from error

  def restore(
    self, like: TrainState, *, step: int | None = None
  ) -> TrainState | None:
    """Restores the newest intact checkpoint; returns None if there is none.

    A checkpoint that cannot be read, or whose bytes have changed, is logged and
    renamed to STEP.broken, and the one before it is tried.

    Args:
      like: a state with the structure and the shardings to restore into.
      step: the only step to try; by default all, newest first.

    Raises:
      ValueError: if there are checkpoints but none is intact.
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
        f'None of the checkpoints of steps {steps} in {self.directory!r} can '
        'be read. Use another workdir, or delete this one to start again.'
      )
    return None

  def _restore_step(self, step, like):
    like_saved = {'state': _as_dict(like), 'checksums': _checksums(like)}
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      like_saved,
    )
    # The padding of sharded proxies depends on the number of devices. The
    # checksums ignore added or removed rows of 0 and detect any others.
    context = ocp.Context()
    context.array.loading.enable_padding_and_truncation = True
    with context:
      saved = self._checkpointer.load(step, abstract)
    state = TrainState(**saved['state'])
    wrong = np.flatnonzero(np.asarray(_checksums(state) != saved['checksums']))
    if wrong.size or int(state.step) != step:
      raise ValueError(f'the bytes of {max(wrong.size, 1)} arrays have changed')
    return state

  def _move_aside(self, step):
    path = os.path.join(self.directory, str(step))
    target, number = f'{path}.broken', 1
    while os.path.exists(target):
      number += 1
      target = f'{path}.broken{number}'
    os.rename(path, target)

  def close(self) -> None:
    self.wait()
    self._checkpointer.close()


def read(folder: str, *, step: int | None = None) -> TrainState:
  """Reads a checkpoint onto one device, without the state of the optimizer.

  It needs no state to restore into and does not disturb a run that is writing
  to the folder. A checkpoint that cannot be read is logged, and the one before
  it is tried.

  Args:
    folder: the folder of the checkpoints.
    step: the only step to try; by default all, newest first.

  Returns:
    The state; its `opt_state` is ().

  Raises:
    ValueError: if there is no checkpoint, or none is intact.
  """
  names = os.listdir(folder) if os.path.isdir(folder) else []
  steps = sorted(int(name) for name in names if name.isdigit())
  if not steps or step not in (None, *steps):
    which = '' if step is None else f' of step {step}'
    raise ValueError(f'There is no checkpoint{which} in {folder!r}.')
  if step is not None:
    steps = [step]
  while True:
    path = os.path.join(os.path.abspath(folder), str(steps.pop()))
    try:
      return _read(path)
    except ValueError as error:
      if not steps:
        raise
      _logger.warning('%s Reading the one of step %d.', error, steps[-1])


def _read(path: str) -> TrainState:
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    # A KeyboardInterrupt inside Orbax is reported as a broken file, or hangs.
    with context, signals.StopSignals() as stop_signals:
      abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        ocp.metadata(path).metadata,
      )
      del abstract['state']['opt_state']
      saved = ocp.load(path, abstract)
    stop_signals.check()
    state = TrainState(**saved['state'], opt_state=())
  except Exception as error:  # Orbax lets the types of its readers through.
    raise ValueError(
      f'The checkpoint {path!r} cannot be read ({type(error).__name__}: '
      f'{errors.one_line(error)}).'
    ) from error
  checksums = _checksums(state)
  if not np.array_equal(checksums, saved['checksums'][: checksums.size]):
    raise ValueError(f'The bytes of the checkpoint {path!r} have changed.')
  return state


def _as_dict(state: TrainState) -> dict[str, Any]:
  return {
    field.name: getattr(state, field.name)
    for field in dataclasses.fields(state)
  }


@jax.jit
def _checksums(state: TrainState) -> jax.Array:
  """Returns uint32 [num_arrays]: sums of words weighted by position, mod 2^32.

  Weights are odd, so that a change of any single word changes the sum. Integer
  addition is associative: the sums do not depend on how an array is sharded.
  """

  def checksum(array):
    if array.dtype == bool:
      array = array.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, bits).reshape(-1)
    weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return jnp.sum(words.astype(jnp.uint32) * weights, dtype=jnp.uint32)

  return jnp.stack([checksum(array) for array in jax.tree.leaves(state)])
