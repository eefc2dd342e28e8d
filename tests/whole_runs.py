"""What a run leaves behind, as far as two runs must agree in it."""

import jax
import numpy as np

from proxy_nca_jax import metric_writer
from proxy_nca_jax import state as state_lib

_TIMINGS = ('images_per_second', 'steps_per_second', 'input_wait')


def final_state(workdir) -> dict:
  """Returns the newest checkpoint, as it is saved."""
  checkpoints = state_lib.Checkpoints(str(workdir), keep=2)
  saved = checkpoints._checkpointer.load(max(checkpoints.steps))
  checkpoints.close()
  return saved


def metrics(workdir) -> list[dict]:
  """Returns the rows of metrics.jsonl without what depends on the clock."""
  return [
    {name: value for name, value in row.items() if name not in _TIMINGS}
    for row in metric_writer.read_metrics(str(workdir))
  ]


def assert_same_state(workdir, other) -> None:
  """Fails unless the newest checkpoints agree in every bit."""
  actual, expected = final_state(workdir), final_state(other)
  assert int(actual['state']['step']) == int(expected['state']['step'])
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
