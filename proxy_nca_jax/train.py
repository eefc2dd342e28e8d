"""A run: prepares, trains, scores, saves and reports; resumes where it stopped.

The functions stand in the order of events; `train_and_evaluate`, which calls
them, comes last.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from proxy_nca_jax import (
  configuration,
  datasets,
  dry_run,
  evaluate,
  features,
  fine_tuning,
  input_pipeline,
  loop,
  losses,
  models,
  report,
  warm_start,
  weights,
)
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax import train_step as train_step_lib
from proxy_nca_jax.datasets import preparation, summary
from proxy_nca_jax.evaluate import embed as embed_lib
from proxy_nca_jax.evaluate import selection
from proxy_nca_jax.input_pipeline import on_device
from proxy_nca_jax.report import results as results_lib
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
_logger = logging.getLogger(__name__)

# (state, split) -> embeddings, and (embeddings, split) -> scores.
_Embed = Callable[[state_lib.TrainState, datasets.Split], np.ndarray]
_Score = Callable[..., dict[str, float]]


def _read_run(
  config, workdir: str, mode: str
) -> tuple[dict | None, dict | None]:
  """Returns the contents of run.json and results.json, or None.

  Results count only if the report that belongs to them is there.

  Raises:
    ValueError: if the run has another configuration.
  """
  saved, results = configuration.read_run(workdir), results_lib.read(workdir)
  if saved:
    configuration.check_same_run(config, saved['config'], mode=mode)
  if config.report and not os.path.exists(os.path.join(workdir, _REPORT)):
    results = None
  return saved, results


def _report_finished(config, saved: Mapping, results: Mapping) -> None:
  _logger.info('This run finished at step %d.', results['step'])
  results_lib.log_table(results)
  if configuration.changed_fields(config, saved['config'], 'evaluation.'):
    _logger.info(
      'These scores were made with other settings of config.evaluation; '
      '--mode=eval scores the run again.'
    )


def load_data(config: ml_collections.ConfigDict) -> datasets.Datasets:
  """Loads the data: the primary process prepares it while the others wait.

  If the processes do not share the folder of prepared datasets, all of them
  prepare the data.

  Raises:
    ValueError: if it is missing, does not fit the configuration, or is not the
      same on all processes.
  """
  load = functools.cache(functools.partial(datasets.load, config))
  if _shares_prepared(config):
    processes.run_on_primary(lambda: load().digest)
  _check_same_data(
    processes.run_on_each(lambda: [load().records_digest, load().digest])
  )
  data = load()
  summary.log(data)
  input_pipeline.check_splits(config, data.train, data.test)
  return data


def _shares_prepared(config) -> bool:
  """Whether all processes see one folder of prepared datasets."""
  folder = preparation.find_data_dir(config.dataset.data_dir)
  try:
    apart = processes.find_apart(folder)
  except (OSError, ValueError):
    # A read-only folder has the data already, or preparing it gives the error.
    return False
  if apart:
    _logger.info(
      'The processes do not share %s (config.dataset.data_dir): each of them '
      'prepares the data.',
      folder,
    )
  return not apart


def _check_same_data(digests: Sequence[tuple[str, str]]) -> None:
  """Raises ValueError if the digests of records and of splits differ."""
  for process, (records, split) in enumerate(digests):
    if records != digests[0][0]:
      raise ValueError(
        f'Processes 0 and {process} have prepared different data (records '
        f'{digests[0][0]} and {records}): give all hosts the same files and '
        'fonts, or a shared folder as config.dataset.data_dir.'
      )
    if split != digests[0][1]:
      raise ValueError(
        f'Processes 0 and {process} have split the data differently (splits '
        f'{digests[0][1]} and {split}): start all processes with the same '
        'command, of the same version.'
      )


def _load_same_data(config, saved: Mapping | None) -> datasets.Datasets:
  """Loads the data of a run.

  Raises:
    ValueError: if it has changed since the run began.
  """
  data = load_data(config)
  if saved and saved.get('dataset_digest') != data.digest:
    raise ValueError(
      'The dataset has changed since this run began (other images, names, '
      'classes or split), or the run began with an earlier version of this '
      'program, which did not compare the images. Restore the dataset, or use '
      'another workdir.'
    )
  return data


def _write_run(config, data, weights_digest: str | None, workdir: str) -> None:
  """Writes run.json, by which a resumed run is compared with this one."""
  workdir_lib.write_json(
    os.path.join(workdir, 'run.json'),
    {
      'config': configuration.as_json(config),
      'dataset_digest': data.digest,
      'weights_digest': weights_digest,
      'weights_license': weights.license_(config),
      'class_names': data.train.class_names,
    },
  )


def _create_model(config, data: datasets.Datasets):
  return models.create_model(config, vector_dim=data.train.vector_dim)


def _make_evaluation(config, model, mesh) -> tuple[_Embed, _Score]:
  embed_fn = embed_lib.make_embed_fn(model, mesh)
  return (
    functools.partial(embed_lib.embed_split, embed_fn, config),
    functools.partial(embed_lib.score_split, config, mesh),
  )


def _as_test_images(data: datasets.Datasets) -> datasets.Split:
  """Returns the train images as the test images are: resized, not augmented."""
  return dataclasses.replace(data.train, images=data.test.images)


def load_backbone(
  config: ml_collections.ConfigDict,
  model,
  state: state_lib.TrainState,
  data: datasets.Datasets,
  weights_digest: str | None,
  mesh: jax.sharding.Mesh,
) -> tuple[state_lib.TrainState, features.Extract]:
  """Loads pretrained weights, if configured.

  Random weights whose features a run begins with get the batch statistics of
  the train images instead.

  Returns:
    The state with the weights, and a function from splits to the features of
    the backbone as it is now.
  """
  if config.model.init_from:
    state = weights.load(config, state, weights_digest).restart_averages()
  elif warm_start.is_configured(config) and state.model_state:
    state = warm_start.measure_statistics(
      config, model, state, _as_test_images(data), mesh
    ).restart_averages()
  return state, _make_extract(config, model, state, data, weights_digest, mesh)


def _make_extract(config, model, state, data, weights_digest, mesh):
  """Returns the function from splits to the features of a state's backbone."""
  return features.make_extract(
    config,
    model,
    state,
    mesh,
    records_digest=data.records_digest,
    weights_digest=weights_digest,
  )


