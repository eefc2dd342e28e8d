"""Which classes, and which of their records, are learned and which measured."""

import re

import numpy as np


def split_classes(
  total: int,
  *,
  num_train_classes: int | None,
  num_classes: int,
  test_fraction: float,
  seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Divides the classes [0, total) into those to learn and those to measure.

  Args:
    total: classes of the data set.
    num_train_classes: the first so many are the train classes; None divides
      by `seed` and `test_fraction`.
    num_classes: use only so many of the classes, chosen by `seed`; 0 uses all.
    test_fraction: in (0, 1).
    seed: of the division.

  Returns:
    (train, test): int64, ascending, disjoint.

  Raises:
    ValueError: if there are too few classes for the request.
  """
  if num_classes > total or num_classes < 0:
    raise ValueError(
      f'{num_classes} classes were asked for (config.dataset.num_classes) and '
      f'the data set has {total}: ask for at most as many, or 0 for all.'
    )
  if not 0 < test_fraction < 1:
    raise ValueError(
      f'config.dataset.test_fraction ({test_fraction}) must be between 0 and 1.'
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
      f'The split leaves {len(train)} train and {len(test)} test classes of '
      f'{total}, and each needs at least 2: add classes, or change '
      'config.dataset.num_classes or test_fraction.'
    )
  return np.sort(train), np.sort(test)


def split_validation(
  classes: np.ndarray, part: str
) -> tuple[np.ndarray, np.ndarray]:
  """Keeps one part of the train classes from training, to select by.

  Parts are consecutive: '2/2' is the second half, as in ProxyNCA++, and '1/4'
  to '4/4' are the four folds of A Metric Learning Reality Check.

  Args:
    classes: int64 [num_classes], ascending.
    part: 'i/n', i from 1; '' keeps nothing.

  Returns:
    (train, validation): disjoint, together `classes`.

  Raises:
    ValueError: if the part is none, or a side has fewer than 2 classes.
  """
  if not part:
    return classes, classes[:0]
  match = re.fullmatch(r'(\d+)/(\d+)', part)
  index, count = map(int, match.groups()) if match else (0, 0)
  if not 1 <= index <= count:
    raise ValueError(
      f'config.dataset.validation ({part!r}) must be i/n, as 2/2 for the '
      'second half of the train classes, or empty.'
    )
  first, last = ((i * len(classes)) // count for i in (index - 1, index))
  train = np.concatenate([classes[:first], classes[last:]])
  if len(train) < 2 or last - first < 2:
    raise ValueError(
      f'config.dataset.validation={part} leaves {len(train)} train and '
      f'{last - first} validation classes, and each needs at least 2.'
    )
  return train, classes[first:last]


def choose_classes(
  classes: np.ndarray, number: int, *, seed: int
) -> np.ndarray:
  """Keeps so many of the train classes, ascending; 0 keeps all.

  With the same seed the fewer are among the more.

  Raises:
    ValueError: if there are not so many.
  """
  if not number:
    return classes
  if not 2 <= number <= len(classes):
    raise ValueError(
      f'config.dataset.num_train_classes ({number}) must be in '
      f'[2, {len(classes)}], the number of train classes, or 0 for all.'
    )
  order = np.random.default_rng(seed).permutation(len(classes))
  return classes[np.sort(order[:number])]


def thin_out(
  labels: np.ndarray, ratio: float, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Makes classes long-tailed: of the i-th of C, a share ratio^(-i / (C - 1)).

  It is the profile of https://arxiv.org/abs/1901.05555, over the classes in a
  random order. Before, a quarter of each class is held out, at least 1.

  Args:
    labels: int [num_records].
    ratio: of the largest share to the smallest, above 1.
    seed: of the order of the classes and of the records.

  Returns:
    (learned, held_out): int64, ascending indices of `labels`; a class keeps at
    least one of each.

  Raises:
    ValueError: if the ratio is not above 1, or a class has one record alone.
  """
  if not ratio > 1:
    raise ValueError(
      f'config.dataset.long_tail ({ratio}) must be above 1, the ratio of the '
      'largest class to the smallest, or 0 for classes as they are.'
    )
  _, sizes = np.unique(labels, return_counts=True)
  if sizes.min() < 2:
    raise ValueError(
      f'config.dataset.long_tail holds out pictures of each class, and '
      f'{np.sum(sizes < 2)} classes have one alone.'
    )
  classes = np.split(np.argsort(labels, kind='stable'), np.cumsum(sizes)[:-1])
  rng = np.random.default_rng(seed)
  shares = ratio ** -np.linspace(0, 1, len(classes))
  learned, held_out = [], []
  for share, place in zip(shares, rng.permutation(len(classes))):
    members = rng.permutation(classes[place])
    num_out = max(len(members) // 4, 1)
    num_learned = max(round(share * (len(members) - num_out)), 1)
    held_out.append(members[:num_out])
    learned.append(members[num_out : num_out + num_learned])
  return tuple(np.sort(np.concatenate(rows)) for rows in (learned, held_out))
