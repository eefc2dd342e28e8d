"""Training: the step, and the run around it."""

import contextlib
import functools
import importlib.metadata
import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from clu import parameter_overview
from jax.experimental.compilation_cache import compilation_cache

from proxy_nca_jax import (
  datasets,
  evaluate,
  input_pipeline,
  interruption,
  locks,
  losses,
  metric_writer,
  models,
  proxies,
)
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib

# Fields that do not change the mathematics: a resumed run may change them.
_FREE_FIELDS = (
  'dataset.data_dir',
  'dataset.fonts_dir',
  'dataset.num_workers',
  'dataset.root',
  'keep_checkpoints',
  'log_every',
  'save_every',
)

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


def check_same_run(
    config: ml_collections.ConfigDict, saved: Mapping
) -> None:
  """Raises ValueError if a config would change the mathematics of a saved run.

  Args:
    config: of the new start.
    saved: the config that the run began with, as nested dicts of JSON.
  """
  new, old = _flatten(_as_json(config)), _flatten(saved)
  different = [
    f'{field} was {old.get(field, "absent")!r} and is '
    f'{new.get(field, "absent")!r}'
    for field in sorted(new.keys() | old.keys())
    if field not in _FREE_FIELDS
    and new.get(field, _logger) != old.get(field, _logger)
    and not (
      field == 'num_steps'
      and new[field] > old[field]
      and not optimizer_lib.depends_on_num_steps(config)
    )
  ]
  if different:
    raise ValueError(
      'This workdir holds a run with another configuration: '
      f'{"; ".join(different)}. Set these back, or use another workdir.'
    )


def _as_json(config) -> dict:
  return json.loads(config.to_json_best_effort())


def _flatten(tree: Mapping, prefix: str = '') -> dict:
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat |= _flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