def _warm_start(config, model, state, data, extract: features.Extract, mesh):
  """Returns the state before step 1."""
  if not warm_start.is_configured(config):
    return state
  train = _as_test_images(data)
  return warm_start.apply(
    config,
    model,
    make_loss(config, train),
    state,
    extract(train),
    train.labels,
    mesh,
    classifier=weights.classifier(config),
  )


def _embed_features(
  model, extract: features.Extract, state, split: datasets.Split
) -> np.ndarray:
  """Embeds a split by its features; the state must have their backbone."""
  return warm_start.project(model, state.params['head'], extract(split))


def _score_baselines(
  config, model, state, test, extract: features.Extract, score: _Score
) -> dict:
  """Scores the network before training, and raw pixels, if configured.

  Of a pretrained network, its features without a head are scored too; of
  vectors, the vectors instead of pixels.
  """
  if not config.evaluation.baselines:
    return {}
  name = 'raw pixels' if test.vectors is None else 'the vectors as given'
  _logger.info('Scoring the network before training, and %s', name)
  rows = extract(test)
  embeddings = warm_start.project(model, state.params['head'], rows)
  baselines = {'untrained': score(embeddings, test)}
  if config.model.init_from:
    baselines['pretrained'] = score(rows, test)
  if test.vectors is not None:
    return baselines | {'as_given': score(rows, test)}
  pixels = input_pipeline.raw_pixels(test)
  return baselines | {'raw_pixels': score(pixels, test)}


def _read_baselines(history: selection.History) -> dict:
  """Returns the scores of the baselines from the first row of the metrics."""
  first = {name: value for name, value in history[0].items() if name != 'step'}
  return configuration.unflatten(first)


