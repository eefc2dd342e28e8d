"""Training: the step, and the run around it."""

import contextlib
import functools
import importlib.metadata
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from clu import parameter_overview
from jax.experimental import multihost_utils

from proxy_nca_jax import (
  datasets,
  evaluate,
  input_pipeline,
  interruption,
  losses,
  metric_writer,
  models,
  proxies,
)
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax import workdir as workdir_lib

_logger = logging.getLogger(__name__)


def make_loss(
    config: ml_collections.ConfigDict,
) -> Callable[..., jax.Array]:
  """Returns the loss that `config.loss` names, with its arguments.

  Raises:
    ValueError: if the name or an argument is unknown, or they do not fit.
  """
  name, kwargs = config.loss.name, config.loss.kwargs.to_dict()
  if name not in losses.LOSSES:
    raise ValueError(
      f'Unknown loss {name!r} (config.loss.name): choose one of '
      f'{", ".join(sorted(losses.LOSSES))}.'
    )
  signature = inspect.signature(losses.LOSSES[name]).parameters.values()
  known = {p.name for p in signature if p.kind is p.KEYWORD_ONLY} - {'where'}
  if unknown := sorted(set(kwargs) - known):
    raise ValueError(
      f'The loss {name!r} has no argument {", ".join(unknown)} '
      f'(config.loss.kwargs): choose among {", ".join(sorted(known))}.'
    )
  loss = functools.partial(losses.LOSSES[name], **kwargs)
  rows = jax.ShapeDtypeStruct((2, 2), jnp.float32)
  jax.eval_shape(loss, rows, rows, jax.ShapeDtypeStruct((2,), jnp.int32))
  return loss


def make_train_step(
    model,
    optimizer: optax.GradientTransformation,
    loss_fn: Callable[..., jax.Array],
    normalize: Callable[[jax.Array], jax.Array],
) -> Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]:
  """Returns the jitted step: (state, batch) -> (state, metrics).

  The mean of the loss, the batch statistics and the metrics are those of the
  global batch, however many devices share it. The given state is donated.
  """

  def train_step(state, batch):
    images = normalize(batch['image'])

    def mean_loss(params):
      params = dict(params)
      points = params.pop('proxies')
      embeddings, model_state = model.apply(
        {'params': params, **state.model_state},
        images,
        train=True,
        mutable=list(state.model_state),
      )
      loss = loss_fn(embeddings, points, batch['label'], where=batch['mask'])
      # A loss of the batch as a whole is a scalar already.
      if loss.ndim:
        loss = jnp.sum(loss) / jnp.maximum(jnp.sum(batch['mask']), 1)
      return loss, (embeddings, model_state)

    (loss, (embeddings, model_state)), gradients = jax.value_and_grad(
      mean_loss, has_aux=True
    )(state.params)
    nearest = proxies.nearest_proxies(embeddings, state.params['proxies'])
    metrics = {
      'loss': loss,
      'gradient_norm': optax.tree.norm(gradients),
      'proxy_accuracy': jnp.mean(
        nearest == batch['label'], where=batch['mask']
      ),
    }
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    state = state_lib.TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      model_state=model_state,
      opt_state=opt_state,
    )
    return state, metrics

  return jax.jit(train_step, donate_argnums=0)


