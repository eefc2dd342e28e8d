"""Shared by the experiments: many runs of one config, tables and figures.

An experiment consists of runs, each of which changes some fields of one config
and has its own folder under WORKDIR/runs. If an experiment is stopped, the same
command keeps its finished runs and resumes the stopped one. Results are written
to WORKDIR/NAME.csv, .md, .png and .svg, with a caption that describes the runs.
"""

import copy
import csv
import datetime
import logging
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import matplotlib.figure
import ml_collections
import numpy as np
from absl import flags

from proxy_nca_jax import train
from proxy_nca_jax.runtime import command_line, files, metric_writer

NUM_SEEDS = flags.DEFINE_integer(
  'num_seeds',
  3,
  'Number of runs of each setting, with seeds 0, 1, ...',
  lower_bound=1,
)

_DEFAULT_CONFIG = str(pathlib.Path(__file__).parent / 'glyphs.py')

# Okabe and Ito's colors, which are distinguishable with color blindness.
_COLORS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#E69F00',
  '#56B4E9',
  '#000000',
)
_MARKERS = 'os^Dv*x'

_logger = logging.getLogger('proxy_nca_jax')


# Lists the flag in the --help of the experiment instead of this module.
flags.disclaim_key_flags()


def start(
  experiment: Callable[[ml_collections.ConfigDict, str], object],
) -> None:
  """Runs experiment(config, workdir) with the command line's arguments."""
  flags.declare_key_flag('num_seeds')
  command_line.run(experiment, config=_DEFAULT_CONFIG)


class Result(NamedTuple):
  """Results of a run: results.json and the rows of metrics.jsonl."""

  scores: Mapping[str, Any]
  rows: Sequence[Mapping[str, float]]

  def curve(self, name: str = 'recall@1') -> tuple[np.ndarray, np.ndarray]:
    """Returns the evaluated steps, from 0 on, and their test scores."""
    points = {0: self.scores['untrained'][name]}
    for row in self.rows:
      if f'test.{name}' in row:
        points[row['step']] = row[f'test.{name}']
    return np.array(list(points)), np.array(list(points.values()))

  def seconds_per_step(self) -> float:
    """Returns the median over log intervals, which exclude evaluation."""
    return self.scores['batch_size'] / statistics.median(
      row['images_per_second']
      for row in self.rows
      if 'images_per_second' in row
    )


def train_all(
  config: ml_collections.ConfigDict,
  changes: Mapping[str, Mapping[str, Any]],
  workdir: str,
) -> dict[str, Result]:
  """Trains one run for each entry of `changes`.

  Args:
    config: the config that all runs start from.
    changes: the fields that each run changes, by the name of the run.
    workdir: local folder of the experiment.

  Returns:
    The results of each run, by name.

  Raises:
    ValueError: if the workdir is a URL.
  """
  if '://' in workdir:
    raise ValueError(
      f'Experiments write figures to a local folder, but --workdir '
      f'({workdir!r}) is a URL.'
    )
  if not jax.config.jax_compilation_cache_dir:
    folder = os.path.abspath(os.path.join(workdir, 'compilation_cache'))
    jax.config.update('jax_compilation_cache_dir', folder)
  results = {}
  for index, (name, fields) in enumerate(changes.items(), 1):
    _logger.info('Run %d of %d: %s', index, len(changes), name)
    folder = os.path.join(workdir, 'runs', name)
    # ConfigDict(config) would share the nested groups.
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict(fields)
    scores = train.train_and_evaluate(changed, folder)
    results[name] = Result(
      scores | {'batch_size': changed.batch_size},
      metric_writer.read_metrics(folder),
    )
    # Compiled programs of earlier runs would fill the memory.
    jax.clear_caches()
  return results


def spread(values: Sequence[float]) -> str:
  """Formats fractions as percent: their mean, and the range of several."""
  mean = f'{100 * statistics.mean(values):.2f}'
  if len(values) == 1:
    return mean
  return f'{mean} [{100 * min(values):.2f}, {100 * max(values):.2f}]'