def make_loss(
  config: ml_collections.ConfigDict, train: datasets.Split
) -> losses.Loss:
  """Returns the configured loss for the classes of a split."""
  return train_step_lib.correct_for_frequency(
    train_step_lib.make_loss(config), config, train.class_sizes
  )


def _make_is_logged(config) -> Callable | None:
  """Returns the function from a step to whether its metrics are written."""
  if config.log_every == 1:
    return None
  return lambda step: (
    (step % config.log_every == 0) | (step == config.num_steps)
  )


def make_train_step(
  config: ml_collections.ConfigDict,
  model,
  optimizer,
  train: datasets.Split,
  mesh: jax.sharding.Mesh,
  *,
  is_logged: Callable | None = None,
) -> Callable:
  """Returns the jitted training step for the classes of a split.

  `is_logged` is that of `train_step.make_train_step`; by default the steps that
  `config.log_every` writes.
  """
  return train_step_lib.make_train_step(
    model,
    optimizer,
    make_loss(config, train),
    reshard=train_step_lib.make_reshard(config, train.num_classes, mesh),
    learning_rates=optimizer_lib.make_learning_rates(config),
    is_logged=is_logged or _make_is_logged(config),
    skip_nonfinite=config.optimizer.on_nonfinite == 'skip',
    stop_frozen=functools.partial(fine_tuning.stop_frozen, config.model),
    ema_decay=config.optimizer.ema_decay,
    update_memory=train_step_lib.make_update_memory(config, mesh),
  )


def make_prepare(
  config: ml_collections.ConfigDict,
  split: datasets.Split,
  mesh: jax.sharding.Mesh,
) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
  """Returns the function from rows of `train_batches` to a global batch.

  Raises:
    ValueError: if `config.dataset.on_device` is set and the images differ in
      size or do not fit into memory.
  """
  if not config.dataset.on_device:
    return functools.partial(mesh_lib.shard_batch, mesh=mesh)
  return on_device.make_prepare(
    split,
    mesh,
    image_size=config.dataset.image_size,
    padding=config.dataset.padding,
  )


def _has_scores(history: selection.History, title: str, step: int) -> bool:
  """Whether the history has the scores of a split at a step."""
  return any(
    name.startswith(f'{title}.')
    for row in history
    if row['step'] == step
    for name in row
  )


def _restore_selected(
  config,
  state: state_lib.TrainState,
  history: selection.History,
  selected: state_lib.Checkpoints,
) -> tuple[state_lib.TrainState, dict]:
  """Returns the state that the validation scores select, and the reason.

  Args:
    config: the run's config, with validation classes.
    state: the last state.
    history: rows of the metrics.
    selected: the checkpoints of the best states.
  """
  step, value = selection.select(config, history)
  _logger.info(
    'Step %d has the best %s on the validation classes, %.2f%%.',
    step,
    config.evaluation.select_by,
    100 * value,
  )
  if step != config.num_steps:
    state = selected.restore(state, step=step)
    if state is None:
      raise ValueError(
        f'The selected checkpoint of step {step} is missing from '
        f'{selected.directory!r}: use another workdir.'
      )
  reason = {
    'selected_step': step,
    'selected_by': {config.evaluation.select_by: value},
  }
  return state, reason


def _verify(config, embeddings: np.ndarray, test: datasets.Split) -> dict:
  """Returns the error rates of verification, if configured."""
  if not config.evaluation.verification:
    return {}
  return {'verification': evaluate.verify(embeddings, test.labels)}


def _write_report(
  config, state, embed: _Embed, tested, results, data, workdir: str
) -> None:
  """Writes report.html; all processes embed, and the primary writes."""
  some = np.random.default_rng(0).permutation(len(data.train))[:2000]
  some = _as_test_images(data).subset(some)
  trained = embed(state, some)
  proxies = None
  if losses.LOSSES[config.loss.name].has_class_proxies:
    points = state.evaluated['params']['proxies']
    proxies = mesh_lib.fetch(points)[: data.train.num_classes]
  path = os.path.join(workdir, _REPORT)

  def write():
    report.write(
      path,
      results=results,
      config=configuration.as_json(config),
      overrides=configuration.overrides(config),
      facts={
        'step shown': str(results.get('selected_step', results['step'])),
        'wall time': monitoring.wall_time(),
        'commit': provenance.commit(),
      },
      rows=metric_writer.read_metrics(workdir),
      test=report.Embedded(data.test, tested),
      train=report.Embedded(some, trained),
      proxies=proxies,
    )

  # All else is saved, and a run that starts again writes the report.
  with signals.raised_at_once():
    processes.run_on_primary(write)
  _logger.info('The report is %s', path)


