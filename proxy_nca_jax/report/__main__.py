"""Compares finished runs on one HTML page.

Runs that differ only in their seed are one row, with the mean and the range of
their scores.
"""

import argparse
import collections
import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from proxy_nca_jax import configuration
from proxy_nca_jax.evaluate import scores as scores_lib
from proxy_nca_jax.report import charts, pages
from proxy_nca_jax.report import results as results_lib
from proxy_nca_jax.runtime import errors, files, metric_writer


class _Saved(NamedTuple):
  """The saved results of a run.

  Attributes:
    name: the end of its workdir's path, longer where several runs share it.
    config: {'group.field': value}.
    results: the content of results.json.
    rows: the rows of metrics.jsonl.
  """

  name: str
  config: Mapping[str, Any]
  results: Mapping[str, Any]
  rows: Sequence[Mapping[str, float]]


def _names(workdirs: Sequence[str]) -> list[str]:
  """Returns the shortest ends of the paths that tell the workdirs apart.

  Raises:
    ValueError: if a workdir is given twice.
  """
  paths = [pathlib.Path(os.path.abspath(workdir)).parts for workdir in workdirs]
  if len(set(paths)) < len(paths):
    twice, _ = collections.Counter(paths).most_common(1)[0]
    raise ValueError(
      f'{os.path.join(*twice)!r} is given twice: name each run once.'
    )
  names = []
  for path in paths:
    length = 1
    while sum(other[-length:] == path[-length:] for other in paths) > 1:
      length += 1
    names.append(os.path.join(*path[-length:]))
  return names


def _read(workdir: str, name: str) -> _Saved:
  run, results = configuration.read_run(workdir), results_lib.read(workdir)
  if not run or not results:
    raise ValueError(
      f'{workdir!r} is not the workdir of a finished run: it has no '
      f'{"results.json" if run else "run.json"}.'
    )
  return _Saved(
    name,
    configuration.flatten(run['config']),
    results,
    metric_writer.read_metrics(workdir),
  )


def compare(workdirs: Sequence[str]) -> str:
  """Returns an HTML page that compares finished runs.

  Args:
    workdirs: the workdirs of the runs.

  Raises:
    ValueError: if a run is not finished.
  """
  groups = collections.defaultdict(list)
  for saved in map(_read, workdirs, _names(workdirs)):
    # A field that only some runs have also counts as a difference.
    key = json.dumps({**saved.config, 'seed': None}, sort_keys=True)
    groups[key].append(saved)
  groups = list(groups.values())
  titles = [_title(group) for group in groups]
  # Runs may have different scores: the columns are those of all of them.
  names = dict.fromkeys(
    name
    for group in groups
    for saved in group
    for name in scores_lib.score_names(saved.results['trained'])
  )
  table = pages.table(
    ('runs', 'dataset', 'test classes', 'seeds', *names),
    [
      (
        title,
        group[0].config.get('dataset.name'),
        group[0].results['dataset']['test']['classes'],
        len(group),
        *(_spread(group, name) for name in names),
      )
      for title, group in zip(titles, groups)
    ],
  )
  digests = {
    saved.results['dataset']['digest'] for group in groups for saved in group
  }
  note = ''
  if len(digests) > 1:
    note = (
      '<p><strong>These runs were tested on different data: their scores are '
      'not comparable.</strong></p>'
    )
  fields = sorted({name for group in groups for name in group[0].config})
  differing = [
    [name, *(json.dumps(group[0].config.get(name)) for group in groups)]
    for name in fields
    if name != 'seed'
    and len({json.dumps(group[0].config.get(name)) for group in groups}) > 1
  ]
  sections = [
    (
      'Scores of the trained networks',
      f'{note}<p>In percent: mean over the seeds [lowest, highest].</p>{table}',
    ),
    ('Training', _compared_curves(titles, groups)),
  ]
  if differing:
    sections.append(
      (
        'Differences in the configuration',
        pages.table(('field', *titles), differing),
      )
    )
  return pages.page(f'{len(workdirs)} runs', sections)


def _title(group: Sequence[_Saved]) -> str:
  first = group[0].name
  return first if len(group) == 1 else f'{first} and {len(group) - 1} more'


def _spread(group: Sequence[_Saved], name: str) -> str | None:
  values = [
    100 * saved.results['trained'][name]
    for saved in group
    if name in saved.results['trained']
  ]
  if not values:
    return None
  mean = f'{statistics.mean(values):.2f}'
  if len(values) == 1:
    return mean
  return f'{mean} [{min(values):.2f}, {max(values):.2f}]'


def _compared_curves(titles, groups) -> str:
  parts = []
  for field, label, scale in (
    ('loss', 'loss', 1),
    ('test.recall@1', 'Recall@1, percent', 100),
    ('validation.recall@1', 'validation Recall@1, percent', 100),
  ):
    series = {}
    for title, group in zip(titles, groups):
      # Only the first seed: the table shows the spread.
      values = [
        (row['step'], scale * row[field])
        for row in group[0].rows
        if field in row
      ]
      if len(values) > 1:
        series[title] = tuple(zip(*values))
    if series:
      parts.append(
        charts.lines(
          series,
          title=f'{label} against steps',
          x_label='steps',
          y_label=label,
        )
      )
  return f'<div class="charts">{"".join(parts)}</div>'


def main(
  arguments: Sequence[str] | None = None,
  *,
  prog: str = 'python -m proxy_nca_jax.report',
) -> None:
  """Runs the command line.

  Args:
    arguments: the command's arguments; by default those of the process.
    prog: the name by which --help refers to the command.
  """
  parser = argparse.ArgumentParser(prog=prog, description=__doc__)
  parser.add_argument(
    'runs', nargs='+', metavar='RUN', help='workdir of a finished run'
  )
  parser.add_argument(
    '--output',
    default='comparison.html',
    metavar='FILE',
    help='HTML file to write (default: comparison.html)',
  )
  arguments = parser.parse_args(arguments)
  with errors.in_one_line():
    page = compare(arguments.runs)
    with files.write_atomically(arguments.output) as file:
      file.write(page)
  print(
    f'Wrote a comparison of {len(arguments.runs)} runs to {arguments.output}'
  )


if __name__ == '__main__':
  main()