def _caption(
  text: str, config: ml_collections.ConfigDict, result: Result
) -> str:
  """Appends a description of the runs: data, network, steps, devices, jax."""
  data, versions = result.scores['dataset'], result.scores['versions']
  train_split, test_split = data['train'], data['test']
  seeds = NUM_SEEDS.value
  return (
    f'{text} {config.dataset.name}: trained on {train_split["classes"]} '
    f'classes ({train_split["images"]} images), tested on '
    f'{test_split["classes"]} others ({test_split["images"]} images); '
    f'{config.model.name}, '
    f'{config.dataset.image_size} pixels, {config.model.embedding_dim} '
    f'dimensions; {config.num_steps} steps of batch size {config.batch_size}; '
    f'{config.optimizer.name}; {seeds} seed{"s" if seeds > 1 else ""}; '
    f'{result.scores["devices"]}, jax {versions["jax"]}, '
    f'{datetime.date.today()}.'
  )


def write_table(
  rows: Sequence[Mapping[str, str]],
  path: str,
  *,
  text: str,
  config: ml_collections.ConfigDict,
  result: Result,
) -> None:
  """Writes PATH.csv, and PATH.md with a caption; logs the latter.

  The arguments are those of `publish`.
  """
  text = _caption(text, config, result)
  with files.write_atomically(path + '.csv', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  lines = [list(rows[0]), ['---'] * len(rows[0]), *(r.values() for r in rows)]
  table = '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
  with files.write_atomically(path + '.md') as file:
    file.write(f'{table}\n\n{text}\n')
  _logger.info('%s\n\n%s', table, text)


class Figure:
  """Axes side by side, with a caption; each series has a color and marker."""

  def __init__(self, num_axes: int, *, title: str):
    matplotlib.rcParams.update(
      {
        'font.size': 9,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'svg.hashsalt': 'proxy-nca',
      }
    )
    self._figure = matplotlib.figure.Figure(
      (4.8 * num_axes, 4.4), layout='constrained'
    )
    self._figure.suptitle(title)
    self.axes = self._figure.subplots(1, num_axes, squeeze=False)[0]
    self._styles = {}

  def draw(self, axes, name: str, x, values: Sequence[Sequence[float]]):
    """Draws a line through the means over seeds and a band of their range.

    Args:
      axes: one of `self.axes`.
      name: label of the series; it has the same color on all axes.
      x: float [num_points].
      values: float [num_seeds, num_points], fractions; drawn as percent.
    """
    style = self._styles.setdefault(name, len(self._styles))
    color = _COLORS[style % len(_COLORS)]
    values = 100 * np.asarray(values)
    axes.plot(
      x,
      values.mean(axis=0),
      label=name,
      color=color,
      markersize=4,
      marker=_MARKERS[style % len(_MARKERS)],
      linewidth=1.5,
    )
    if len(values) > 1:
      axes.fill_between(
        x,
        values.min(axis=0),
        values.max(axis=0),
        color=color,
        alpha=0.15,
        linewidth=0,
      )

  def save(self, path: str, text: str) -> None:
    """Writes PATH.png and PATH.svg with a caption."""
    for axes in self.axes:
      axes.grid(alpha=0.3)
      if not axes.get_ylabel():
        axes.set_ylabel('Recall@1 on unseen classes, %')
    self.axes[-1].legend(frameon=False)
    self._figure.supxlabel(text, fontsize=6.5, wrap=True, x=0.01, ha='left')
    for suffix in ('png', 'svg'):
      with files.write_atomically(f'{path}.{suffix}', 'wb') as file:
        self._figure.savefig(
          file,
          format=suffix,
          dpi=150,
          metadata={'Date': None} if suffix == 'svg' else {'Software': None},
        )


def publish(
  rows: Sequence[Mapping[str, str]],
  figure: Figure,
  path: str,
  *,
  text: str,
  config: ml_collections.ConfigDict,
  result: Result,
) -> None:
  """Writes the table and the figure of an experiment, with the same caption.

  Args:
    rows: rows of the table, all with the same columns.
    figure: the figure to save.
    path: path of the files, without suffix.
    text: beginning of the caption; a description of the runs is appended.
    config: config of the runs.
    result: result of one of the runs.
  """
  write_table(rows, path, text=text, config=config, result=result)
  figure.save(path, _caption(text, config, result))
