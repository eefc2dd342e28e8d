"""What results come from: the code and its libraries."""

import importlib.metadata
import os
import pathlib
import subprocess


def commit() -> str:
  """Returns the commit of this code, or 'unknown' if it is no checkout."""
  folder = str(pathlib.Path(__file__).parents[2])
  # An installed package may lie in a checkout of something else.
  if not os.path.exists(os.path.join(folder, '.git')):
    return 'unknown'
  command = ['git', '-C', folder, 'rev-parse', 'HEAD']
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:  # There is no git.
    return 'unknown'
  return found.stdout.strip() or 'unknown'


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that results depend on."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
  return {name: importlib.metadata.version(name) for name in names}
