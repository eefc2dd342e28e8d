"""Eight CPU devices and short compilations, before anything imports jax."""

import atexit
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  # Tests spend longer compiling than computing.
  + ' --xla_backend_optimization_level=0'
  + ' --xla_llvm_disable_expensive_passes=true'
)
# The former emitters compile in half the time; jaxlib 0.11 has none.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
# Tests and their processes share compiled programs, prepared datasets, fonts.
for _name in ('JAX_COMPILATION_CACHE_DIR', 'TFDS_DATA_DIR', 'MADE_FONTS_DIR'):
  if _name not in os.environ:
    os.environ[_name] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ[_name], ignore_errors=True)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
# Threads that wait for each other by spinning take the time of other tests.
for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
  os.environ[_name] = '1'
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
from absl import flags

# Files that take minutes start first, so that all processes end together.
_LONG = (
  'test_processes',
  'test_train',
  'test_train_step',
  'test_kills',
  'test_main',
  'test_faults',
  'test_docs',
  'test_published',
  'test_workdir',
  'test_search',
  'test_inference',
  'test_experiments',
)


def pytest_collection_modifyitems(items):
  """Sorts the long files first."""
  order = {name: position for position, name in enumerate(_LONG)}
  items.sort(key=lambda item: order.get(item.path.stem, len(order)))


jax.config.update('jax_numpy_rank_promotion', 'raise')
flags.FLAGS.mark_as_parsed()
