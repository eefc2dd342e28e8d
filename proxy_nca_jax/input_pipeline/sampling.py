"""The order of training records: shuffled every epoch, or class-balanced."""

import functools

import grain
import numpy as np


def positions(split, config) -> grain.MapDataset:
  """Returns the stream of record indices, batch after batch."""
  # Endless in practice, and short enough that no slice index overflows.
  length = 2**40
  if not config.dataset.images_per_class:
    positions = grain.MapDataset.range(len(split)).seed(config.seed)
    return positions.shuffle().repeat(length // len(split))
  sizes = np.bincount(split.labels, minlength=split.num_classes)
  members = np.split(
    np.argsort(split.labels, kind='stable'), np.cumsum(sizes)[:-1]
  )
  position = functools.partial(
    balanced_position,
    members=members,
    batch_size=config.batch_size,
    images_per_class=config.dataset.images_per_class,
    seed=config.seed,
  )
  return grain.MapDataset.range(length).seed(config.seed).map(position)


def balanced_position(
  index: int,
  *,
  members: list[np.ndarray],
  batch_size: int,
  images_per_class: int,
  seed: int,
) -> int:
  """Returns the record at an index of the stream of class-balanced batches.

  A batch has `batch_size / images_per_class` classes with `images_per_class`
  images each, as in ProxyNCA++ (https://arxiv.org/abs/2004.01113). Classes are
  visited in rounds: each round is a new random order of all classes, of which a
  remainder too small for a batch is skipped. So are the images of a class. A
  batch repeats an image only if its class has fewer than `images_per_class`.

  Args:
    index: index in the stream; batch s has [s * batch_size, (s + 1) *
      batch_size).
    members: the records of each class, int [num_images].
    batch_size: divisible by `images_per_class`.
    images_per_class: positive.
    seed: seed of all orders.
  """
  step, slot = divmod(int(index), batch_size)
  num_classes = batch_size // images_per_class
  classes, turn = _draw(
    step, size=num_classes, total=len(members), key=(seed, 0)
  )
  label = int(classes[slot // images_per_class])
  # A class is drawn at most once in a round, so the round counts its draws.
  positions, _ = _draw(
    turn,
    size=images_per_class,
    total=len(members[label]),
    key=(seed, 1 + label),
  )
  return int(members[label][positions[slot % images_per_class]])


def _draw(number, *, size, total, key) -> tuple[np.ndarray, int]:
  """Returns draw `number` of `size` out of `total`, and the round it is in.

  The draws of a round are disjoint; with `total` below `size` they wrap around.
  """
  turn, position = divmod(number, max(total // size, 1))
  order = _permutation(*key, turn, total)
  chosen = np.arange(position * size, (position + 1) * size)
  return order.take(chosen, mode='wrap'), turn


@functools.lru_cache(maxsize=1024)
def _permutation(seed, stream, turn, total) -> np.ndarray:
  return np.random.default_rng((seed, stream, turn)).permutation(total)
