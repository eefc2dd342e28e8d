"""Splits of a dataset: records of some classes with their labels."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from proxy_nca_jax.datasets.vectors import Vectors


@dataclasses.dataclass(frozen=True)
class Split:
  """Records of some classes of a dataset, with random access.

  `split[i]` is a stored record and `split.image(i)` its image, for i in
  [0, len(split)). A split of vectors has no images: `split.vectors` has them
  all.

  Attributes:
    source: the records of the whole dataset, or its vectors.
    images: maps an index of `source` to an image, uint8 [height, width, 3], or
      to a vector, float32 [dim].
    rows: int64 [num_records], the split's records as indices of `source`.
    labels: int32 [num_records], in [0, num_classes).
    class_names: the name of each class, [num_classes].
    is_query: bool [num_records], True for queries and False for the gallery
      that they search; None if each record queries all others.
    cameras: int32 [num_records]; None if the protocol has no cameras.
  """

  source: Sequence[dict] | Vectors
  images: Callable[[int], np.ndarray]
  rows: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  is_query: np.ndarray | None = None
  cameras: np.ndarray | None = None

  @property
  def vectors(self) -> Vectors | None:
    """The vectors of the split, [num_records, dim]; None if it has images."""
    if isinstance(self.source, Vectors):
      return self.source.subset(self.rows)
    return None

  @property
  def vector_dim(self) -> int | None:
    """The dimension of the vectors; None if the split has images."""
    return None if self.vectors is None else self.vectors.shape[1]

  @property
  def noun(self) -> str:
    """What the records are, for messages."""
    return 'images' if self.vectors is None else 'vectors'

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def class_sizes(self) -> np.ndarray:
    """int64 [num_classes], the number of records of each class."""
    return np.bincount(self.labels, minlength=self.num_classes)

  def __len__(self) -> int:
    return len(self.rows)

  def subset(self, indices: np.ndarray) -> 'Split':
    """Returns a split of the records at `indices`, in that order.

    Args:
      indices: int [num_selected], in [0, len(self)).
    """
    return dataclasses.replace(
      self,
      rows=self.rows[indices],
      labels=self.labels[indices],
      is_query=None if self.is_query is None else self.is_query[indices],
      cameras=None if self.cameras is None else self.cameras[indices],
    )

  def __getitem__(self, index: int) -> dict:
    """Returns a stored record, with its label in this split.

    Returns:
      {'image': bytes of an image file, 'label': int, 'class_name': str,
      'name': str}, and further features of the dataset, such as 'camera'.
    """
    record = self.source[int(self.rows[index])]
    texts = {
      name: value.decode()
      for name, value in record.items()
      if isinstance(value, bytes) and name != 'image'
    }
    label = int(self.labels[index])
    own = {'label': label, 'class_name': self.class_names[label]}
    return record | texts | own

  def image(self, index: int) -> np.ndarray:
    """Returns a resized image, uint8 [height, width, 3], or a vector."""
    return self.images(int(self.rows[index]))


@dataclasses.dataclass(frozen=True)
class Datasets:
  """The splits of a run, and facts about them for its log and results.

  Attributes:
    train: records to train on.
    validation: records of classes held out from training, for selecting a
      checkpoint; None unless `config.dataset.validation` asks for them.
    test: records to evaluate on.
    seen: with `config.dataset.long_tail`, records of the train classes: those
      held out from training as queries, those trained on as their gallery; else
      None.
    skipped: (file, reason) of each file that is not part of the dataset.
    num_shared_classes: the number of test classes that training sees too: 0
      unless the splits of the user's own images share names.
    is_resized_source: whether training crops from resized images although the
      recipe crops from the originals.
    digest: a hash of the stored records, with names and images, of the class
      names and of the splits.
    records_digest: a hash of the same without the splits.
  """

  train: Split
  validation: Split | None
  test: Split
  seen: Split | None
  skipped: tuple[tuple[str, str], ...]
  num_shared_classes: int
  is_resized_source: bool
  digest: str
  records_digest: str