@contextlib.contextmanager
def _open_workdir(workdir: str) -> Iterator[None]:
  """Locks a workdir, and logs and caches compilations in it."""
  os.makedirs(workdir, exist_ok=True)
  cache = os.path.join(workdir, 'compilation_cache')
  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # The cache's folder is read once a process; this run may be its second.
  compilation_cache.reset_cache()
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        stack.enter_context(
          locks.hold(os.path.join(workdir, 'lock'), wait=False)
        )
      except BlockingIOError:
        raise ValueError(
          f'Another run is at work in {workdir!r}: wait for it, or use another '
          'workdir.'
        ) from None
    handler = logging.FileHandler(os.path.join(workdir, 'log.txt'))
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
    package = logging.getLogger('proxy_nca_jax')
    package.addHandler(handler)
    stack.callback(handler.close)
    stack.callback(package.removeHandler, handler)
    yield


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
  with interruption.StopSignals() as signals, _open_workdir(workdir):
    run = _read_json(os.path.join(workdir, 'run.json'))
    if run:
      check_same_run(config, run['config'])
    elif mode == 'eval':
      raise ValueError(f'{workdir!r} holds no run: train one first.')
    results = _read_json(os.path.join(workdir, 'results.json'))
    if mode == 'train' and results and results['step'] >= config.num_steps:
      _logger.info('This run is finished, at step %d.', results['step'])
      _log_table(results)
      return results

    data = datasets.load(config)
    _describe(data)
    input_pipeline.check_image_size(data.train, config.dataset)
    if run and run['dataset_digest'] != data.digest:
      raise ValueError(
        'The data set has changed since this run began (other classes, '
        'records or split). Restore it, or use another workdir.'
      )
    metric_writer.write_json(
      os.path.join(workdir, 'run.json'),
      {'config': _as_json(config), 'dataset_digest': data.digest},
    )
    mesh = mesh_lib.make_mesh()
    process = (jax.process_index(), jax.process_count())
    normalize = functools.partial(
      input_pipeline.normalize,
      mean=config.dataset.mean,
      std=config.dataset.std,
    )
    train_step = make_train_step(model, optimizer, loss_fn, normalize)
    embed_fn = make_embed_fn(model, normalize, mesh)
    state = state_lib.create(
      config,
      model,
      optimizer,
      num_classes=data.train.num_classes,
      sharding=mesh_lib.replicated(mesh),
    )
    _logger.debug(parameter_overview.get_parameter_overview(state.params))
    score = functools.partial(_score, config=config)

    def score_state(state):
      batches = input_pipeline.evaluation_batches(
        data.test,
        image_size=config.dataset.image_size,
        batch_size=config.evaluation.batch_size,
        process=process,
      )
      embeddings = evaluate.embed(functools.partial(embed_fn, state), batches)
      return score(embeddings, data.test.labels)

    def should_evaluate(step):
      every = config.eval_every
      return every and step % every == 0 and step < config.num_steps

    with contextlib.ExitStack() as stack:
      checkpoints = state_lib.Checkpoints(workdir, keep=config.keep_checkpoints)
      stack.callback(checkpoints.close)
      baselines = _read_baselines(workdir)
      is_new = not baselines and mode == 'train'
      if is_new:
        _logger.info('Scoring raw pixels and the untrained network')
        baselines = {
          'untrained': score_state(state),
          'raw_pixels': score(
            input_pipeline.raw_pixels(data.test), data.test.labels
          ),
        }
      state = checkpoints.restore(state) or state
      done = int(state.step)
      if mode == 'eval':
        if not done:
          raise ValueError(f'{workdir!r} holds no checkpoint: train first.')
        results = {'trained': score_state(state), 'step': done}
        _log_table(results)
        return results
      if done:
        _logger.info('Resuming after step %d', done)
      writer = metric_writer.MetricWriter(workdir, first_step=done)
      stack.callback(writer.close)
      if is_new:
        writer.write_texts(0, {'config': f'```\n{config}\n```'})
        writer.write_scalars(0, _flatten(baselines))
      progress = _Progress(writer, config, first_step=done)
      batches = input_pipeline.train_batches(
        data.train, config, first_step=done, process=process
      )
      stack.callback(batches.close)
      try:
        while done < config.num_steps:
          with signals.deferred():
            batch = next(batches)
            losses.check_labels(batch['label'], data.train.num_classes)
            state, metrics = train_step(
              state, mesh_lib.shard_batch(batch, mesh)
            )
            done += 1
            progress.add(done, metrics)
            is_last = done == config.num_steps
            if is_last or done % config.log_every == 0:
              progress.report()
            if is_last or done % config.save_every == 0:
              # A state is saved only if all losses before it are finite.
              progress.check()
              checkpoints.save(done, state)
          if should_evaluate(done):
            scores = score_state(state)
            writer.write_scalars(done, _flatten({'test': scores}))
            _logger.info(
              'step %d  Recall@%d %.2f%% on unseen classes',
              done,
              config.evaluation.recall_at[0],
              100 * scores[f'recall@{config.evaluation.recall_at[0]}'],
            )
            progress.restart_clock()
        checkpoints.wait()
      except interruption.Stopped:
        progress.check()
        checkpoints.save(done, state)
        checkpoints.wait()
        _logger.info(
          'Stopped after step %d of %d, saved. The same command goes on.',
          done,
          config.num_steps,
        )
        raise
      trained = score_state(state)
      writer.write_scalars(done, _flatten({'test': trained}))
    results = {
      'trained': trained,
      **baselines,
      'step': done,
      'dataset': _summary(data),
      'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      'versions': versions(),
    }
    metric_writer.write_json(os.path.join(workdir, 'results.json'), results)
    _log_table(results)
    return results


