"""Compares runs side by side.

python -m proxy_nca_jax.report RUN [RUN ...] --output=comparison.html

Those that differ in their seed alone are one column with their spread.
"""

import argparse
import collections
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from proxy_nca_jax import configuration
from proxy_nca_jax.evaluate import scores as scores_lib
from proxy_nca_jax.report import charts, pages
from proxy_nca_jax.runtime import errors, files, metric_writer
from proxy_nca_jax.runtime import workdir as workdir_lib


class _Saved(NamedTuple):
  """What a run left.

  Attributes:
    name: of its folder.
    config: {'group.field': value}.
    results: of results.json.
    rows: of metrics.jsonl.
  """

  name: str
  config: Mapping[str, Any]
  results: Mapping[str, Any]
  rows: Sequence[Mapping[str, float]]


def _read(workdir: str) -> _Saved:
  run, results = (
    workdir_lib.read_json(os.path.join(workdir, name))
    for name in ('run.json', 'results.json')
  )
  if not run or not results:
    raise ValueError(
      f'{workdir!r} holds no finished run: it has no '
      f'{"results.json" if run else "run.json"}.'
    )
  return _Saved(
    os.path.basename(os.path.abspath(workdir)),
    configuration.flatten(run['config']),
    results,
    metric_writer.read_metrics(workdir),
  )


def compare(workdirs: Sequence[str]) -> str:
  """Returns a page that compares finished runs.

  Raises:
    ValueError: if one is not finished.
  """
  groups = collections.defaultdict(list)
  for saved in map(_read, workdirs):
    # A field that is in one alone counts as different.
    key = json.dumps({**saved.config, 'seed': None}, sort_keys=True)
    groups[key].append(saved)
  groups = list(groups.values())
  titles = [_title(group) for group in groups]
  names = scores_lib.score_names(groups[0][0].results['trained'])
  table = pages.table(
    ('runs', 'seeds', *names),
    [
      (title, len(group), *(_spread(group, name) for name in names))
      for title, group in zip(titles, groups)
    ],
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
      '<p>Percent: the mean over the seeds, and their range.</p>' + table,
    ),
    ('Training', _compared_curves(titles, groups)),
  ]
  if differing:
    sections.append(
      ('Where they differ', pages.table(('field', *titles), differing))
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
      # The first of the seeds: their spread is in the table.
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


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m proxy_nca_jax.report',
    description='Compares finished runs on one page.',
  )
  parser.add_argument('runs', nargs='+', metavar='RUN', help='a workdir')
  parser.add_argument(
    '--output',
    default='comparison.html',
    metavar='FILE',
    help='comparison.html by default',
  )
  arguments = parser.parse_args(arguments)
  with errors.in_one_line():
    page = compare(arguments.runs)
    with files.write_atomically(arguments.output) as file:
      file.write(page)
  print(f'{len(arguments.runs)} runs are compared in {arguments.output}')


if __name__ == '__main__':
  main()
