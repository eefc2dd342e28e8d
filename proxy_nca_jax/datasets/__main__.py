"""Prepares and lists data sets: python -m proxy_nca_jax.datasets --help."""

import argparse
import logging
import os

from proxy_nca_jax import datasets
from proxy_nca_jax.runtime import errors


def _parse(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m proxy_nca_jax.datasets', description=__doc__
  )
  commands = parser.add_subparsers(dest='command', required=True)
  prepare = commands.add_parser(
    'prepare',
    help='write the records of a data set, so that training starts at once',
  )
  prepare.add_argument('name', choices=sorted(datasets.PUBLISHED))
  prepare.add_argument(
    '--allow_incomplete',
    action='store_true',
    help='go on with what is there if it is not quite as published',
  )
  show = commands.add_parser('list', help='show the data sets and their state')
  for command in (prepare, show):
    command.add_argument(
      '--data_dir',
      default='',
      help='where prepared data sets lie; by default ~/tensorflow_datasets',
    )
    command.add_argument(
      '--manual_dir', default='', help='archives or extracted folders you have'
    )
  return parser.parse_args(arguments)


def _prepare(arguments: argparse.Namespace) -> None:
  builder, skipped = datasets.prepare(vars(arguments))
  for name, reason in skipped:
    print(f'left out: {name}: {reason}')
  for split, info in builder.info.splits.items():
    print(f'{split}: {info.num_examples:,} images')
  print(f'{arguments.name} is in {builder.data_path}')


def _list(data_dir: str, manual_dir: str) -> None:
  data_dir = datasets.find_data_dir(data_dir)
  rows = [('data set', 'split', 'classes', 'images', 'state')]
  for name in sorted(datasets.PUBLISHED):
    builder, _ = datasets.DATASETS[name](
      data_dir=data_dir, manual_dir=manual_dir, allow_incomplete=False
    )
    state = 'archives at hand' if builder.is_at_hand() else '-'
    if os.path.exists(builder.data_path):
      state = 'prepared'
    for split, (num_images, num_classes) in builder.counts.items():
      rows.append((name, split, f'{num_classes:,}', f'{num_images:,}', state))
  widths = [max(map(len, column)) for column in zip(*rows)]
  print(f'In {data_dir}:')
  for name, split, *numbers, state in rows:
    cells = [name.ljust(widths[0]), split.ljust(widths[1])]
    cells += [n.rjust(w) for n, w in zip(numbers, widths[2:])]
    print('  '.join([*cells, state]))
  print('glyphs is drawn from fonts, and image_folder is your own pictures.')


def main(arguments: list[str] | None = None) -> None:
  arguments = _parse(arguments)
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  logging.getLogger('proxy_nca_jax').setLevel(logging.INFO)
  logging.getLogger('absl').setLevel(logging.ERROR)
  with errors.in_one_line(stopped='Stopped. The same command starts anew.'):
    if arguments.command == 'prepare':
      _prepare(arguments)
    else:
      _list(arguments.data_dir, arguments.manual_dir)


if __name__ == '__main__':
  main()
