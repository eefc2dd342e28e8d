"""Commands with a --config and a --workdir: their flags, log and errors.

Invalid input ends with one line on stderr and exit status 2.
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
from proxy_nca_jax.runtime import (
  errors,
  folders,
  processes,
  provenance,
  signals,
)

_logger = logging.getLogger('proxy_nca_jax')

# Flags defined here belong to the calling module, whose --help lists them.
flags.disclaim_key_flags()


def run(
  work: Callable[[ml_collections.ConfigDict, str], object],
  *,
  config: str | None = None,
  description: str | None = None,
) -> None:
  """Runs work(config, workdir) with the flags of the command line.

  Args:
    work: the command.
    config: the default of --config; None makes the flag required.
    description: the text above the flags in --help; by default the docstring of
      the module that defines `work`.
  """
  config_flags.DEFINE_config_file(
    'config',
    config,
    'Path of a config file, or the name of a file in configs/, such as sop; a '
    'colon and the name of a recipe may follow.',
  )
  flags.DEFINE_string(
    'workdir', None, 'Folder of the run, or a URL such as gs://bucket/run.'
  )
  flags.DEFINE_string(
    'coordinator_address',
    None,
    'HOST:PORT on which process 0 of several listens. Under SLURM, Open MPI 4 '
    'and on TPU slices it is found, and so are the number and the index.',
  )
  flags.DEFINE_integer(
    'num_processes', None, 'Number of processes in the run.', lower_bound=1
  )
  flags.DEFINE_integer(
    'process_id', None, 'Index of this process, from 0.', lower_bound=0
  )
  flags.DEFINE_bool(
    'multiprocess',
    False,
    'Join the other pods of an Indexed Job of Kubernetes; elsewhere processes '
    'that JAX can find are joined without it.',
  )
  flags.mark_flags_as_required(['workdir'] if config else ['config', 'workdir'])
  module = sys.modules[work.__module__]
  errors.open_closed_streams()
  app.run(
    functools.partial(_run, work),
    flags_parser=functools.partial(
      _parse_flags, module=module, description=description or module.__doc__
    ),
  )


def _run(work, argv: list[str]) -> None:
  if len(argv) > 1:
    errors.fail(f'Unexpected arguments: {" ".join(argv[1:])}')
  # Ctrl-C ends the process at once, except for the first one during a run.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  # Libraries log their internals through absl.
  absl_logging.set_verbosity(absl_logging.FATAL)
  try:
    processes.initialize(
      coordinator_address=flags.FLAGS.coordinator_address,
      num_processes=flags.FLAGS.num_processes,
      process_id=flags.FLAGS.process_id,
      multiprocess=flags.FLAGS.multiprocess,
    )
    processes.devices()
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
    processes.leave_after_failure()
    errors.fail(_describe(error))
  except jax.errors.JaxRuntimeError as error:
    _logger.debug('The run failed', exc_info=True)
    processes.leave_after_failure()
    reason = errors.one_line(error, max_length=300)
    if 'RESOURCE_EXHAUSTED' in str(error):
      errors.fail(
        f'The memory of a device is full ({reason}). Make '
        'config.batch_size, config.dataset.image_size or the network smaller, '
        'or set config.model.remat=True; --config.dry_run=True prints the '
        'memory of a step.'
      )
    if jax.process_count() == 1:
      raise
    errors.fail(
      'Another process of this run has ended or cannot be reached '
      f'({reason}). Start all of them again: the run resumes from its last '
      'checkpoint.'
    )


def _describe(error: Exception) -> str:
  text = errors.one_line(error, max_length=None)
  is_full = 'No space left' in text or 'RESOURCE_EXHAUSTED' in text
  if is_full or getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
    return (
      f'The disk is full ({text[:300]}). Free some space and start the same '
      'command: the run resumes from its last checkpoint.'
    )
  return text


def _log_to_stdout() -> None:
  folders.write_utf8_to_stdout()
  handler = logging.StreamHandler(sys.stdout)
  # The primary process logs for all of them.
  handler.setLevel(logging.INFO if processes.is_primary() else logging.WARNING)
  handler.setFormatter(logging.Formatter('%(message)s'))
  _logger.addHandler(handler)
  _logger.setLevel(logging.DEBUG)
  _logger.propagate = False
  # A full disk raises in the threads of libraries and in logging too. The main
  # thread gets the same error and reports it in one line.
  logging.raiseExceptions = False
  threading.excepthook = _log_thread_error
  sys.unraisablehook = lambda args: _logger.debug('%s', args.exc_value)


def _log_thread_error(args: threading.ExceptHookArgs) -> None:
  error = (args.exc_type, args.exc_value, args.exc_traceback)
  _logger.debug('A thread failed', exc_info=error)


def _parse_flags(argv: list[str], *, module, description: str) -> list[str]:
  if {'-h', '-help', '--help'} & set(argv[1:]):
    # absl would list the flags of __main__, which an installed command lacks.
    _, _, listed = flags.FLAGS.module_help(module).partition(':\n')
    print(description, 'Flags:', listed, sep='\n\n')
    sys.exit()
  argv = [_replace_config(*pair) for pair in zip(['', *argv], argv)]
  try:
    remaining = flags.FLAGS(argv)
    flags.FLAGS.config.to_dict()  # A missing file is reported at first use.
    return remaining
  # A config file is code of the user and may raise anything.
  except Exception as error:
    text = str(error).strip()
    if 'Traceback' in text:
      text = text.splitlines()[-1].removeprefix('ValueError: ')
    if 'get_config() takes 0 positional arguments' in text:
      text = 'This config has no recipes: remove the colon and the name.'
    errors.fail(_missing_config(argv) or _unknown_field(argv) or text)


def _replace_config(before: str, argument: str) -> str:
  """Replaces the name of a config in an argument by its path.

  Args:
    before: the preceding argument.
    argument: '--config=NAME', 'NAME' after '--config', or any other.
  """
  if before in ('--config', '-config'):
    return _find_config(argument)
  match = re.fullmatch('(--?config=)(.*)', argument)
  return match[1] + _find_config(match[2]) if match else argument


def _find_config(name: str) -> str:
  """Returns the path of a config named as in sop or cub200:vit."""
  stem, *recipe = name.split(':')
  path = os.path.join(configs.FOLDER, f'{stem}.py')
  is_known = re.fullmatch(r'\w+', stem) and os.path.exists(path)
  return ':'.join([path, *recipe]) if is_known else name


def _missing_config(argv: list[str]) -> str | None:
  """Returns an error message if --config names no file."""
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
        f'There is no config {name!r} (--config): give the path of a file, or '
        f'one of {", ".join(known)}.'
      )
  return None


def _unknown_field(argv: list[str]) -> str | None:
  """Returns an error message for the first unknown `--config.x`."""
  for argument in argv:
    if not (match := re.match(r'--?(?:no)?config\.([^=]+)', argument)):
      continue
    fields, group = default.get_config(), 'config'
    for name in match[1].split('.'):
      if not hasattr(fields, 'keys') or name not in fields:
        choices = sorted(fields) if hasattr(fields, 'keys') else ['nothing']
        return (
          f'{group} has no field {name!r} ({argument}): choose one of '
          f'{", ".join(choices)}.'
        )
      fields, group = fields[name], f'{group}.{name}'
  return None
