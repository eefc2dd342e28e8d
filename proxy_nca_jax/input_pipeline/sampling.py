"""The order of training records: shuffled every epoch, or class-balanced."""

import functools

import grain
import numpy as np

# Endless in practice, and short enough that no slice index overflows.
_LENGTH = 2**40


def positions(split, config) -> grain.MapDataset:
  """Returns the stream of record indices, batch after batch."""
  if not config.dataset.images_per_class:
    positions = grain.MapDataset.range(len(split)).seed(config.seed)
    return positions.shuffle().repeat(_LENGTH // len(split))
  position = _make_balanced_position(split, config)
  return grain.MapDataset.range(_LENGTH).seed(config.seed).map(position)


def batches(
  records: grain.MapDataset, config, slots: np.ndarray
) -> grain.MapDataset:
  """Returns the rows of each batch in these slots, of an endless stream.

  A slot that occurs several times is read once.
  """

  def read(step):
    begin = int(step) * config.batch_size
    rows = {slot: records[begin + slot] for slot in np.unique(slots).tolist()}
    return {
      name: np.stack([rows[slot][name] for slot in slots.tolist()])
      for name in rows[slots[0]]
    }

  return grain.MapDataset.range(_LENGTH // config.batch_size).map(read)


def batch_positions(split, config, slots: np.ndarray) -> grain.MapDataset:
  """Returns the record indices of each batch in these slots, int64 [rows].

  Records that are read in a microsecond would otherwise wait for their indices,
  each of which takes Grain twenty. The order is another than that of
  `positions`, unless batches are class-balanced.
  """
  if config.dataset.images_per_class:
    position = _make_balanced_position(split, config)
  else:
    total = len(split)

    def position(index):
      epoch, offset = divmod(index, total)
      return _epoch(config.seed, epoch, total)[offset]

  def draw(step):
    begin = int(step) * config.batch_size
    return np.array([position(begin + slot) for slot in slots.tolist()])

  return grain.MapDataset.range(_LENGTH // config.batch_size).map(draw)


# An order takes 8 bytes a record; a batch needs that of two epochs at most.
@functools.lru_cache(maxsize=2)
def _epoch(seed, number, total) -> np.ndarray:
  return np.random.default_rng((seed, number)).permutation(total)


def _make_balanced_position(split, config):
  sizes = np.bincount(split.labels, minlength=split.num_classes)
  members = np.split(
    np.argsort(split.labels, kind='stable'), np.cumsum(sizes)[:-1]
  )
  return functools.partial(
    balanced_position,
    members=members,
    batch_size=config.batch_size,
    images_per_class=config.dataset.images_per_class,
    seed=config.seed,
  )


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
