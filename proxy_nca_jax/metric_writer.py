"""Scalars of a run: to metrics.jsonl and TensorBoard."""

import json
import os
from collections.abc import Mapping

import tensorboardX


def read_metrics(workdir: str) -> list[dict]:
  """Returns the rows of WORKDIR/metrics.jsonl; a torn last line is left out."""
  path = os.path.join(workdir, 'metrics.jsonl')
  if not os.path.exists(path):
    return []
  rows = []
  with open(path) as file:
    for line in file:
      if line.endswith('\n'):
        rows.append(json.loads(line))
  return rows


class MetricWriter:
  """Writes rows of scalars; the names of the methods are clu's.

  A resumed run repeats the steps after its checkpoint, so their rows are
  removed: its file has the same rows as that of a straight run.
  """

  def __init__(self, workdir: str, *, first_step: int):
    path = os.path.join(workdir, 'metrics.jsonl')
    kept = [row for row in read_metrics(workdir) if row['step'] <= first_step]
    with open(path + '.tmp', 'w') as file:
      file.writelines(json.dumps(row) + '\n' for row in kept)
    os.replace(path + '.tmp', path)
    self._file = open(path, 'a')
    self._board = tensorboardX.SummaryWriter(
      os.path.join(workdir, 'tensorboard'), purge_step=first_step + 1
    )

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._file.write(json.dumps({'step': step, **scalars}) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      self._board.add_text(name, text, step)

  def close(self) -> None:
    self._file.close()
    self._board.close()


def write_json(path: str, content: Mapping) -> None:
  """Writes a file as a whole or not at all."""
  with open(path + '.tmp', 'w') as file:
    json.dump(content, file, indent=2)
    file.write('\n')
    file.flush()
    os.fsync(file.fileno())
  os.replace(path + '.tmp', path)
