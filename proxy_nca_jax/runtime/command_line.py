"""What commands with a --config and a --workdir share: flags, log, errors.

Wrong input ends with one line on stderr and exit status 2.
"""

import errno
import functools
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable

import jax
import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from proxy_nca_jax import configs
from proxy_nca_jax.configs import default
from proxy_nca_jax.runtime import errors, processes, provenance, signals

_logger = logging.getLogger('proxy_nca_jax')

# The flags are those of the command, whose --help lists them.
flags.disclaim_key_flags()


def run(
  work: Callable[[ml_collections.ConfigDict, str], object],
  *,
  config: str | None = None,
) -> None:
  """Runs work(config, workdir) as the command line says.

  Args:
    work: what to do.
    config: the file to take if none is given; without it one must be.
  """
  config_flags.DEFINE_config_file(
    'config',
    config,
    'A file, or the name of one of configs/, such as sop; after a colon a '
    'recipe, if it has some.',
  )
  flags.DEFINE_string(
    'workdir', None, 'Where the run is kept: a folder, or a URL such as gs://.'
  )
  flags.DEFINE_string(
    'coordinator_address',
    None,
    'Of several processes, HOST:PORT where process 0 listens. SLURM, Open MPI '
    'and TPU pods tell it themselves, and the number and the id.',
  )
  flags.DEFINE_integer('num_processes', None, 'Of the run.', lower_bound=1)
  flags.DEFINE_integer(
    'process_id', None, 'Of this one, from 0.', lower_bound=0
  )
  flags.DEFINE_bool(
    'multiprocess', False, 'Join the other hosts of a TPU pod slice.'
  )
  flags.mark_flags_as_required(['workdir'] if config else ['config', 'workdir'])
  app.run(
    functools.partial(_run, work),
    flags_parser=functools.partial(_parse_flags, work),
  )


def _run(work, argv: list[str]) -> None:
  if len(argv) > 1:
    errors.fail(f'Unexpected arguments: {" ".join(argv[1:])}')
  # Outside of a run a Ctrl-C, and in it a second one, ends the process at once.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  # The libraries report their inner steps through absl.
  absl_logging.set_verbosity(absl_logging.FATAL)
  try:
    processes.initialize(
      coordinator_address=flags.FLAGS.coordinator_address,
      num_processes=flags.FLAGS.num_processes,
      process_id=flags.FLAGS.process_id,
      multiprocess=flags.FLAGS.multiprocess,
    )
  except (ValueError, RuntimeError) as error:
    errors.fail(_describe(error))
  _log_to_stdout()
  config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
  _logger.info(
    '%s in %s, on %d x %s, %s',
    flags.FLAGS['config'].config_filename,
    workdir,
    jax.device_count(),
    jax.devices()[0].device_kind,
    ' '.join(f'{name} {x}' for name, x in provenance.versions().items()),
  )
  for name, value in flags.FLAGS['config'].override_values.items():
    _logger.info('config.%s = %r', name, value)
  _logger.debug('%s', config)
  try:
    work(config, workdir)
  except signals.Stopped as stopped:
    print(f'Ended by {stopped}.', file=sys.stderr)
    sys.exit(128 + stopped.number)
  except (ValueError, OSError) as error:
    _logger.debug('The run failed', exc_info=True)
    errors.fail(_describe(error))
  except jax.errors.JaxRuntimeError as error:
    _logger.debug('The run failed', exc_info=True)
    if 'RESOURCE_EXHAUSTED' in str(error):
      errors.fail(
        f'The memory of a device is full ({str(error)[:300]}). Make '
        'config.batch_size, config.dataset.image_size or the network smaller, '
        'or set config.model.remat=True; --config.dry_run=True tells what a '
        'step takes.'
      )
    if jax.process_count() == 1:
      raise
    errors.fail(
      'Another process of this run has ended or cannot be reached '
      f'({str(error)[:300]}). Start all of them again: the run goes on '
      'from its last checkpoint.'
    )


