"""Training: the step, and the run around it."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from proxy_nca_jax import (
  configuration,
  datasets,
  dry_run,
  evaluate,
  input_pipeline,
  losses,
  models,
  report,
)
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax import train_step as train_step_lib
from proxy_nca_jax.datasets import summary
from proxy_nca_jax.evaluate import embed as embed_lib
from proxy_nca_jax.evaluate import selection
from proxy_nca_jax.input_pipeline import on_device
from proxy_nca_jax.runtime import (
  metric_writer,
  monitoring,
  processes,
  provenance,
  signals,
)
from proxy_nca_jax.runtime import progress as progress_lib
from proxy_nca_jax.runtime import workdir as workdir_lib

_REPORT = 'report.html'
# What the log says that a step waits for.
_INPUT = 'its input'
_DEVICE = 'the device, or a compilation'
_SAVING = 'checkpoints to be written'

_logger = logging.getLogger(__name__)


def make_prepare(
  config: ml_collections.ConfigDict,
  split: datasets.Split,
  mesh: jax.sharding.Mesh,
) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
  """Returns the map from `train_batches` to batches on the devices.

  Raises:
    ValueError: if the pictures are to lie there and cannot.
  """
  if not config.dataset.on_device:
    return functools.partial(mesh_lib.shard_batch, mesh=mesh)
  return on_device.make_prepare(
    split,
    mesh,
    image_size=config.dataset.image_size,
    padding=config.dataset.padding,
  )


class _Run(NamedTuple):
  """What `_fit` needs beside the configuration."""

  workdir: str
  publish: Callable[[], None]
  data: datasets.Datasets
  signals: signals.StopSignals
  checkpoints: state_lib.Checkpoints
  selected: state_lib.Checkpoints
  writer: metric_writer.MetricWriter
  batches: Iterator[dict[str, np.ndarray]]
  prepare: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]
  train_steps: Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]
  score: Callable[[state_lib.TrainState, datasets.Split], dict[str, float]]
  watchdog: monitoring.Watchdog
  trace: monitoring.Trace


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str, *, mode: str = 'train'
) -> dict:
  """Trains as configured, resuming what is saved in the workdir, and scores.

  Args:
    config: of the run, as configs/default.py.
    workdir: gets checkpoints, metrics.jsonl, tensorboard, log.txt and
      results.json; is made if missing. A folder, or a URL that fsspec opens.
    mode: 'train', or 'eval' to score the newest checkpoint and train nothing.

  Returns:
    The content of results.json; scores are fractions.

  Raises:
    ValueError: if the configuration, the data or the workdir is at fault, or
      the loss is not finite; nothing that is saved is lost.
    signals.Stopped: on SIGTERM or Ctrl-C, the state being saved.
  """
  configuration.check(config)
  loss = train_step_lib.make_loss(config)
  model = models.create_model(config)
  optimizer = optimizer_lib.make_optimizer(config)
  if config.dry_run:
    _describe_plan(config, model, optimizer, loss)
    return {}
  with contextlib.ExitStack() as stack:
    stop_signals = stack.enter_context(signals.StopSignals())
    folder = stack.enter_context(workdir_lib.opened(workdir))
    saved, results = processes.run_on_primary(
      functools.partial(_read_run, config, folder.path)
    )
    if mode == 'eval' and not saved:
      raise ValueError(f'{workdir!r} holds no run: train one first.')
    if mode == 'train' and results and results['step'] >= config.num_steps:
      _logger.info('This run is finished, at step %d.', results['step'])
      _log_table(results)
      return results

    data, weights_digest = _begin(config, saved, folder.path)
    mesh = mesh_lib.make_mesh()
    embed, score_embeddings, score = _make_scores(config, model, mesh)
    state = state_lib.create(
      config,
      model,
      optimizer,
      class_sizes=data.train.class_sizes,
      mesh=mesh,
    )
    # Without statistics: no process has all values of sharded proxies.
    _logger.debug(
      parameter_overview.get_parameter_overview(
        state.params, include_stats=False
      )
    )
    checkpoints = state_lib.Checkpoints(
      folder.path, keep=config.keep_checkpoints
    )
    stack.callback(checkpoints.close)
    if mode == 'eval':
      state = checkpoints.restore(state)
      if state is None:
        raise ValueError(f'{workdir!r} holds no checkpoint: train first.')
      results = {
        'trained': score(state, data.test, num_resamples=1000),
        'step': int(state.step),
      }
      _write_results('evaluation.json', results, folder.path)
      return results

    prepare = make_prepare(config, data.train, mesh)
    rows = selection.read_metrics(folder.path)
    is_new = not rows
    if config.model.init_from and (is_new or not checkpoints.steps):
      state = _load_weights(config, state, weights_digest)
    baselines = _baselines(rows[0]) if rows else {}
    if is_new and config.evaluation.baselines:
      _logger.info('Scoring raw pixels and the untrained network')
      pixels = input_pipeline.raw_pixels(data.test)
      baselines = {
        'untrained': score(state, data.test),
        'raw_pixels': score_embeddings(pixels, data.test),
      }
    if baselines:
      selection.check_select_by(config, baselines['untrained'])
    selected = state_lib.Checkpoints(folder.path, keep=2, folder='selected')
    stack.callback(selected.close)
    state = checkpoints.restore(state) or state
    first_step = int(state.step)
    if first_step:
      _logger.info('Resuming after step %d', first_step)
    writer = metric_writer.MetricWriter(folder.path, first_step=first_step)
    stack.callback(writer.close)
    if is_new:
      writer.write_texts(0, {'config': f'```\n{config}\n```'})
      writer.write_scalars(0, workdir_lib.flatten(baselines))
    batches = input_pipeline.train_batches(
      data.train,
      config,
      first_step=first_step,
      process=(jax.process_index(), jax.process_count()),
    )
    stack.callback(batches.close)
    run = _Run(
      workdir=folder.path,
      publish=folder.publish,
      data=data,
      signals=stop_signals,
      checkpoints=checkpoints,
      selected=selected,
      writer=writer,
      batches=batches,
      prepare=prepare,
      train_steps=train_step_lib.make_train_steps(
        _make_train_step(config, model, optimizer, loss, data.train, mesh)
      ),
      score=score,
      watchdog=stack.enter_context(monitoring.Watchdog(config.stall_seconds)),
      trace=stack.enter_context(
        monitoring.Trace(
          os.path.join(folder.path, 'profile'), config.profile_steps
        )
      ),
    )
    state = _fit(config, state, run)
    best, tested, scores = _score_last(
      config, state, run, embed=embed, score_embeddings=score_embeddings
    )
    results = {
      **scores,
      **baselines,
      'step': config.num_steps,
      'skipped_steps': _num_skipped(state),
      'dataset': summary.summarize(data),
      'weights': {'from': config.model.init_from, 'sha256': weights_digest},
      'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      'versions': provenance.versions(),
    }
    _write_results('results.json', results, folder.path)
    if config.report:
      _write_report(
        config,
        best,
        functools.partial(embed, best),
        tested,
        results,
        data,
        folder.path,
      )
    return results


def _make_train_step(config, model, optimizer, loss, train, mesh):
  return train_step_lib.make_train_step(
    model,
    optimizer,
    train_step_lib.correct_for_frequency(loss, config, train.class_sizes),
    embed_lib.make_normalize(config),
    share=train_step_lib.make_share(config, train.num_classes, mesh),
    learning_rates=optimizer_lib.make_learning_rates(config),
  )


def _make_scores(config, model, mesh) -> tuple[Callable, Callable, Callable]:
  """Returns what embeds a split, what scores its embeddings, and both in one.

  They are (state, split) -> embeddings, (embeddings, split) -> scores and
  (state, split) -> scores.
  """
  embed_fn = embed_lib.make_embed_fn(
    model, embed_lib.make_normalize(config), mesh
  )
  embed = functools.partial(embed_lib.embed_split, embed_fn, config)
  score_embeddings = functools.partial(embed_lib.score_split, config, mesh)

  def score(state, split, **kwargs):
    return score_embeddings(embed(state, split), split, **kwargs)

  return embed, score_embeddings, score


def _describe_plan(config, model, optimizer, loss) -> None:
  """Logs what the run would do, and leaves its workdir alone."""
  data, mesh = _load_in_turn(config), mesh_lib.make_mesh()
  state = state_lib.abstract(
    config, model, optimizer, class_sizes=data.train.class_sizes, mesh=mesh
  )
  step = _make_train_step(config, model, optimizer, loss, data.train, mesh)
  _logger.info('%s', dry_run.describe(config, data.train, step, state, mesh))
  _logger.info('A dry run (config.dry_run): nothing was trained.')


def _take_steps(
  config: ml_collections.ConfigDict,
  state: state_lib.TrainState,
  run: _Run,
  progress: progress_lib.Progress,
  rate_scale: float,
  *,
  done: int,
) -> state_lib.TrainState:
  """Takes the steps of one dispatch after `done`, and reports them."""
  first, last = done + 1, done + config.steps_per_dispatch
  with run.watchdog.waiting_for(_INPUT, step=first):
    batches = list(itertools.islice(run.batches, config.steps_per_dispatch))
  for batch in batches:
    losses.check_labels(batch['label'], run.data.train.num_classes)
  run.trace.before(first, last)
  with (
    run.watchdog.waiting_for(_DEVICE, step=first),
    jax.profiler.StepTraceAnnotation('train', step_num=first),
  ):
    state, metrics = run.train_steps(
      state,
      [run.prepare(batch) for batch in batches],
      rate_scale,
      freeze_batch_norm=_is_batch_norm_frozen(config, done),
    )
    progress.add(last, metrics, input_seconds=run.watchdog.seconds[_INPUT])
  run.trace.after(last, metrics)
  if last == config.num_steps or last % config.log_every == 0:
    progress.report()
    run.publish()
  return state


def _fit(
  config: ml_collections.ConfigDict, state: state_lib.TrainState, run: _Run
) -> state_lib.TrainState:
  """Trains up to `config.num_steps`, logging, scoring and saving.

  Raises:
    ValueError: if a loss or gradient is not finite, or too many were in a row
      where such steps are skipped; no such state is saved.
    signals.Stopped: on a signal, the state being saved.
  """
  done, last = int(state.step), config.num_steps
  progress = progress_lib.Progress(
    run.writer,
    num_steps=last,
    batch_size=config.batch_size,
    max_skipped=config.optimizer.max_skipped_steps,
  )
  waiting_for = run.watchdog.waiting_for
  try:
    # A run that was stopped just before an evaluation makes up for it.
    if done and _is_evaluated(config, done):
      if not _is_written(_evaluated_split(run), done, run.workdir):
        _evaluate(config, state, run)
    rate_scale = selection.rate_scale(config, run.workdir)
    while done < last:
      run.signals.check()
      state = _take_steps(config, state, run, progress, rate_scale, done=done)
      done += config.steps_per_dispatch
      # Before the save, so that a run that resumes after it has the scores.
      if _is_evaluated(config, done):
        with waiting_for(_DEVICE, step=done):
          progress.check()
        _evaluate(config, state, run)
        rate_scale = selection.rate_scale(config, run.workdir)
        progress.restart_clock()
      if done == last or done % config.save_every == 0:
        # A state is saved only if all losses before it are finite.
        with waiting_for(_DEVICE, step=done):
          progress.check()
        with waiting_for(_SAVING, step=done):
          run.selected.wait()
          run.checkpoints.save(done, state)
        run.publish()
    with waiting_for(_SAVING, step=done):
      run.checkpoints.wait()
  except signals.Stopped:
    progress.check()
    run.selected.wait()
    run.checkpoints.save(done, state)
    run.checkpoints.wait()
    _logger.info(
      'Stopped after step %d of %d, saved. The same command goes on.',
      done,
      last,
    )
    raise
  return state


def _score_last(
  config: ml_collections.ConfigDict,
  state: state_lib.TrainState,
  run: _Run,
  *,
  embed: Callable[..., np.ndarray],
  score_embeddings: Callable[..., dict[str, float]],
) -> tuple[state_lib.TrainState, np.ndarray, dict]:
  """Scores the last state and the selected one, which is shown, on the test.

  Returns:
    The selected state, its test embeddings, and the scores by their titles in
    results.json.
  """
  test = run.data.test
  tested = embed(state, test)
  trained = score_embeddings(tested, test)
  # A run that was killed since then has them already.
  if not _is_written('test', config.num_steps, run.workdir):
    run.writer.write_scalars(
      config.num_steps, workdir_lib.flatten({'test': trained})
    )
  best, scores = _restore_selected(config, state, run)
  if scores:
    scores['selected'] = trained
    if best is not state:
      tested = embed(best, test)
      scores['selected'] = score_embeddings(tested, test)
  scores['trained'] = trained
  if run.data.seen:
    scores['seen_classes'] = run.score(state, run.data.seen)
  return best, tested, scores


def _write_report(
  config, state, embed, tested, results, data: datasets.Datasets, workdir: str
) -> None:
  """Writes report.html; all processes embed, and process 0 writes."""
  # As the test pictures are: resized, not augmented.
  some = np.random.default_rng(0).permutation(len(data.train))[:2000]
  some = dataclasses.replace(data.train, images=data.test.images).subset(some)
  learned = embed(some)
  proxies = None
  if losses.NEEDS[config.loss.name].has_labelled_proxies:
    proxies = mesh_lib.fetch(state.params['proxies'])[: data.train.num_classes]
  if not processes.is_primary():
    return
  path = os.path.join(workdir, _REPORT)
  report.write(
    path,
    results=results,
    config=workdir_lib.as_json(config),
    overrides=workdir_lib.overrides(config),
    facts={
      'step shown': str(results.get('selected_step', results['step'])),
      'wall time': monitoring.wall_time(),
      'commit': provenance.commit(),
    },
    rows=metric_writer.read_metrics(workdir),
    test=report.Embedded(data.test, tested),
    train=report.Embedded(some, learned),
    proxies=proxies,
  )
  _logger.info('The report is %s', path)


def _read_run(config, workdir: str) -> tuple[dict | None, dict | None]:
  """Returns what run.json and results.json hold, or None.

  Results without the report that belongs to them do not count.

  Raises:
    ValueError: if the run has another configuration.
  """
  saved, results = (
    workdir_lib.read_json(os.path.join(workdir, name))
    for name in ('run.json', 'results.json')
  )
  if saved:
    workdir_lib.check_same_run(
      config,
      saved['config'],
      may_add_steps=not optimizer_lib.depends_on_num_steps(config),
    )
  if config.report and not os.path.exists(os.path.join(workdir, _REPORT)):
    results = None
  return saved, results


def _begin(
  config, saved: Mapping | None, workdir: str
) -> tuple[datasets.Datasets, str | None]:
  """Returns the data and the digest of the weights; writes run.json.

  Raises:
    ValueError: if either cannot be had, or the data is other than before.
  """
  data = _load_in_turn(config)
  if saved and saved['dataset_digest'] != data.digest:
    raise ValueError(
      'The data set has changed since this run began (other classes, records '
      'or split). Restore it, or use another workdir.'
    )
  weights_digest = processes.run_on_primary(
    functools.partial(_digest_weights, config, saved)
  )
  workdir_lib.write_json(
    os.path.join(workdir, 'run.json'),
    {
      'config': workdir_lib.as_json(config),
      'dataset_digest': data.digest,
      'weights_digest': weights_digest,
      'class_names': data.train.class_names,
    },
  )
  return data, weights_digest


def _num_skipped(state: state_lib.TrainState) -> int:
  """The steps that were skipped because they were not finite."""
  counts = optimizer_lib.skip_counts(state.opt_state)
  return int(counts.get('skipped_steps', 0))


def _load_in_turn(config: ml_collections.ConfigDict) -> datasets.Datasets:
  """Loads on process 0 first, which prepares; the others wait for it.

  Raises:
    ValueError: if the data cannot be had, or does not fit the configuration.
  """
  loaded = []
  processes.run_on_primary(lambda: loaded.append(datasets.load(config)))
  data = loaded[0] if loaded else datasets.load(config)
  summary.log(data)
  input_pipeline.check_image_size(data.test, config.dataset)
  input_pipeline.check_train_batches(data.train, config)
  return data


def _is_batch_norm_frozen(config, done: int) -> bool:
  steps = config.model.freeze_batch_norm_steps
  return steps < 0 or done < steps


def _digest_weights(config, saved: Mapping | None) -> str | None:
  """The SHA-256 of the weights to begin with; a run that began knows its own.

  Raises:
    ValueError: if they cannot be had.
  """
  if saved:
    return saved.get('weights_digest')
  if not config.model.init_from:
    return None
  path = models.find_weights(config.model.init_from, config.model.name)
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _load_weights(
  config, state: state_lib.TrainState, digest: str
) -> state_lib.TrainState:
  """Puts the weights to begin with into a state.

  Raises:
    ValueError: if they cannot be had, do not fit, or are others than before.
  """
  if _digest_weights(config, None) != digest:
    raise ValueError(
      f'{config.model.init_from!r} (config.model.init_from) has changed since '
      'this run began. Restore it, or use another workdir.'
    )
  path = models.find_weights(config.model.init_from, config.model.name)
  params, model_state = models.load_weights(
    path, config.model.name, state.params, state.model_state
  )
  _logger.info('Beginning with the weights of %s', path)
  return dataclasses.replace(state, params=params, model_state=model_state)


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
    step,
    config.num_steps,
    name,
    100 * value,
    title,
  )
  selection.check_select_by(config, scores)
  run.writer.write_scalars(step, workdir_lib.flatten({title: scores}))
  if run.data.validation and selection.select(config, run.workdir)[0] == step:
    run.selected.save(step, state)


def _evaluated_split(run: _Run) -> str:
  return 'validation' if run.data.validation else 'test'


def _is_written(title: str, step: int, workdir: str) -> bool:
  """Whether a step's scores of a split are among the metrics."""
  return any(
    name.startswith(f'{title}.')
    for row in selection.read_metrics(workdir)
    if row['step'] == step
    for name in row
  )


