"""Prepares and lists datasets."""

import argparse
import logging
import os
from collections.abc import Sequence

from proxy_nca_jax import datasets
from proxy_nca_jax.runtime import errors, folders


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog=prog, description=__doc__)
  commands = parser.add_subparsers(
    dest='command', required=True, metavar='COMMAND'
  )
  prepare_help = 'Prepare a dataset in advance, so that training starts at once'
  prepare = commands.add_parser(
    'prepare', help=prepare_help, description=f'{prepare_help}.'
  )
  prepare.add_argument('name', choices=sorted(datasets.PUBLISHED))
  prepare.add_argument(
    '--allow_incomplete',
    action='store_true',
    help='use the files even if they differ from the publication; log how',
  )
  list_help = 'Show the datasets and whether they are prepared'
  show = commands.add_parser(
    'list', help=list_help, description=f'{list_help}.'
  )
  for command in (prepare, show):
    command.add_argument(
      '--data_dir',
      default='',
      metavar='DIR',
      help='folder of prepared datasets (default: ~/tensorflow_datasets)',
    )
    command.add_argument(
      '--manual_dir',
      default='',
      metavar='DIR',
      help='folder with archives that you downloaded, or their extracted files',
    )
  return parser.parse_args(arguments)


def _prepare(arguments: argparse.Namespace) -> None:
  builder, skipped = datasets.prepare(vars(arguments))
  if skipped:
    kinds = errors.count_kinds(reason for _, reason in skipped)
    print(f'problems: {kinds}')
  if skipped and os.path.exists(builder.problems_path):
    print(f'All of them are listed in {builder.problems_path}')
  for split, info in builder.info.splits.items():
    print(f'{split}: {info.num_examples:,} images')
  print(f'Prepared {arguments.name} in {builder.data_path}')


def _list(data_dir: str, manual_dir: str) -> None:
  data_dir = datasets.find_data_dir(data_dir)
  rows = [('dataset', 'split', 'classes', 'images', 'state')]
  for name in sorted(datasets.PUBLISHED):
    builder, _ = datasets.DATASETS[name](
      data_dir=data_dir, manual_dir=manual_dir, allow_incomplete=False
    )
    state = 'archives found' if builder.is_available() else '-'
    if os.path.exists(builder.data_path):
      state = 'prepared'
    for split, (num_images, num_classes) in builder.counts.items():
      rows.append((name, split, f'{num_classes:,}', f'{num_images:,}', state))
  widths = [max(map(len, column)) for column in zip(*rows)]
  print(f'Datasets in {data_dir}:')
  for name, split, *counts, state in rows:
    cells = [name.ljust(widths[0]), split.ljust(widths[1])]
    cells += [count.rjust(width) for count, width in zip(counts, widths[2:])]
    print('  '.join([*cells, state]))
  print(
    'Training prepares three more: glyphs, drawn from fonts, image_folder, '
    'your own images, and embeddings, your own vectors.'
  )


def main(
  arguments: Sequence[str] | None = None,
  *,
  prog: str = 'python -m proxy_nca_jax.datasets',
) -> None:
  """Runs the command line.

  Args:
    arguments: the command's arguments; by default those of the process.
    prog: the name by which --help refers to the command.
  """
  arguments = _parse(arguments, prog)
  folders.write_utf8_to_stdout()
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  logging.getLogger('proxy_nca_jax').setLevel(logging.INFO)
  logging.getLogger('absl').setLevel(logging.ERROR)
  with errors.in_one_line(stopped='Stopped. Start the same command again.'):
    if arguments.command == 'prepare':
      _prepare(arguments)
    else:
      _list(arguments.data_dir, arguments.manual_dir)


if __name__ == '__main__':
  main()
