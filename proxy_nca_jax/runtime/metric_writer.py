"""Metrics of a run, written to metrics.jsonl and TensorBoard."""

import json
import os
import time
from collections.abc import Mapping

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from proxy_nca_jax.runtime import files, processes, saved_json

_FLUSH_SECONDS = 30  # Flushing waits for the disk.


def read_metrics(workdir: str) -> list[dict]:
  """Returns the rows of WORKDIR/metrics.jsonl; empty if it does not exist.

  A last line without its end, cut off by a kill, is ignored.

  Raises:
    ValueError: if another line is damaged; names the file and the line.
  """
  path = os.path.join(workdir, 'metrics.jsonl')
  if not os.path.lexists(path):
    return []
  if not os.path.isfile(path):
    raise ValueError(f'{path!r} is not a regular file: use another workdir.')
  rows = []
  with open(path, encoding='utf-8', errors='replace') as file:
    for number, line in enumerate(file, 1):
      if line.endswith('\n'):
        rows.append(_parse_row(path, number, line))
  return rows


def _parse_row(path: str, number: int, line: str) -> dict:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    row = None
  problem = None
  if not isinstance(row, dict):
    problem = 'it is no JSON object with a step'
  elif not saved_json.is_count(row.get('step')):
    step = saved_json.describe(row.get('step'))
    problem = f'its step is {step}; it must be {saved_json.COUNT.text}'
  else:
    for name, value in row.items():
      # The loss of a step that was skipped is not finite.
      if not saved_json.is_number(value, finite=False):
        shown = saved_json.describe(value)
        problem = f'its {name} is {shown}; it must be a number'
  if problem:
    raise ValueError(
      f'Line {number} of {path!r} is damaged: {problem}. Restore the file, or '
      'use another workdir.'
    )
  return row


class MetricWriter:
  """Writes rows of scalars, with the method names of clu's metric writers.

  A resumed run repeats the steps after its checkpoint, so the rows of these
  steps are removed first: the file ends up as that of an uninterrupted run.
    Only
  the primary process writes; on the others all methods do nothing.
  """

  def __init__(self, workdir: str, *, first_step: int):
    """Opens the files of a run.

    Args:
      workdir: an existing folder.
      first_step: the step of the restored checkpoint; later rows are removed.
    """
    self._file = self._board = None
    if not processes.is_primary():
      return
    path = os.path.join(workdir, 'metrics.jsonl')
    kept = [row for row in read_metrics(workdir) if row['step'] <= first_step]
    with files.write_atomically(path) as file:
      file.writelines(json.dumps(row) + '\n' for row in kept)
    self._file = open(path, 'a')
    self._board = _Board(
      os.path.join(workdir, 'tensorboard'), first_step=first_step
    )

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **scalars}) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._board.add(step, summary=summary.scalar(name, value))
    self._board.flush_if_due()

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    if self._file is None:
      return
    for name, text in texts.items():
      self._board.add(step, summary=summary.text(name, text))

  def close(self) -> None:
    if self._file is None:
      return
    self._file.close()
    self._board.close()


class _Board:
  """A TensorBoard event file, written on the calling thread.

  tensorboardX's SummaryWriter writes on a thread of its own: if a full disk
  ends that thread, the run waits for its queue forever.
  """

  def __init__(self, folder: str, *, first_step: int):
    os.makedirs(folder, exist_ok=True)
    self._file = event_file_writer.EventsWriter(os.path.join(folder, 'events'))
    # TensorBoard discards events of an interrupted run from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self.add(first_step + 1, session_log=start)
    self._flushed = time.monotonic()

  def add(self, step: int, **content) -> None:
    event = event_pb2.Event(wall_time=time.time(), step=step, **content)
    self._file.write_event(event)

  def flush_if_due(self) -> None:
    if time.monotonic() > self._flushed + _FLUSH_SECONDS:
      self._file.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    self._file.close()
