"""Lists the backbones, and the published weights that they start from."""

import argparse
from collections.abc import Sequence

from proxy_nca_jax.models import published
from proxy_nca_jax.runtime import errors, folders

_HEADER = ('name', 'parameters', 'float32', 'image', 'license')


def format_table() -> str:
  """Returns a table of `published.WEIGHTS`: two lines for each backbone."""
  rows = [
    (
      name,
      f'{weights.num_parameters:,}',
      f'{weights.num_bytes / 1e6:,.0f} MB',
      str(weights.image_size),
      weights.terms,
    )
    for name, weights in published.WEIGHTS.items()
  ]
  widths = [max(map(len, column)) for column in zip(_HEADER, *rows)]
  lines = []
  for cells in (_HEADER, *rows):
    first, *numbers, last = cells
    padded = [first.ljust(widths[0])]
    padded += [x.rjust(width) for x, width in zip(numbers, widths[1:])]
    lines.append('  '.join([*padded, last]))
    if cells is not _HEADER:
      weights = published.WEIGHTS[first]
      place = weights.repository or weights.source
      lines.append(f'    {place}: {weights.strength}')
  return '\n'.join(lines)


def main(
  arguments: Sequence[str] | None = None,
  *,
  prog: str = 'python -m proxy_nca_jax.models',
) -> None:
  """Runs the command line.

  Args:
    arguments: the command's arguments; by default those of the process.
    prog: the name by which --help refers to the command.
  """
  argparse.ArgumentParser(prog=prog, description=__doc__).parse_args(arguments)
  folders.write_utf8_to_stdout()
  with errors.in_one_line():
    print(format_table())
    print(
      '\nTrain one with --config.model.name=NAME --config.model.init_from='
      f'{published.PUBLISHED},\nwhich downloads {published.FILE} from Hugging '
      'Face, or with a file: --config.model.init_from=FILE.\nThe numbers of '
      'parameters leave out the classifier, which a file may have too.'
    )


if __name__ == '__main__':
  main()
