"""The command `proxy-nca`, and training as a command."""

import importlib
import sys

from proxy_nca_jax.runtime import huge_pages

# Each is a module with a main(arguments, prog=...).
_COMMANDS = {
  'train': 'train a network, and score it on unseen classes',
  'evaluate': 'score embeddings from NumPy files',
  'search': 'index a folder of images, search, cluster, classify, export',
  'report': 'compare runs in one page',
  'datasets': "prepare the papers' datasets",
  'models': 'list the backbones, their weights and licenses',
}

_TRAIN = """Trains a network, and scores it on classes that training never saw.

  {prog} --config=glyphs --workdir=/tmp/run
  {prog} --config=image_folder --config.dataset.root=DIR --workdir=/tmp/run
  {prog} --config=cub200:proxynca_pp --workdir=/tmp/cub

--config.FIELD=VALUE sets a field of the config; configs/default.py lists and
explains all of them. --config.dry_run=True checks the run and prints what it
would do. The workdir receives checkpoints, metrics, results.json and
report.html. Repeat the command to resume a run that was stopped."""


def train(*, prog: str) -> None:
  """Trains or scores a run as the command line says.

  Args:
    prog: the command's name in its --help.
  """
  # Imported here: a command restarts before them, and the others do without.
  from absl import flags

  from proxy_nca_jax import train as train_lib
  from proxy_nca_jax.runtime import command_line

  flags.DEFINE_enum(
    'mode',
    'train',
    ['train', 'eval'],
    'train, or eval to score the newest checkpoint without training.',
  )

  def run(config, workdir):
    train_lib.train_and_evaluate(config, workdir, mode=flags.FLAGS.mode)

  command_line.run(run, description=_TRAIN.format(prog=prog))


def script() -> None:
  """Runs `proxy-nca COMMAND` as the installed script."""
  huge_pages.restart()
  main()


def main() -> None:
  """Runs `proxy-nca COMMAND`; without a command, flags are those of train."""
  command = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if command in _COMMANDS:
    prog, arguments = f'proxy-nca {command}', sys.argv[2:]
    if command == 'train':
      sys.argv = [prog, *arguments]
      train(prog=prog)
    else:
      module = importlib.import_module(f'proxy_nca_jax.{command}.__main__')
      module.main(arguments, prog=prog)
  elif command in ('-h', '-help', '--help') and len(sys.argv) < 3:
    print(
      'Deep metric learning with proxies.\n\nusage: proxy-nca COMMAND ...\n'
    )
    for name, text in _COMMANDS.items():
      print(f'  {name:10}{text}')
    print('\nproxy-nca COMMAND --help explains each command.')
  elif command.startswith('-'):
    train(prog='proxy-nca')
  else:
    print(
      f'Error: proxy-nca has no command {command!r}: choose one of '
      f'{", ".join(_COMMANDS)}.',
      file=sys.stderr,
    )
    sys.exit(2)