class _Progress:
  """Holds the metrics of steps until they are needed, then fetches them.

  The host does not wait for a step before it starts the next.
  """

  def __init__(self, writer, config, *, first_step):
    self._writer, self._config = writer, config
    self._pending, self._last = [], None
    self._step = first_step
    self.restart_clock()

  def restart_clock(self) -> None:
    self._clock, self._clock_step = None, None

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    self._step = step
    self._pending.append((step, metrics))
    if self._clock is None:
      # The first step compiles: the rate is of those after it.
      jax.block_until_ready(metrics)
      self._clock, self._clock_step = time.monotonic(), step
    if len(self._pending) >= 1000:
      self.check()

  def check(self) -> None:
    """Raises ValueError if a loss or gradient was not finite."""
    fetched = jax.device_get(self._pending)
    self._pending = []
    bad = [
      step
      for step, metrics in fetched
      if not np.isfinite(metrics['loss'])
      or not np.isfinite(metrics['gradient_norm'])
    ]
    if bad:
      steps = ', '.join(map(str, bad[:5])) + (', ...' if len(bad) > 5 else '')
      raise ValueError(
        f'The loss or its gradient is not finite at step {steps}. The '
        'checkpoints before it are kept. Lower the learning rates, or set '
        'config.optimizer.clip_norm.'
      )
    if fetched:
      self._last = fetched[-1][1]

  def report(self) -> None:
    self.check()
    seconds = max(time.monotonic() - self._clock, 1e-9)
    steps = self._step - self._clock_step
    rate = steps / seconds
    scalars = {name: float(value) for name, value in self._last.items()}
    left = self._config.num_steps - self._step
    rates = {'images_per_second': rate * self._config.batch_size}
    self._writer.write_scalars(self._step, scalars | (rates if steps else {}))
    timing = ''
    if steps:
      timing = (
        f'  {rates["images_per_second"]:.0f} images/s  '
        f'{_format_seconds(left / rate)} left'
      )
    _logger.info(
      'step %d/%d  loss %.4f  nearest proxy right %.0f%%%s',
      self._step,
      self._config.num_steps,
      scalars['loss'],
      100 * scalars['proxy_accuracy'],
      timing,
    )
    self._clock, self._clock_step = time.monotonic(), self._step


def _score(embeddings, labels, *, config) -> dict[str, float]:
  return evaluate.evaluate(
    embeddings,
    labels,
    recall_at=config.evaluation.recall_at,
    kmeans_iterations=config.evaluation.kmeans_iterations,
    seed=config.seed,
  )


def _read_baselines(workdir: str) -> dict[str, dict[str, float]]:
  """Returns the scores that a run began with: its first row of metrics."""
  rows = metric_writer.read_metrics(workdir)
  baselines = {}
  for name, value in (rows[0] if rows else {}).items():
    if name != 'step':
      title, score = name.split('.')
      baselines.setdefault(title, {})[score] = value
  return baselines


def _read_json(path: str) -> dict | None:
  if not os.path.exists(path):
    return None
  with open(path) as file:
    return json.load(file)


def _describe(data: datasets.Datasets) -> None:
  _logger.info(
    'Training on %d images of %d classes, measuring on %d images of %d others',
    len(data.train),
    data.train.num_classes,
    len(data.test),
    data.test.num_classes,
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
  summary = {
    name: {'images': len(split), 'classes': split.num_classes}
    for name, split in (('train', data.train), ('test', data.test))
  }
  return summary | {
    'shared_classes': data.num_shared_classes,
    'skipped': [list(row) for row in data.skipped],
    'digest': data.digest,
  }


def _log_table(results: Mapping) -> None:
  rows = {
    title: results[title]
    for title in ('trained', 'untrained', 'raw_pixels')
    if title in results
  }
  _logger.info('Scores on unseen classes, percent:')
  for line in evaluate.format_table(rows).splitlines():
    _logger.info('%s', line)
  scores = results['trained']
  if scores['queries_without_match']:
    _logger.info(
      '%d of %d images are alone in their class: in the gallery, in no mean.',
      scores['queries_without_match'],
      scores['queries_without_match'] + scores['num_queries'],
    )


def _format_seconds(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that results depend on."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
  return {name: importlib.metadata.version(name) for name in names}
