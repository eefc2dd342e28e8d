"""Splits by class: train, validation and test classes; long tails."""

import re

import numpy as np

# Values of config.dataset.validation that take the classes of a folder, or of
# the split that a file of vectors has.
FOLDER, COLUMN = 'folder', 'column'
STORED = {'image_folder': FOLDER, 'embeddings': COLUMN}


def split_classes(
  total: int,
  *,
  num_train_classes: int | None,
  num_classes: int,
  test_fraction: float,
  seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Splits the classes [0, total) into train and test classes.

  Args:
    total: number of classes in the dataset.
    num_train_classes: the first `num_train_classes` classes are for training;
      None splits at random.
    num_classes: uses a random subset of this size; 0 uses all classes.
    test_fraction: fraction of test classes in a random split, in (0, 1).
    seed: seed of the random choices.

  Returns:
    (train, test): int64, ascending, disjoint.

  Raises:
    ValueError: if an argument is out of range, or a side would have fewer than
      2 classes.
  """
  if num_classes > total or num_classes < 0:
    raise ValueError(
      f'config.dataset.num_classes ({num_classes}) must be in [1, {total}], '
      'the number of classes in the dataset, or 0 for all.'
    )
  if not 0 < test_fraction < 1:
    raise ValueError(
      f'config.dataset.test_fraction ({test_fraction}) must be in (0, 1).'
    )
  order = np.random.default_rng(seed).permutation(total)
  order = order[: num_classes or total]
  if num_train_classes is None:
    num_test = round(len(order) * test_fraction)
    test, train = order[:num_test], order[num_test:]
  else:
    train, test = (
      order[order < num_train_classes],
      order[order >= num_train_classes],
    )
  if len(train) < 2 or len(test) < 2:
    raise ValueError(
      f'The split has {len(train)} train and {len(test)} test classes out of '
      f'{total}, but needs at least 2 of each: add classes, or change '
      'config.dataset.num_classes or config.dataset.test_fraction.'
    )
  return np.sort(train), np.sort(test)


def split_validation(
  classes: np.ndarray, part: str
) -> tuple[np.ndarray, np.ndarray]:
  """Holds out one of n consecutive parts of the train classes for validation.

  '2/2', the second half, is the split of ProxyNCA++; '1/4' to '4/4' are the
  four folds of A Metric Learning Reality Check,
  https://arxiv.org/abs/2003.08505.

  Args:
    classes: int64 [num_classes], ascending.
    part: 'i/n', the i-th of n parts, counted from 1; '' holds out nothing.

  Returns:
    (train, validation): int64, disjoint, together `classes`.

  Raises:
    ValueError: if `part` is malformed, or a side has fewer than 2 classes.
  """
  if not part:
    return classes, classes[:0]
  match = re.fullmatch(r'(\d+)/(\d+)', part)
  index, count = map(int, match.groups()) if match else (0, 0)
  if not 1 <= index <= count:
    raise ValueError(
      f'config.dataset.validation ({part!r}) must be i/n, such as 2/2 for the '
      'second half of the train classes, or empty.'
    )
  first, last = ((i * len(classes)) // count for i in (index - 1, index))
  train = np.concatenate([classes[:first], classes[last:]])
  if len(train) < 2 or last - first < 2:
    raise ValueError(
      f'config.dataset.validation={part} gives {len(train)} train and '
      f'{last - first} validation classes, but needs at least 2 of each.'
    )
  return train, classes[first:last]


def choose_classes(
  classes: np.ndarray, num_chosen: int, *, seed: int
) -> np.ndarray:
  """Chooses a random subset of the train classes.

  Subsets are nested: for one seed, a smaller subset is part of a larger one.

  Args:
    classes: int64 [num_classes], ascending.
    num_chosen: size of the subset; 0 chooses all classes.
    seed: seed of the choice.

  Returns:
    int64 [num_chosen], ascending.

  Raises:
    ValueError: if `num_chosen` is out of range.
  """
  if not num_chosen:
    return classes
  if not 2 <= num_chosen <= len(classes):
    raise ValueError(
      f'config.dataset.num_train_classes ({num_chosen}) must be in '
      f'[2, {len(classes)}], the number of train classes, or 0 for all.'
    )
  order = np.random.default_rng(seed).permutation(len(classes))
  return classes[np.sort(order[:num_chosen])]


def make_long_tailed(
  labels: np.ndarray, ratio: float, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Subsamples classes to a long-tailed distribution.

  First, a quarter of each class is held out, at least one record. Then class i
  of C, in a random order, keeps the fraction ratio^(-i / (C - 1)) of its other
  records, at least one. This is the exponential profile of
  https://arxiv.org/abs/1901.05555.

  Args:
    labels: int [num_records].
    ratio: imbalance ratio between the largest and the smallest fraction, > 1.
    seed: seed of the orders of classes and records.

  Returns:
    (learned, held_out): int64, ascending indices of `labels`; disjoint.

  Raises:
    ValueError: if the ratio is not above 1, or a class has a single record.
  """
  if not ratio > 1:
    raise ValueError(
      f'config.dataset.long_tail ({ratio}), the imbalance ratio between the '
      'largest class and the smallest, must be above 1, or 0 to use all '
      'images.'
    )
  _, sizes = np.unique(labels, return_counts=True)
  if sizes.min() < 2:
    raise ValueError(
      f'config.dataset.long_tail holds out images of each class, but '
      f'{np.sum(sizes < 2)} classes have a single image.'
    )
  classes = np.split(np.argsort(labels, kind='stable'), np.cumsum(sizes)[:-1])
  rng = np.random.default_rng(seed)
  fractions = ratio ** -np.linspace(0, 1, len(classes))
  learned, held_out = [], []
  for fraction, label in zip(fractions, rng.permutation(len(classes))):
    members = rng.permutation(classes[label])
    num_held_out = max(len(members) // 4, 1)
    num_learned = max(round(fraction * (len(members) - num_held_out)), 1)
    held_out.append(members[:num_held_out])
    learned.append(members[num_held_out : num_held_out + num_learned])
  return tuple(np.sort(np.concatenate(rows)) for rows in (learned, held_out))