def _describe(error: Exception) -> str:
  text = ' '.join(str(error).split())
  is_full = 'No space left' in text or 'RESOURCE_EXHAUSTED' in text
  if is_full or getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
    return (
      f'The disk is full ({text[:300]}). Free some space and start the same '
      'command: the run goes on from its last checkpoint.'
    )
  return text


def _log_to_stdout() -> None:
  handler = logging.StreamHandler(sys.stdout)
  # Process 0 speaks for all.
  handler.setLevel(logging.INFO if processes.is_primary() else logging.WARNING)
  handler.setFormatter(logging.Formatter('%(message)s'))
  _logger.addHandler(handler)
  _logger.setLevel(logging.DEBUG)
  _logger.propagate = False
  # A full disk fails in the libraries' threads and in the log as well; the main
  # thread is told, and says it in one line.
  logging.raiseExceptions = False
  threading.excepthook = _log_thread_error
  sys.unraisablehook = lambda args: _logger.debug('%s', args.exc_value)


def _log_thread_error(args: threading.ExceptHookArgs) -> None:
  error = (args.exc_type, args.exc_value, args.exc_traceback)
  _logger.debug('A thread failed', exc_info=error)


def _parse_flags(work, argv: list[str]) -> list[str]:
  if {'-h', '-help', '--help'} & set(argv[1:]):
    # absl's is of __main__, which for an installed command knows nothing.
    module = sys.modules[work.__module__]
    _, _, listed = flags.FLAGS.module_help(module).partition(':\n')
    print(module.__doc__, 'Flags:', listed, sep='\n')
    sys.exit()
  argv = [
    _find_config(argument)
    if before in ('--config', '-config')
    else re.sub(
      '^(--?config=)(.*)', lambda m: m[1] + _find_config(m[2]), argument
    )
    for before, argument in zip(['', *argv], argv)
  ]
  try:
    rest = flags.FLAGS(argv)
    flags.FLAGS.config.to_dict()  # A missing file shows at the first use.
    return rest
  # A config file is the user's code, and may raise anything.
  except Exception as error:
    text = str(error).strip()
    if 'Traceback' in text:
      text = text.splitlines()[-1].removeprefix('ValueError: ')
    if 'get_config() takes 0 positional arguments' in text:
      text = 'This config has no recipes: leave out the colon and its name.'
    errors.fail(_missing_config(argv) or _unknown_field(argv) or text)


def _find_config(name: str) -> str:
  """Returns the file of a config that is named as sop or cub200:vit."""
  stem, *recipe = name.split(':')
  path = os.path.join(configs.FOLDER, f'{stem}.py')
  is_known = re.fullmatch(r'\w+', stem) and os.path.exists(path)
  return ':'.join([path, *recipe]) if is_known else name


def _missing_config(argv: list[str]) -> str | None:
  """Describes a --config that is no file."""
  for before, argument in zip(['', *argv], argv):
    match = re.match('--?config=(.*)', argument)
    name = match[1] if match else argument
    is_config = match or before in ('--config', '-config')
    if is_config and not os.path.exists(name.split(':')[0]):
      folder = configs.FOLDER
      known = sorted(
        file.removesuffix('.py')
        for file in os.listdir(folder)
        if file.endswith('.py') and file not in ('default.py', 'recipes.py')
      )
      return (
        f'There is no config {name!r} (--config): name a file, or one of '
        f'{", ".join(known)}.'
      )
  return None


def _unknown_field(argv: list[str]) -> str | None:
  """Describes the first `--config.x` that no config has."""
  for argument in argv:
    if not (match := re.match(r'--?(?:no)?config\.([^=]+)', argument)):
      continue
    fields, group = default.get_config(), 'config'
    for name in match[1].split('.'):
      if not hasattr(fields, 'keys') or name not in fields:
        choices = sorted(fields) if hasattr(fields, 'keys') else ['nothing']
        return (
          f'{group} has no field {name!r} ({argument}): choose among '
          f'{", ".join(choices)}.'
        )
      fields, group = fields[name], f'{group}.{name}'
  return None
