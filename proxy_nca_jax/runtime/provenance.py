"""Provenance of results: the commit of this code and library versions."""

import importlib.metadata
import os
import pathlib
import subprocess


def commit() -> str:
  """Returns the git commit of this code, or 'unknown' outside a checkout."""
  folder = str(pathlib.Path(__file__).parents[2])
  # git would look upwards: an installed package may lie in another checkout.
  if not os.path.exists(os.path.join(folder, '.git')):
    return 'unknown'
  command = ['git', '-C', folder, 'rev-parse', 'HEAD']
  try:
    result = subprocess.run(
      command, capture_output=True, text=True, check=False
    )
  except OSError:  # git is not installed.
    return 'unknown'
  return result.stdout.strip() or 'unknown'


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that results depend on."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
  return {name: importlib.metadata.version(name) for name in names}