def _restore_selected(
  config, state: state_lib.TrainState, run: _Run
) -> tuple[state_lib.TrainState, dict]:
  """Returns the state that the validation classes selected, and why.

  Without them, or if it is the last one, that is the state that is given.
  """
  if not run.data.validation:
    return state, {}
  step, value = selection.select(config, run.workdir)
  _logger.info(
    'Step %d has the best %s on the validation classes, %.2f%%.',
    step,
    config.evaluation.select_by,
    100 * value,
  )
  if step != config.num_steps:
    state = run.selected.restore(state, step=step)
    if state is None:
      raise ValueError(
        f'The selected state of step {step} is missing from '
        f'{os.path.join(run.workdir, "selected")!r}: use another workdir.'
      )
  return state, {
    'selected_step': step,
    'selected_by': {config.evaluation.select_by: value},
  }


def _baselines(row: Mapping[str, float]) -> dict[str, dict[str, float]]:
  """Returns the scores that a run began with, of its first row of metrics."""
  baselines = {}
  for name, value in row.items():
    if name != 'step':
      title, score = name.split('.')
      baselines.setdefault(title, {})[score] = value
  return baselines


def _write_results(name: str, results: Mapping, workdir: str) -> None:
  workdir_lib.write_json(os.path.join(workdir, name), results)
  _log_table(results)


def _log_table(results: Mapping) -> None:
  rows = {
    title: results[title]
    for title in (
      'selected',
      'trained',
      'seen_classes',
      'untrained',
      'raw_pixels',
    )
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