def _score_checkpoint(config, saved: Mapping | None, workdir: str) -> dict:
  """Scores the newest checkpoint and writes evaluation.json.

  Raises:
    ValueError: if there is none.
  """
  if not saved:
    raise ValueError(f'{workdir!r} holds no run: train one first.')
  data = _load_same_data(config, saved)
  mesh, model = mesh_lib.make_mesh(), _create_model(config, data)
  state = state_lib.create(
    config,
    model,
    optimizer_lib.make_optimizer(config),
    class_sizes=data.train.class_sizes,
    mesh=mesh,
  )
  with contextlib.closing(
    state_lib.Checkpoints(workdir, keep=config.keep_checkpoints)
  ) as checkpoints:
    state = checkpoints.restore(state)
  if state is None:
    raise ValueError(f'{workdir!r} holds no checkpoint: train first.')
  embed, score = _make_evaluation(config, model, mesh)
  if not config.num_steps and not config.num_epochs:
    # The backbone was not trained: its features are stored.
    extract = _make_extract(
      config, model, state, data, saved.get('weights_digest'), mesh
    )
    embed = functools.partial(_embed_features, model, extract)
  embeddings = embed(state, data.test)
  results = {
    'trained': score(embeddings, data.test, num_resamples=1000),
    **_verify(config, embeddings, data.test),
    'step': int(state.step),
    'dataset': summary.summarize(data),
  }
  results_lib.write('evaluation.json', results, workdir)
  return results


def _start(
  config,
  model,
  state: state_lib.TrainState,
  data: datasets.Datasets,
  checkpoints: state_lib.Checkpoints,
  weights_digest: str | None,
  mesh: jax.sharding.Mesh,
  *,
  score: _Score,
  workdir: str,
) -> tuple[state_lib.TrainState, list[dict], dict, features.Extract | None]:
  """Restores the newest checkpoint, or initializes and scores the baselines.

  Returns:
    The state to train from; the rows of the metrics up to its step; the scores
    of the baselines, to be recorded if there are no rows; and the features of
    the initial backbone, if the state has it.
  """
  history = processes.run_on_primary(
    lambda: metric_writer.read_metrics(workdir)
  )
  extract = None
  if not (history and checkpoints.steps):
    state, extract = load_backbone(
      config, model, state, data, weights_digest, mesh
    )
    state = _warm_start(config, model, state, data, extract, mesh)
    state = state.restart_averages()
  if history:
    baselines = _read_baselines(history)
  else:
    baselines = _score_baselines(
      config, model, state, data.test, extract, score
    )
  if baselines:
    selection.check_select_by(config, baselines['untrained'])
  state = checkpoints.restore(state) or state
  step = int(state.step)
  if step:
    _logger.info('Resuming after step %d', step)
  history = [row for row in history if row['step'] <= step]
  return state, history, baselines, None if step else extract


def _score_last(
  config,
  state: state_lib.TrainState,
  data: datasets.Datasets,
  history: selection.History,
  selected: state_lib.Checkpoints,
  *,
  embed: _Embed,
  score: _Score,
  record: Callable[[int, Mapping], None],
) -> tuple[state_lib.TrainState, np.ndarray, dict]:
  """Scores the last state on the test split, and the selected one if another.

  Returns:
    The selected state, or the last one without validation classes; its test
    embeddings; and the scores by their titles in results.json.
  """
  embeddings = embed(state, data.test)
  trained = score(embeddings, data.test)
  # A run that was killed later than this has recorded them already.
  if not _has_scores(history, 'test', config.num_steps):
    record(config.num_steps, {'test': trained})
  best, results = state, {}
  if data.validation:
    best, results = _restore_selected(config, state, history, selected)
    results['selected'] = trained
    if best is not state:
      embeddings = embed(best, data.test)
      results['selected'] = score(embeddings, data.test)
  results['trained'] = trained
  if data.seen:
    results['seen_classes'] = score(embed(state, data.seen), data.seen)
  return best, embeddings, results