def make_embed_fn(model, normalize, mesh) -> Callable[..., jax.Array]:
  """Returns (state, batch) -> embeddings float32 [batch, dim]."""

  @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(mesh))
  def forward(params, model_state, images):
    params = {name: params[name] for name in ('backbone', 'head')}
    variables = {'params': params, **model_state}
    return model.apply(variables, normalize(images), train=False)

  def embed_fn(state, batch):
    images = mesh_lib.shard_batch({'image': batch['image']}, mesh)['image']
    return forward(state.params, state.model_state, images)

  return embed_fn


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if a number cannot be; names are checked at their use."""
  for field, least in (
    ('num_steps', 1), ('batch_size', 1), ('log_every', 1), ('save_every', 1),
    ('eval_every', 0), ('keep_checkpoints', 1),
  ):
    if config[field] < least:
      raise ValueError(
        f'config.{field} ({config[field]}) must be at least {least}.'
      )
  if not config.evaluation.recall_at or min(config.evaluation.recall_at) < 1:
    raise ValueError(
      f'config.evaluation.recall_at ({config.evaluation.recall_at}) must hold '
      'numbers of at least 1.'
    )
  for field, size in (
    ('batch_size', config.batch_size),
    ('evaluation.batch_size', config.evaluation.batch_size),
  ):
    if size < 1 or size % jax.device_count():
      raise ValueError(
        f'Batch size ({size}, config.{field}) must be divisible by the number '
        f'of devices ({jax.device_count()}).'
      )


class _Run(NamedTuple):
  """What `_fit` needs beside the configuration."""

  workdir: str
  data: datasets.Datasets
  signals: interruption.StopSignals
  checkpoints: state_lib.Checkpoints
  selected: state_lib.Checkpoints
  writer: metric_writer.MetricWriter
  batches: Iterator[dict[str, np.ndarray]]
  train_step: Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]
  score: Callable[[state_lib.TrainState, datasets.Split], dict[str, float]]
  mesh: jax.sharding.Mesh


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str, *, mode: str = 'train'
) -> dict:
  """Trains as configured, resuming what is saved in the workdir, and scores.

  Args:
    config: of the run, as configs/default.py.
    workdir: gets checkpoints, metrics.jsonl, tensorboard, log.txt and
      results.json; is made if missing.
    mode: 'train', or 'eval' to score the newest checkpoint and train nothing.

  Returns:
    The content of results.json; scores are fractions.

  Raises:
    ValueError: if the configuration, the data or the workdir is at fault, or
      the loss is not finite; nothing that is saved is lost.
    interruption.Stopped: on SIGTERM or Ctrl-C, the state being saved.
  """
  check_config(config)
  loss_fn = make_loss(config)
  model = models.create_model(config)
  optimizer = optimizer_lib.make_optimizer(config)
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(interruption.StopSignals())
    stack.enter_context(workdir_lib.hold(workdir))
    saved = workdir_lib.read_json(os.path.join(workdir, 'run.json'))
    if saved:
      workdir_lib.check_same_run(
        config,
        saved['config'],
        may_add_steps=not optimizer_lib.depends_on_num_steps(config),
      )
    elif mode == 'eval':
      raise ValueError(f'{workdir!r} holds no run: train one first.')
    results = workdir_lib.read_json(os.path.join(workdir, 'results.json'))
    if mode == 'train' and results and results['step'] >= config.num_steps:
      _logger.info('This run is finished, at step %d.', results['step'])
      _log_table(results)
      return results

    data = _load_in_turn(config)
    _describe(data)
    input_pipeline.check_image_size(data.test, config.dataset)
    if saved and saved['dataset_digest'] != data.digest:
      raise ValueError(
        'The data set has changed since this run began (other classes, '
        'records or split). Restore it, or use another workdir.'
      )
    workdir_lib.write_json(
      os.path.join(workdir, 'run.json'),
      {
        'config': workdir_lib.as_json(config),
        'dataset_digest': data.digest,
      },
    )
    mesh = mesh_lib.make_mesh()
    process = (jax.process_index(), jax.process_count())
    normalize = functools.partial(
      input_pipeline.normalize,
      mean=config.dataset.mean,
      std=config.dataset.std,
    )
    score = functools.partial(
      _score_state, make_embed_fn(model, normalize, mesh), config, mesh
    )
    state = state_lib.create(
      config,
      model,
      optimizer,
      num_classes=data.train.num_classes,
      sharding=mesh_lib.replicated(mesh),
    )
    _logger.debug(parameter_overview.get_parameter_overview(state.params))
    checkpoints = state_lib.Checkpoints(workdir, keep=config.keep_checkpoints)
    stack.callback(checkpoints.close)
    if mode == 'eval':
      state = checkpoints.restore(state)
      if state is None:
        raise ValueError(f'{workdir!r} holds no checkpoint: train first.')
      results = {
        'trained': score(state, data.test, num_resamples=1000),
        'step': int(state.step),
      }
      workdir_lib.write_json(os.path.join(workdir, 'evaluation.json'), results)
      _log_table(results)
      return results

    baselines = _read_baselines(workdir)
    is_new = not baselines
    if is_new:
      _logger.info('Scoring raw pixels and the untrained network')
      pixels = input_pipeline.raw_pixels(data.test)
      baselines = {
        'untrained': score(state, data.test),
        'raw_pixels': evaluate.score(
          pixels, data.test.labels, **_score_settings(config, mesh, data.test)
        ),
      }
      del pixels
    _check_select_by(config, baselines['untrained'])
    selected = state_lib.Checkpoints(workdir, keep=2, folder='selected')
    stack.callback(selected.close)
    state = checkpoints.restore(state) or state
    first_step = int(state.step)
    if first_step:
      _logger.info('Resuming after step %d', first_step)
    writer = metric_writer.MetricWriter(workdir, first_step=first_step)
    stack.callback(writer.close)
    if is_new:
      writer.write_texts(0, {'config': f'```\n{config}\n```'})
      writer.write_scalars(0, workdir_lib.flatten(baselines))
    batches = input_pipeline.train_batches(
      data.train, config, first_step=first_step, process=process
    )
    stack.callback(batches.close)
    run = _Run(
      workdir=workdir,
      data=data,
      signals=signals,
      checkpoints=checkpoints,
      selected=selected,
      writer=writer,
      batches=batches,
      train_step=make_train_step(model, optimizer, loss_fn, normalize),
      score=score,
      mesh=mesh,
    )
    state = _fit(config, state, run)
    trained = score(state, data.test)
    writer.write_scalars(
      config.num_steps, workdir_lib.flatten({'test': trained})
    )
    results = {
      **_score_selected(config, state, run),
      'trained': trained,
      **baselines,
      'step': config.num_steps,
      'dataset': _summary(data),
      'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      'versions': versions(),
    }
    workdir_lib.write_json(os.path.join(workdir, 'results.json'), results)
    _log_table(results)
    return results


def _fit(
    config: ml_collections.ConfigDict, state: state_lib.TrainState, run: _Run
) -> state_lib.TrainState:
  """Trains up to `config.num_steps`, logging, scoring and saving.

  Raises:
    ValueError: if a loss or gradient is not finite; no such state is saved.
    interruption.Stopped: on a signal, the state being saved.
  """
  done, last = int(state.step), config.num_steps
  progress = metric_writer.Progress(
    run.writer, num_steps=last, batch_size=config.batch_size
  )
  try:
    # A run that was stopped just before an evaluation makes up for it.
    if done and _is_evaluated(config, done) and not _is_written(done, run):
      _evaluate(config, state, run)
    while done < last:
      with run.signals.deferred():
        batch = next(run.batches)
        losses.check_labels(batch['label'], run.data.train.num_classes)
        state, metrics = run.train_step(
          state, mesh_lib.shard_batch(batch, run.mesh)
        )
        done += 1
        progress.add(done, metrics)
        if done == last or done % config.log_every == 0:
          progress.report()
      # Before the save, so that a run that resumes after it has the scores.
      if _is_evaluated(config, done):
        progress.check()
        _evaluate(config, state, run)
        progress.restart_clock()
      with run.signals.deferred():
        if done == last or done % config.save_every == 0:
          # A state is saved only if all losses before it are finite.
          progress.check()
          run.selected.wait()
          run.checkpoints.save(done, state)
    run.checkpoints.wait()
  except interruption.Stopped:
    progress.check()
    run.selected.wait()
    run.checkpoints.save(done, state)
    run.checkpoints.wait()
    _logger.info(
      'Stopped after step %d of %d, saved. The same command goes on.',
      done, last,
    )
    raise
  return state


def _load_in_turn(config: ml_collections.ConfigDict) -> datasets.Datasets:
  """Loads on process 0 first, which prepares; the others wait for it."""
  if jax.process_count() == 1:
    return datasets.load(config)
  data = datasets.load(config) if jax.process_index() == 0 else None
  multihost_utils.sync_global_devices('process 0 has prepared the data set')
  return data or datasets.load(config)


def _is_evaluated(config, step: int) -> bool:
  """Whether a step is scored while training; the last one is in any case."""
  if step == config.num_steps:
    return bool(config.dataset.validation)
  return bool(config.eval_every) and step % config.eval_every == 0


def _evaluate(config, state: state_lib.TrainState, run: _Run) -> None:
  """Scores a state on the validation classes if there are, else on the test.

  The best state on the validation classes so far is kept.
  """
  step = int(state.step)
  title = _evaluated_split(run)
  scores = run.score(state, run.data.validation or run.data.test)
  name, value = next(iter(scores.items()))
  _logger.info(
    'step %d/%d  %s %.2f%% on the %s classes',
    step, config.num_steps, name, 100 * value, title,
  )
  with run.signals.deferred():
    run.writer.write_scalars(step, workdir_lib.flatten({title: scores}))
    if run.data.validation and _select(config, run.workdir)[0] == step:
      run.selected.save(step, state)


def _evaluated_split(run: _Run) -> str:
  return 'validation' if run.data.validation else 'test'


def _is_written(step: int, run: _Run) -> bool:
  """Whether a step's evaluation is among the metrics."""
  return any(
    name.startswith(_evaluated_split(run))
    for row in metric_writer.read_metrics(run.workdir)
    if row['step'] == step
    for name in row
  )


