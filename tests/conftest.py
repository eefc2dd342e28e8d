"""Eight CPU devices and short compilations, before anything imports jax."""

import atexit
import os
import pathlib
import shutil
import sys
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  # Tests compile for longer than they compute.
  + ' --xla_backend_optimization_level=0'
  + ' --xla_llvm_disable_expensive_passes=true'
  + ' --xla_cpu_use_fusion_emitters=false'
)
# A program is compiled once and a data set is prepared once, whichever test or
# process of a test needs it.
for _name in ('JAX_COMPILATION_CACHE_DIR', 'TFDS_DATA_DIR'):
  if _name not in os.environ:
    os.environ[_name] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ[_name], ignore_errors=True)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
from absl import flags

# Whole runs, of minutes: what begins with them ends with both processes busy.
_LONG = (
  'test_processes',
  'test_train',
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
  """Puts the long files first, in that order."""
  order = {name: place for place, name in enumerate(_LONG)}
  items.sort(key=lambda item: order.get(item.path.stem, len(order)))


jax.config.update('jax_numpy_rank_promotion', 'raise')
flags.FLAGS.mark_as_parsed()