def _train(
  config: ml_collections.ConfigDict,
  saved: Mapping | None,
  folder: workdir_lib.Folder,
  stop_signals: signals.StopSignals,
  stack: contextlib.ExitStack,
) -> dict:
  """Trains from the newest checkpoint, or from the start, and scores.

  Args:
    config: the run's config.
    saved: the content of run.json, if the run began before.
    folder: where the run works.
    stop_signals: raises `signals.Stopped` at a check after a signal.
    stack: closes, when the run ends, the resources opened here.
  """
  data = _load_same_data(config, saved)
  configuration.set_num_steps(config, len(data.train))
  given, config = config, configuration.in_steps(config, len(data.train))
  configuration.check(config)
  weights_digest = processes.run_on_primary(
    functools.partial(weights.digest, config, saved)
  )
  _write_run(given, data, weights_digest, folder.path)
  mesh, model = mesh_lib.make_mesh(), _create_model(config, data)
  optimizer = optimizer_lib.make_optimizer(config)
  embed, score = _make_evaluation(config, model, mesh)
  state = state_lib.create(
    config, model, optimizer, class_sizes=data.train.class_sizes, mesh=mesh
  )
  # Without statistics: no process holds all values of sharded proxies.
  _logger.debug(
    parameter_overview.get_parameter_overview(state.params, include_stats=False)
  )
  checkpoints = state_lib.Checkpoints(folder.path, keep=config.keep_checkpoints)
  stack.callback(checkpoints.close)
  selected = state_lib.Checkpoints(folder.path, keep=2, folder='selected')
  stack.callback(selected.close)
  prepare = make_prepare(config, data.train, mesh)
  state, history, baselines, extract = _start(
    config,
    model,
    state,
    data,
    checkpoints,
    weights_digest,
    mesh,
    score=score,
    workdir=folder.path,
  )
  if extract and not config.num_steps:
    # The backbone is not trained: its features are stored.
    embed = functools.partial(_embed_features, model, extract)
  first_step = int(state.step)
  writer = metric_writer.MetricWriter(folder.path, first_step=first_step)
  stack.callback(writer.close)

  def record(step, scores):
    row = configuration.flatten(scores)
    writer.write_scalars(step, row)
    history.append({'step': step, **row})

  if not history:
    writer.write_texts(0, {'config': f'```\n{config}\n```'})
    record(0, baselines)
  batches = input_pipeline.train_batches(
    data.train,
    config,
    first_step=first_step,
    process=(jax.process_index(), jax.process_count()),
    num_devices=mesh.size,
  )
  stack.callback(batches.close)
  watchdog = stack.enter_context(monitoring.Watchdog(config.stall_seconds))
  progress = progress_lib.Progress(
    writer,
    num_steps=config.num_steps,
    batch_size=config.batch_size,
    max_skipped=config.optimizer.max_skipped_steps,
    unit=data.train.noun,
  )
  take_steps = loop.make_take_steps(
    config,
    batches,
    num_classes=data.train.num_classes,
    prepare=prepare,
    train_steps=train_step_lib.make_train_steps(
      make_train_step(config, model, optimizer, data.train, mesh)
    ),
    progress=progress,
    watchdog=watchdog,
    trace=stack.enter_context(
      monitoring.Trace(
        os.path.join(folder.path, 'profile'), config.profile_steps
      )
    ),
    publish=folder.publish,
  )
  title = 'validation' if data.validation else 'test'

  def score_step(state):
    split, step = data.validation or data.test, int(state.step)
    scores = score(embed(state, split), split)
    results_lib.log_step(step, config.num_steps, title, scores)
    selection.check_select_by(config, scores)
    if not _has_scores(history, title, step):
      record(step, {title: scores})
    if data.validation and selection.select(config, history)[0] == step:
      selected.save(step, state)
    progress.restart_clock()

  def is_scored(step):
    # A run that was killed before its first checkpoint starts again from step
    # 0, whose scores it may have without the state that they select.
    is_saved = step or not data.validation or step in selected.steps
    return is_saved and _has_scores(history, title, step)

  def check_finite(done):
    with watchdog.waiting_for(loop.DEVICE, step=done):
      progress.check()

  is_proven = bool(checkpoints.steps)

  def save(state, *, block):
    nonlocal is_proven
    step = int(state.step)
    with watchdog.waiting_for(loop.SAVING, step=step):
      selected.wait()
      checkpoints.save(step, state)
      if not is_proven:
        # Better to fail here than to train for days and read nothing.
        checkpoints.read_back(step, state)
        is_proven = True
      if block:
        checkpoints.wait()
    folder.publish()

  state = loop.fit(
    config,
    state,
    take_steps=take_steps,
    score_step=score_step,
    save=save,
    check_finite=check_finite,
    is_scored=is_scored,
    lr_scale=functools.partial(selection.lr_scale, config, history),
    stop_signals=stop_signals,
  )
  best, embeddings, scores = _score_last(
    config,
    state,
    data,
    history,
    selected,
    embed=embed,
    score=score,
    record=record,
  )
  results = {
    **scores,
    **baselines,
    **_verify(config, embeddings, data.test),
    'step': config.num_steps,
    'skipped_steps': int(state.skipped_steps),
    'dataset': summary.summarize(data),
    'weights': {
      'from': config.model.init_from,
      'sha256': weights_digest,
      'license': weights.license_(config),
    },
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'versions': provenance.versions(),
  }
  results_lib.write('results.json', results, folder.path)
  if config.report:
    _write_report(config, best, embed, embeddings, results, data, folder.path)
  return results


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str, *, mode: str = 'train'
) -> dict:
  """Trains as configured, resuming from the workdir's checkpoint, and scores.

  Args:
    config: the run's config, as from configs/default.py.
    workdir: where checkpoints, metrics.jsonl, tensorboard, log.txt,
      results.json and report.html are written; created if missing. A folder, or
      a URL that fsspec opens.
    mode: 'train', or 'eval' to score the newest checkpoint without training.

  Returns:
    The content of results.json, or of evaluation.json; scores are fractions.

  Raises:
    ValueError: if the configuration, the data or the workdir is invalid, or the
      loss is not finite; nothing saved is lost.
    signals.Stopped: on SIGTERM or Ctrl-C, after saving the state.
  """
  configuration.check(config)
  configuration.check_length(config)
  config = config.copy_and_resolve_references()
  if config.dry_run:
    data, mesh = load_data(config), mesh_lib.make_mesh()
    configuration.set_num_steps(config, len(data.train))
    config = configuration.in_steps(config, len(data.train))
    configuration.check(config)
    model = _create_model(config, data)
    optimizer = optimizer_lib.make_optimizer(config)
    step = make_train_step(config, model, optimizer, data.train, mesh)
    state = state_lib.abstract(
      config, model, optimizer, class_sizes=data.train.class_sizes, mesh=mesh
    )
    dry_run.log_plan(config, model, data.train, state, step, mesh)
    return {}
  with contextlib.ExitStack() as stack:
    stop_signals = stack.enter_context(signals.StopSignals())
    folder = stack.enter_context(workdir_lib.opened(workdir))
    saved, results = processes.run_on_primary(
      functools.partial(_read_run, config, folder.path, mode)
    )
    if saved:
      configuration.keep_num_steps(config, saved['config'])
    if mode == 'eval':
      return _score_checkpoint(config, saved, folder.path)
    # The number of steps in other epochs than the saved ones is not known yet.
    is_known = config.num_steps or not config.num_epochs
    if results and is_known and results['step'] >= config.num_steps:
      _report_finished(config, saved, results)
      return results
    return _train(config, saved, folder, stop_signals, stack)