def _select(config, workdir: str) -> tuple[int, float]:
  """Returns the first step with the best validation score, and that score."""
  name = f'validation.{config.evaluation.select_by}'
  rows = [r for r in metric_writer.read_metrics(workdir) if name in r]
  best = max(rows, key=lambda row: row[name])
  return best['step'], best[name]


def _score_selected(config, state: state_lib.TrainState, run: _Run) -> dict:
  """Scores what the validation classes selected on the test classes."""
  if not run.data.validation:
    return {}
  step, value = _select(config, run.workdir)
  if step != config.num_steps:
    state = run.selected.restore(state, step=step)
    if state is None:
      raise ValueError(
        f'The selected state of step {step} is missing from '
        f'{os.path.join(run.workdir, "selected")!r}: use another workdir.'
      )
  _logger.info(
    'Step %d has the best %s on the validation classes, %.2f%%.',
    step, config.evaluation.select_by, 100 * value,
  )
  return {
    'selected': run.score(state, run.data.test),
    'selected_step': step,
    'selected_by': {config.evaluation.select_by: value},
  }


def _check_select_by(config, scores: Mapping[str, float]) -> None:
  if not config.dataset.validation:
    return
  if not config.eval_every:
    raise ValueError(
      'config.dataset.validation selects among the steps that are evaluated: '
      'set config.eval_every to a number of steps.'
    )
  names = [name for name, value in scores.items() if isinstance(value, float)]
  if config.evaluation.select_by not in names:
    raise ValueError(
      f'config.evaluation.select_by ({config.evaluation.select_by!r}) must be '
      f'one of {", ".join(names)}.'
    )


