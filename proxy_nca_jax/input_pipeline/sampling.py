"""The order of the records: shuffled by epoch, or balanced by class."""

import functools

import grain
import numpy as np


def positions(split, config) -> grain.MapDataset:
  """Returns the stream of positions in the split, batch after batch."""
  # As good as endless, and no index of a slice of it overflows.
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
  """Returns the record at a place of the stream of class-balanced batches.

  A batch has `batch_size / images_per_class` classes and `images_per_class`
  images of each, as ProxyNCA++ samples (https://arxiv.org/abs/2004.01113). All
  classes take their turn in a random order, and so do the images of a class; a
  rest of an order too small for a batch is left out, another each time. An
  image comes twice in a batch only if its class has too few.

  Args:
    index: of the record, in [step * batch_size, (step + 1) * batch_size).
    members: the records of each class, int [num_images].
    batch_size: divisible by `images_per_class`.
    images_per_class: K, positive.
    seed: of the orders.
  """
  step, slot = divmod(int(index), batch_size)
  num_classes = batch_size // images_per_class
  classes, turn = _draw(
    step, size=num_classes, total=len(members), key=(seed, 0)
  )
  label = int(classes[slot // images_per_class])
  # A class is drawn at most once in a turn of all classes.
  positions, _ = _draw(
    turn,
    size=images_per_class,
    total=len(members[label]),
    key=(seed, 1 + label),
  )
  return int(members[label][positions[slot % images_per_class]])


def _draw(number, *, size, total, key) -> tuple[np.ndarray, int]:
  """Returns the `number`-th draw of `size` out of `total`, and its turn.

  The draws of a turn are disjoint; with a small total they wrap around.
  """
  turn, place = divmod(number, max(total // size, 1))
  order = _permutation(*key, turn, total)
  chosen = np.arange(place * size, (place + 1) * size)
  return order.take(chosen, mode='wrap'), turn


@functools.lru_cache(maxsize=1024)
def _permutation(seed, stream, turn, total) -> np.ndarray:
  return np.random.default_rng((seed, stream, turn)).permutation(total)
