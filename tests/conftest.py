"""Eight CPU devices, before anything imports jax."""

import os
import pathlib
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
flags.FLAGS.mark_as_parsed()