def _score_state(
    embed_fn, config, mesh, state, split: datasets.Split, **kwargs
) -> dict[str, float]:
  """Scores a state's embeddings of a split."""
  batches = input_pipeline.evaluation_batches(
    split,
    image_size=config.dataset.image_size,
    batch_size=config.evaluation.batch_size,
    process=(jax.process_index(), jax.process_count()),
  )
  return evaluate.evaluate(
    functools.partial(embed_fn, state),
    batches,
    **_score_settings(config, mesh, split),
    **kwargs,
  )


def _score_settings(config, mesh, split: datasets.Split) -> dict:
  names = (
    'recall_at', 'nearest_only', 'kmeans_iterations', 'kmeans_start',
    'kmeans_num_starts',
  )
  return {name: config.evaluation[name] for name in names} | {
    'is_query': split.is_query,
    'cameras': split.cameras,
    'seed': config.seed,
    'mesh': mesh,
  }


def _read_baselines(workdir: str) -> dict[str, dict[str, float]]:
  """Returns the scores that a run began with: its first row of metrics."""
  rows = metric_writer.read_metrics(workdir)
  baselines = {}
  for name, value in (rows[0] if rows else {}).items():
    if name != 'step':
      title, score = name.split('.')
      baselines.setdefault(title, {})[score] = value
  return baselines


def _describe(data: datasets.Datasets) -> None:
  _logger.info(
    'Training on %d images of %d classes, measuring on %d images of %d others',
    len(data.train),
    data.train.num_classes,
    len(data.test),
    data.test.num_classes,
  )
  if data.validation:
    _logger.info(
      'Selecting on %d images of %d classes more',
      len(data.validation),
      data.validation.num_classes,
    )
  if data.num_shared_classes:
    _logger.warning(
      '%d test classes have the name of a train class: the scores are not of '
      'unseen classes.', data.num_shared_classes,
    )
  if data.skipped:
    _logger.warning('%d files were left out:', len(data.skipped))
    for name, reason in data.skipped[:20]:
      _logger.warning('  %s: %s', name, reason)
    if len(data.skipped) > 20:
      _logger.warning('  ... all of them are in results.json')


def _summary(data: datasets.Datasets) -> dict:
  splits = {
    'train': data.train, 'validation': data.validation, 'test': data.test
  }
  summary = {
    name: {'images': len(split), 'classes': split.num_classes}
    for name, split in splits.items()
    if split
  }
  return summary | {
    'resized_source': data.is_resized_source,
    'shared_classes': data.num_shared_classes,
    'skipped': [list(row) for row in data.skipped],
    'digest': data.digest,
  }


def _log_table(results: Mapping) -> None:
  rows = {
    title: results[title]
    for title in ('selected', 'trained', 'untrained', 'raw_pixels')
    if title in results
  }
  _logger.info('Scores on unseen classes, percent:')
  for line in evaluate.format_table(rows).splitlines():
    _logger.info('%s', line)
  scores = results['trained']
  if scores['queries_without_match']:
    _logger.info(
      '%d of %d queries have no match: they are in no mean.',
      scores['queries_without_match'],
      scores['queries_without_match'] + scores['num_queries'],
    )


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that results depend on."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
  return {name: importlib.metadata.version(name) for name in names}
