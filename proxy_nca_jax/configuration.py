"""What a config may be: ranges, choices, rules, and which fields a run keeps.

`FIELDS` has a row for every field of configs/default.py; `check` compares a
config with the rows, then with the rules that relate fields to each other. No
data, device or download is touched. `check_same_run` compares the config of a
resumed run with the saved one.
"""

import functools
import inspect
import json
import math
import numbers
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from proxy_nca_jax import datasets, losses, models
from proxy_nca_jax import images as images_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax.configs import default
from proxy_nca_jax.datasets import class_splits
from proxy_nca_jax.runtime import saved_json

# No reading process beyond these: each takes about 130 MB and a core.
_MAX_WORKERS = 64
# Sides of images in pixels. At 4096 a batch of 64 is 3 GB.
_MAX_SIDE = 4096
# Steps, classes and other counts without a natural bound.
_MANY = 10**9
# Characters of a wrong value in a message.
_MAX_SHOWN = 100

# Fields that only networks of images have a use for.
_IMAGE_FIELDS = (
  *(
    f'dataset.{name}'
    for name in (
      'on_device',
      'resize',
      'resize_mode',
      'interpolation',
      'cache_size',
      'allow_resized_source',
      'image_size',
      'crop',
      'padding',
      'crop_scale',
      'crop_ratio',
      'flip',
      'color_jitter',
      'erasing',
    )
  ),
  *(
    f'model.{name}'
    for name in (
      'init_from',
      'width',
      'pooling',
      'layer_norm',
      'batch_norm_momentum',
      'freeze_batch_norm_steps',
      'dtype',
      'remat',
    )
  ),
  'head_steps',
)

# Fields without influence on the parameters and the scores of a run.
_FREE_FIELDS = frozenset(
  {
    'dataset.data_dir',
    'dataset.fonts_dir',
    'dataset.huggingface',
    'dataset.manual_dir',
    'dataset.num_workers',
    'dataset.on_device',
    'dataset.root',
    'dataset.table',
    'dry_run',
    'evaluation.baselines',
    'evaluation.batch_size',
    'keep_checkpoints',
    'log_every',
    'optimizer.max_skipped_steps',
    'profile_steps',
    'proxies.sharded',
    'report',
    'save_every',
    'stall_seconds',
  }
)


class Number(NamedTuple):
  """An int or a finite float within bounds.

  Attributes:
    kind: int or float; a float field takes ints too.
    low: least value.
    high: largest value; infinity admits infinity.
    bounds: which of the two are included, '[]', '(]', '[)' or '()'.
  """

  kind: type
  low: float
  high: float
  bounds: str = '[]'

  def accepts(self, value: Any) -> bool:
    kind = numbers.Integral if self.kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
      return False
    above = value > self.low or (value == self.low and self.bounds[0] == '[')
    below = value < self.high or (value == self.high and self.bounds[1] == ']')
    return above and below

  def __str__(self):
    name = 'an integer' if self.kind is int else 'a number'
    low, high = (
      f'{bound:,}' if self.kind is int else f'{bound:g}'
      for bound in (self.low, self.high)
    )
    return f'{name} in {self.bounds[0]}{low}, {high}{self.bounds[1]}'


class Choice(NamedTuple):
  """One of some texts."""

  names: Collection[str]

  def accepts(self, value: Any) -> bool:
    return isinstance(value, str) and value in self.names

  def __str__(self):
    return f'one of {", ".join(sorted(self.names))}'


class Kind(NamedTuple):
  """Any value of a type."""

  type: type

  def accepts(self, value: Any) -> bool:
    return isinstance(value, self.type)

  def __str__(self):
    return 'True or False' if self.type is bool else 'a text'


class Optional(NamedTuple):
  """None, or what another row accepts."""

  of: Number

  def accepts(self, value: Any) -> bool:
    return value is None or self.of.accepts(value)

  def __str__(self):
    return f'None or {self.of}'


class Sequence(NamedTuple):
  """A tuple of values that another row accepts.

  Attributes:
    of: the row of each value.
    lengths: the numbers of values that are allowed; () allows any.
    is_ascending: whether each value must be at least the one before.
  """

  of: Number
  lengths: tuple[int, ...] = ()
  is_ascending: bool = False

  def accepts(self, value: Any) -> bool:
    return (
      isinstance(value, tuple | list)
      and (not self.lengths or len(value) in self.lengths)
      and all(map(self.of.accepts, value))
      and (not self.is_ascending or list(value) == sorted(value))
    )

  def __str__(self):
    count = ' or '.join(map(str, self.lengths)) or 'any number of'
    order = ', ascending' if self.is_ascending else ''
    return f'a tuple of {count} values, each {self.of}{order}'


def _count(low: int = 0, high: int = _MANY) -> Number:
  return Number(int, low, high)


def _real(low: float, high: float, bounds: str = '[]') -> Number:
  return Number(float, low, high, bounds)


_POSITIVE = _real(0, 1e4, '(]')
_NOT_NEGATIVE = _real(0, 1e4)
# A part of one that may be none, but not the whole.
_FRACTION = _real(0, 1, '[)')
_SEED = _count(0, 2**32 - 1)
_STEPS = Sequence(_count(1), is_ascending=True)
_BOOL, _TEXT = Kind(bool), Kind(str)

_MINING = Choice(('batch_all', 'batch_hard', 'semi_hard'))

_LOSS_FIELDS = {
  'adaface': {
    'scale': _POSITIVE,
    'margin': _real(0, math.pi / 2),
    'concentration': _POSITIVE,
  },
  'arcface': {'scale': _POSITIVE, 'margin': _real(0, math.pi)},
  'center': {},
  'center_softmax': {'weight': _NOT_NEGATIVE},
  'circle': {'scale': _POSITIVE, 'margin': _real(0, 2)},
  'contrastive': {'margin': _NOT_NEGATIVE},
  'cosface': {'scale': _POSITIVE, 'margin': _real(0, 2)},
  'dynamic_proxy_nca': {'temperature': _POSITIVE, 'normalize': _BOOL},
  'facility_location': {
    'margin_multiplier': _NOT_NEGATIVE,
    'num_refinements': _count(0, 1000),
  },
  'fractional_proxy_nca': {'temperature': _POSITIVE, 'normalize': _BOOL},
  'lifted_structure': {'margin': _NOT_NEGATIVE},
  'magnet': {'alpha': _NOT_NEGATIVE},
  'multi_similarity': {
    'alpha': _POSITIVE,
    'beta': _POSITIVE,
    'base': _real(-2, 2),
    'epsilon': _real(0, math.inf),
  },
  'n_pairs': {'regularization': _NOT_NEGATIVE},
  'normalized_softmax': {'temperature': _POSITIVE},
  'nt_xent': {'temperature': _POSITIVE},
  'proxy_anchor': {'alpha': _POSITIVE, 'margin': _real(0, 2)},
  'proxy_nca': {
    'temperature': _POSITIVE,
    'positive_in_denominator': _BOOL,
    'normalize': _BOOL,
    'label_smoothing': _FRACTION,
    'proxy_chunk': Optional(_count(1)),
  },
  'proxy_nca_pp': {
    'temperature': _POSITIVE,
    'proxy_chunk': Optional(_count(1)),
  },
  'proxy_triplet': {'margin': _NOT_NEGATIVE, 'normalize': _BOOL},
  'smooth_ap': {'temperature': _POSITIVE},
  'soft_margin_triplet': {'mining': _MINING},
  'soft_triple': {
    'scale': _POSITIVE,
    'margin': _NOT_NEGATIVE,
    'gamma': _POSITIVE,
    'tau': _NOT_NEGATIVE,
  },
  'subcenter_arcface': {'scale': _POSITIVE, 'margin': _real(0, math.pi)},
  'sup_con': {'temperature': _POSITIVE},
  'triplet': {'margin': _NOT_NEGATIVE, 'mining': _MINING},
}

_GROUP_FIELDS = {
  # ProxyNCA++ trains the proxies of In-Shop at 2400.
  'learning_rate': _real(0, 1e6),
  'freeze_steps': _count(),
  'warmup_steps': _count(),
  'schedule': Choice(optimizer_lib.SCHEDULES),
  'decay_rate': _real(0, 1, '(]'),
  'decay_every': _count(1),
  'decay_at': _STEPS,
  'weight_decay': _real(0, 1e3),
  'clip_value': _real(0, 1e9),
}

FIELDS = {
  'seed': _SEED,
  'num_steps': _count(),
  'num_epochs': _real(0, 1e6),
  'period_unit': Choice(('step', 'epoch')),
  'head_steps': _count(0, 10**6),
  'batch_size': _count(1, 2**20),
  'dataset.name': Choice((*datasets.DATASETS, datasets.EMBEDDINGS)),
  'dataset.data_dir': _TEXT,
  'dataset.root': _TEXT,
  'dataset.table': _TEXT,
  'dataset.huggingface': _TEXT,
  'dataset.image_column': _TEXT,
  'dataset.label_column': _TEXT,
  'dataset.manual_dir': _TEXT,
  'dataset.allow_incomplete': _BOOL,
  'dataset.fonts_dir': _TEXT,
  'dataset.min_styles': _count(1),
  'dataset.num_classes': _count(),
  'dataset.test_fraction': _real(0, 1, '()'),
  'dataset.num_train_classes': _count(),
  'dataset.long_tail': _real(0, 1e6),
  'dataset.validation': _TEXT,
  'dataset.split_seed': _SEED,
  'dataset.images_per_class': _count(0, 2**20),
  'dataset.num_workers': _count(0, _MAX_WORKERS),
  'dataset.on_device': _BOOL,
  'dataset.resize': _count(0, _MAX_SIDE),
  'dataset.resize_mode': Choice(('square', 'shorter')),
  'dataset.interpolation': Choice(images_lib.FILTERS),
  'dataset.cache_size': _count(0, _MAX_SIDE),
  'dataset.allow_resized_source': _BOOL,
  'dataset.image_size': _count(1, _MAX_SIDE),
  'dataset.crop': Choice(('random', 'random_resized')),
  'dataset.padding': _count(0, _MAX_SIDE),
  'dataset.crop_scale': Sequence(_real(0, 1, '(]'), (2,), is_ascending=True),
  'dataset.crop_ratio': Sequence(_real(0, 100, '(]'), (2,), is_ascending=True),
  'dataset.flip': _BOOL,
  'dataset.color_jitter': Sequence(_real(0, 10), (4,)),
  'dataset.erasing': _real(0, 1),
  'model.name': Choice(models.BACKBONES),
  'model.init_from': _TEXT,
  'model.width': _count(1, 4096),
  'model.pooling': Choice(models.POOLINGS),
  'model.layer_norm': _BOOL,
  'model.embedding_dim': _count(1, 2**16),
  'model.normalize': _BOOL,
  'model.head_hidden': _count(0, 2**16),
  'model.head_init': Choice(('random', 'pca', 'lda', 'identity')),
  'model.embedding_stddev': _real(0, 100),
  'model.batch_norm_momentum': _FRACTION,
  'model.freeze_batch_norm_steps': _count(-1),
  'model.freeze_layers': _count(0, 1024),
  'model.lora_rank': _count(0, 1024),
  'model.lora_layers': Sequence(_TEXT),
  'model.dtype': Choice(('float32', 'bfloat16')),
  'model.remat': _BOOL,
  'loss.name': Choice(losses.LOSSES),
  'loss.precision': Choice(('highest', 'high', 'default')),
  'loss.num_centers': _count(1, 1024),
  'loss.num_proxies': _count(),
  'loss.class_weighting': _real(0, 10),
  'loss.logit_adjustment': _real(0, 10),
  'loss.pairs': Choice(('all', *losses.MINERS)),
  'loss.memory_size': _count(0, 10**8),
  'loss.memory_start': _count(),
  'proxies.init': Choice(('random', 'class_means', 'kaiming', 'xavier')),
  'proxies.init_norm': _real(0, 1e6, '(]'),
  'proxies.by_size': _BOOL,
  'proxies.sharded': _BOOL,
  'optimizer.name': Choice(optimizer_lib.OPTIMIZERS),
  'optimizer.eps': _real(0, 10, '(]'),
  'optimizer.momentum': _FRACTION,
  'optimizer.rms_decay': _FRACTION,
  'optimizer.layer_decay': _real(0, 1, '(]'),
  'optimizer.ema_decay': _real(0, 1, '[)'),
  'optimizer.clip_norm': _real(0, 1e9),
  'optimizer.decay_vectors': _BOOL,
  'optimizer.on_nonfinite': Choice(('stop', 'skip')),
  'optimizer.max_skipped_steps': _count(1),
  'optimizer.plateau_factor': _real(0, 1, '(]'),
  'optimizer.plateau_patience': _count(),
  'evaluation.batch_size': _count(1, 2**20),
  'evaluation.baselines': _BOOL,
  'evaluation.recall_at': Sequence(_count(1)),
  'evaluation.precision_at': Sequence(_count(1)),
  'evaluation.select_by': _TEXT,
  'evaluation.nearest_only': _BOOL,
  'evaluation.verification': _BOOL,
  'evaluation.kmeans_iterations': _count(0, 10**5),
  'evaluation.kmeans_start': Choice(('random', 'k-means++')),
  'evaluation.kmeans_num_starts': _count(1, 10**4),
  'steps_per_dispatch': _count(1, 10**4),
  'report': _BOOL,
  'dry_run': _BOOL,
  'log_every': _count(1),
  'eval_every': _count(),
  'save_every': _count(1),
  'keep_checkpoints': _count(1, 10**4),
  'stall_seconds': _real(0, 1e9),
  'profile_steps': Sequence(_count(1), (0, 2), is_ascending=True),
}
FIELDS |= {
  f'loss.{name}.{field}': row
  for name, rows in _LOSS_FIELDS.items()
  for field, row in rows.items()
}
FIELDS |= {
  f'optimizer.{group}.{field}': row
  for group in optimizer_lib.GROUPS
  for field, row in _GROUP_FIELDS.items()
}


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError, with every problem in one line, if a config is invalid.

  The rules assume fields of the right types: they are checked when every field
  is within its range.
  """
  problems = list(_outside_range(config)) or list(_against_rules(config))
  if problems:
    raise ValueError(' '.join(problems))


def _outside_range(config) -> Iterator[str]:
  values = _flatten_config(config)
  for name in sorted(values.keys() - FIELDS.keys()):
    yield f'config.{name} is no field: configs/default.py has all of them.'
  for name, row in FIELDS.items():
    if name not in values:
      yield f'config.{name} is missing; it must be {row}.'
    elif not row.accepts(values[name]):
      yield f'config.{name} ({_show(values[name])}) must be {row}.'


def _show(value: Any) -> str:
  """Returns a value for a message, shortened."""
  try:
    text = repr(value)
  except ValueError:  # Python prints no integer of very many digits.
    return 'an integer of very many digits'
  return text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]}...'


def _flatten_config(config, prefix='') -> dict[str, Any]:
  """Returns {'group.field': value}, the values as they are."""
  flat = {}
  for name in config:
    value = config[name]
    if isinstance(value, ml_collections.ConfigDict):
      flat |= _flatten_config(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def _against_rules(config) -> Iterator[str]:
  for rule in (
    _check_vectors,
    _check_dataset,
    _check_augmentation,
    _check_model,
    _check_loss,
    _check_schedules,
    _check_selection,
    _check_periods,
  ):
    yield from rule(config)


def _check_vectors(config) -> Iterator[str]:
  is_of_vectors = config.dataset.name == datasets.EMBEDDINGS
  if is_of_vectors != models.BACKBONES[config.model.name].takes_vectors:
    yield (
      f'config.dataset.name={config.dataset.name} and '
      f'config.model.name={config.model.name} do not fit: the dataset '
      f'{datasets.EMBEDDINGS} and the network vectors need each other.'
    )
  if not is_of_vectors:
    return
  new, defaults = map(_flatten_config, (config, default.get_config()))
  changed = [name for name in _IMAGE_FIELDS if new[name] != defaults[name]]
  if changed:
    yield (
      f'{", ".join(f"config.{name}" for name in changed)}: vectors are neither '
      'resized, cropped, flipped nor passed through a backbone. Leave out '
      'these fields.'
    )


def _check_dataset(config) -> Iterator[str]:
  fields = config.dataset
  if 0 < fields.long_tail <= 1:
    yield (
      f'config.dataset.long_tail ({fields.long_tail}) must be above 1, the '
      'ratio of the largest class to the smallest, or 0 for all images.'
    )
  part = re.fullmatch(r'([0-9]{1,9})/([0-9]{1,9})', fields.validation)
  stored = class_splits.STORED
  if fields.validation not in ('', *stored.values()) and not (
    part and 1 <= int(part[1]) <= int(part[2]) and int(part[2]) >= 2
  ):
    yield (
      f'config.dataset.validation ({_show(fields.validation)}) must be i/n, as '
      '2/2 for the second half of the train classes or 1/4 for the first '
      "quarter, 'folder' for the folder val of your own images, 'column' for "
      "the column split of your own embeddings, or '', which trains on all of "
      'them.'
    )
  for name, value in stored.items():
    if fields.validation == value and fields.name != name:
      yield (
        f'config.dataset.validation={value!r} takes the validation classes '
        f'of {name}; {fields.name} has none: set i/n, as 2/2.'
      )
  sources = [x for x in ('table', 'huggingface') if fields[x]]
  if sources and fields.name != 'image_folder':
    yield (
      f'config.dataset.{sources[0]} ({_show(fields[sources[0]])}) is for '
      f'image_folder; config.dataset.name is {fields.name!r}.'
    )
  if fields.huggingface and (fields.table or fields.root):
    yield (
      f'config.dataset.huggingface ({_show(fields.huggingface)}) has its own '
      'images: leave config.dataset.table and config.dataset.root empty.'
    )
  if not fields.resize and fields.name not in ('glyphs', datasets.EMBEDDINGS):
    yield (
      'config.dataset.resize (0) must be at least 1 pixel: the images of '
      f'{fields.name} differ in size.'
    )
  if fields.cache_size not in (0, fields.resize):
    yield (
      f'config.dataset.cache_size ({fields.cache_size}) must be 0, or '
      f'config.dataset.resize ({fields.resize}): the cache stores the images '
      'that training crops from.'
    )
  per_class = fields.images_per_class
  if per_class and config.batch_size % per_class:
    yield (
      f'config.batch_size ({config.batch_size}) must be divisible by '
      f'config.dataset.images_per_class ({per_class}); 0 draws images of any '
      'class.'
    )


def _check_augmentation(config) -> Iterator[str]:
  fields = config.dataset
  if fields.color_jitter[3] > 0.5:
    yield (
      f'config.dataset.color_jitter {fields.color_jitter} must have a hue, the '
      'last value, of at most 0.5.'
    )
  if datasets.is_resized_source(fields) and not fields.allow_resized_source:
    stored = (
      'config.dataset.cache_size' if fields.cache_size else 'image_folder'
    )
    yield (
      'config.dataset.crop=random_resized crops the original images, but '
      f'{stored} stores resized ones, whose crops have other pixels. Set '
      'config.dataset.allow_resized_source=True to train on those; the report '
      'says so.'
    )
  if fields.on_device and (
    fields.crop != 'random' or any(fields.color_jitter) or fields.erasing
  ):
    yield (
      'config.dataset.on_device=True only crops, pads and flips, but '
      f'crop={fields.crop}, color_jitter={fields.color_jitter} and '
      f'erasing={fields.erasing} were given. Set crop=random, color_jitter to '
      'zeros and erasing=0, or on_device=False.'
    )


def _check_model(config) -> Iterator[str]:
  fields, backbone = config.model, models.BACKBONES[config.model.name]
  missing = {'cls': 'class token', 'attention': 'attention pool'}
  for pooling in backbone.summaries:
    del missing[pooling]
  if fields.pooling in missing:
    yield (
      f'{fields.name} has no {missing[fields.pooling]} (config.model.pooling='
      f'{fields.pooling}): choose one of '
      f'{", ".join(name for name in models.POOLINGS if name not in missing)}.'
    )
  if fields.head_hidden and fields.head_init != 'random':
    yield (
      f'config.model.head_init={fields.head_init} starts a linear head, and '
      f'config.model.head_hidden ({fields.head_hidden}) makes it one with '
      'hidden units: set head_hidden to 0, or head_init to random.'
    )
  if config.dataset.image_size % backbone.patch_size:
    yield (
      f'config.dataset.image_size ({config.dataset.image_size}) must be a '
      f'multiple of {backbone.patch_size}, the patch size of {fields.name}.'
    )
  elif config.dataset.image_size < backbone.min_size:
    yield (
      f'config.dataset.image_size ({config.dataset.image_size}) must be at '
      f'least {backbone.min_size} for {fields.name}.'
    )
  if fields.remat and not backbone.has_blocks:
    yield (
      f'{fields.name} has no blocks to recompute (config.model.remat): set it '
      'to False.'
    )
  if fields.freeze_batch_norm_steps and not backbone.has_batch_norm:
    yield (
      f'{fields.name} has no batch statistics to freeze '
      '(config.model.freeze_batch_norm_steps): set it to 0.'
    )
  num_layers = max(len(backbone.layers), 1)
  if fields.freeze_layers >= num_layers:
    yield (
      f'config.model.freeze_layers ({fields.freeze_layers}) must be below '
      f'{num_layers}, the number of layers of {fields.name}.'
    )
  is_trained = fields.freeze_batch_norm_steps >= 0
  if fields.freeze_layers and backbone.has_batch_norm and is_trained:
    yield (
      'Batch statistics would change in the layers that '
      'config.model.freeze_layers freezes: set '
      'config.model.freeze_batch_norm_steps to -1.'
    )
  yield from _check_lora(fields, backbone)


def _check_lora(fields, backbone) -> Iterator[str]:
  if not fields.lora_rank:
    return
  if fields.freeze_layers:
    yield (
      'config.model.lora_rank freezes the whole backbone: set '
      'config.model.freeze_layers to 0.'
    )
  names = set(fields.lora_layers)
  if not backbone.dense:
    yield (
      f'{fields.name} has no dense layers: config.model.lora_rank is for '
      f'{", ".join(n for n, b in models.BACKBONES.items() if b.dense)}.'
    )
  elif not names or names - set(backbone.dense):
    yield (
      f'config.model.lora_layers {tuple(fields.lora_layers)} must name some of '
      f'{", ".join(backbone.dense)}.'
    )


def _check_loss(config) -> Iterator[str]:
  name = config.loss.name
  loss = losses.LOSSES[name]
  if config.proxies.by_size and not loss.has_assignment:
    yield (
      f'The loss {name!r} assigns no classes to proxies: '
      'config.proxies.by_size is for fractional_proxy_nca.'
    )
  if config.proxies.sharded and (
    not loss.has_class_proxies or config.loss[name].get('proxy_chunk')
  ):
    yield (
      'config.proxies.sharded is for losses whose classes have proxies of '
      f'their own, without proxy_chunk; config.loss.name is {name!r}.'
    )
  # A loss without proxies has none to initialize.
  is_unassigned = loss.proxies and not loss.has_class_proxies
  if config.proxies.init == 'class_means' and is_unassigned:
    yield (
      'config.proxies.init=class_means is for losses whose classes have '
      f'proxies of their own; config.loss.name is {name!r}: set '
      'config.proxies.init to random.'
    )
  if config.loss.pairs != 'all' and not _takes(loss, 'pairs'):
    yield (
      f'The loss {name!r} compares no pairs that could be mined: '
      f'config.loss.pairs is for {_losses_that_take("pairs")}.'
    )
  if config.loss.memory_size and not _takes(loss, 'memory'):
    yield (
      f'The loss {name!r} takes no memory: config.loss.memory_size is for '
      f'{_losses_that_take("memory")}.'
    )
  if name == 'adaface' and config.model.normalize:
    yield (
      'The loss adaface takes the norm of an embedding as the quality of its '
      'image: set config.model.normalize to False.'
    )
  if config.loss.logit_adjustment and not _takes(loss, 'log_priors'):
    yield (
      f'The loss {name!r} takes no log_priors: config.loss.logit_adjustment is '
      'for proxy_nca and proxy_nca_pp.'
    )
  try:
    is_of_batch = not _loss_shape(config)
  except ValueError as error:  # Arguments that exclude one another.
    yield f'config.loss.{name}: {error}'
  else:
    if config.loss.class_weighting and is_of_batch:
      yield (
        f'The loss {name!r} is defined on the batch as a whole: its examples '
        'cannot be weighted (config.loss.class_weighting).'
      )


def _takes(loss: losses.Loss, argument: str) -> bool:
  return argument in inspect.signature(loss.fn).parameters


def _losses_that_take(argument: str) -> str:
  return ', '.join(
    name for name, loss in losses.LOSSES.items() if _takes(loss, argument)
  )


def _loss_shape(config) -> tuple[int, ...]:
  """The shape of the loss of a batch, by tracing it: nothing is computed."""
  loss, dim = losses.LOSSES[config.loss.name], config.model.embedding_dim
  shapes = {
    losses.PER_CLASS: (2, dim),
    losses.MULTI_CENTER: (2, config.loss.num_centers, dim),
    losses.UNASSIGNED: (2, dim),
  }
  arrays = {
    name: jax.ShapeDtypeStruct(shapes[form], jnp.float32)
    for name, form in (('proxies', loss.proxies), ('centers', loss.centers))
    if form
  }
  if loss.has_assignment:
    arrays['assignment'] = jax.ShapeDtypeStruct((2, 1), jnp.int32)
  return jax.eval_shape(
    functools.partial(loss.fn, **config.loss[config.loss.name]),
    embeddings=jax.ShapeDtypeStruct((2, dim), jnp.float32),
    labels=jax.ShapeDtypeStruct((2,), jnp.int32),
    **arrays,
  ).shape


def _check_schedules(config) -> Iterator[str]:
  for group in optimizer_lib.GROUPS:
    fields = config.optimizer[group]
    first = fields.freeze_steps + fields.warmup_steps
    # With num_epochs a run of few images may end within its warm-up.
    is_short = first >= config.num_steps and not config.num_epochs
    if fields.schedule == 'cosine' and is_short:
      yield (
        f'config.optimizer.{group}: freeze_steps + warmup_steps ({first}) must '
        f'be below config.num_steps ({config.num_steps}), so that the cosine '
        'schedule has steps left.'
      )


def _check_selection(config) -> Iterator[str]:
  factor, validation = (
    config.optimizer.plateau_factor,
    config.dataset.validation,
  )
  if factor < 1 and not (validation and config.eval_every):
    yield (
      f'config.optimizer.plateau_factor ({factor}) follows the validation '
      'scores: set config.dataset.validation, as 2/2, and config.eval_every.'
    )
  if validation and not config.eval_every:
    yield (
      'config.dataset.validation selects among the evaluated steps: set '
      'config.eval_every to a number of steps.'
    )
  if not config.evaluation.recall_at:
    yield 'config.evaluation.recall_at () must hold at least one K, as (1,).'
  if config.evaluation.precision_at and config.evaluation.nearest_only:
    yield (
      'config.evaluation.precision_at needs the ranks of all positives: set '
      'config.evaluation.nearest_only to False.'
    )
  if validation and config.evaluation.select_by not in _score_names(config):
    yield (
      f'config.evaluation.select_by ({config.evaluation.select_by!r}) must be '
      f'one of {", ".join(_score_names(config))}.'
    )


def _score_names(config) -> list[str]:
  """The scores of an evaluation as configured, of either protocol."""
  fields = config.evaluation
  names = [
    f'{title}@{k}' for title in ('recall', 'cmc') for k in fields.recall_at
  ]
  names += ['mrr', *(f'recall@1_{part}' for part in ('head', 'middle', 'tail'))]
  if not fields.nearest_only:
    names += ['map@r', 'r_precision', 'map']
  names += [
    f'{title}@{k}'
    for title in ('precision', 'map')
    for k in fields.precision_at
  ]
  if fields.kmeans_iterations:
    names += ['nmi', 'ami', 'ari', 'f1', 'purity']
    if 1 in fields.recall_at:
      names.append('harmonic_mean')
  return names


def _check_periods(config) -> Iterator[str]:
  is_known = config.num_steps or not config.num_epochs
  last = config.profile_steps[1] if config.profile_steps else 0
  if is_known and last > config.num_steps:
    yield (
      f'config.profile_steps {tuple(config.profile_steps)} must be () or the '
      'first and the last step to trace, at most config.num_steps '
      f'({config.num_steps}).'
    )
  size = config.steps_per_dispatch
  periods = {
    'num_steps': config.num_steps,
    'log_every': config.log_every,
    'eval_every': config.eval_every if config.period_unit == 'step' else 0,
    'save_every': config.save_every,
    'model.freeze_batch_norm_steps': config.model.freeze_batch_norm_steps,
  }
  indivisible = [
    f'config.{name} ({period})'
    for name, period in periods.items()
    if period > 0 and period % size
  ]
  if indivisible:
    yield (
      f'{", ".join(indivisible)} must be divisible by '
      f'config.steps_per_dispatch ({size}): nothing happens between the steps '
      'of one dispatch.'
    )


def check_length(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if both steps and epochs are given.

  Args:
    config: the run's config, before `set_num_steps`.
  """
  if config.num_steps and config.num_epochs:
    raise ValueError(
      f'config.num_steps ({config.num_steps}) and config.num_epochs '
      f'({config.num_epochs}) both give the length of the run: set one of them '
      'to 0.'
    )


def set_num_steps(config: ml_collections.ConfigDict, num_images: int) -> None:
  """Sets the `num_steps` of a config to its `num_epochs`, if it has any.

  Args:
    config: the run's config; changed in place, also if it is locked.
    num_images: number of train images.
  """
  if not config.num_epochs:
    return
  size = config.steps_per_dispatch
  if config.period_unit == 'epoch':
    num_steps = config.num_epochs * _epoch_steps(config, num_images)
  else:
    num_steps = config.num_epochs * num_images / config.batch_size
  with config.unlocked():
    config.num_steps = max(round(num_steps / size), 1) * size


def _epoch_steps(config: ml_collections.ConfigDict, num_images: int) -> int:
  """Returns the number of steps in an epoch of whole batches and dispatches."""
  size = config.steps_per_dispatch
  return max(num_images // config.batch_size // size, 1) * size


def in_steps(
  config: ml_collections.ConfigDict, num_images: int
) -> ml_collections.ConfigDict:
  """Returns a config whose periods are in steps, for a number of images.

  Args:
    config: the run's config, with its `num_steps` set.
    num_images: number of train images.
  """
  config = config.copy_and_resolve_references()
  if config.period_unit == 'step':
    return config
  epoch = _epoch_steps(config, num_images)
  with config.unlocked():
    config.period_unit = 'step'
    config.eval_every *= epoch
    for name in optimizer_lib.GROUPS:
      group = config.optimizer[name]
      for field in ('freeze_steps', 'warmup_steps', 'decay_every'):
        group[field] *= epoch
      group.decay_at = tuple(epoch * period for period in group.decay_at)
  return config


def keep_num_steps(
  config: ml_collections.ConfigDict, saved: Mapping[str, Any]
) -> None:
  """Sets the `num_steps` of a saved run that has the same `num_epochs`.

  Args:
    config: the config of this start; changed in place, also if it is locked.
    saved: the config that the run began with, as nested dicts of JSON.
  """
  if config.num_epochs and config.num_epochs == saved.get('num_epochs'):
    with config.unlocked():
      config.num_steps = saved['num_steps']


def check_same_run(
  config: ml_collections.ConfigDict,
  saved: Mapping,
  *,
  mode: str = 'train',
) -> None:
  """Raises ValueError if a config would change the mathematics of a saved run.

  The fields of `evaluation`, and `eval_every`, may change unless a step or a
  learning rate is chosen by the scores. With mode='eval' the run is only scored
  again, and they may always change.

  Args:
    config: the config of this start.
    saved: the config that the run began with, as nested dicts of JSON.
    mode: 'train' or 'eval'.
  """
  new = flatten(as_json(config))
  # Fields added since the run began had their defaults.
  old = flatten(as_json(default.get_config())) | flatten(saved)
  absent = object()
  # Without validation classes nothing is selected by scores.
  is_scored_freely = mode == 'eval' or not (
    new.get('dataset.validation') or old.get('dataset.validation')
  )
  may_add_steps = not optimizer_lib.depends_on_num_steps(config)

  def is_changed(field):
    if new.get(field, absent) == old.get(field, absent):
      return False
    if field in _FREE_FIELDS:
      return False
    if field == 'eval_every' or field.startswith('evaluation.'):
      return not is_scored_freely
    if field == 'num_steps' and new['num_epochs']:
      return False  # The epochs determine it.
    is_longer = field in ('num_steps', 'num_epochs') and new[field] > old[field]
    return not (is_longer and may_add_steps)

  changed = [
    f'{field} was {old.get(field, "absent")!r} and is '
    f'{new.get(field, "absent")!r}'
    for field in sorted(new.keys() | old.keys())
    if is_changed(field)
  ]
  if changed:
    raise ValueError(
      f'This workdir holds a run with another configuration: '
      f'{"; ".join(changed)}. Set these back, or use another workdir.'
    )


def changed_fields(
  config: ml_collections.ConfigDict, saved: Mapping, group: str
) -> list[str]:
  """Returns the names of the fields of a group that differ from a saved run."""
  new, old = (flatten(x).get for x in (as_json(config), saved))
  return [
    name for name in FIELDS if name.startswith(group) and new(name) != old(name)
  ]


def overrides(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns {'group.field': value} of fields that differ from the defaults."""
  defaults = flatten(as_json(default.get_config()))
  return {
    name: value
    for name, value in flatten(as_json(config)).items()
    if value != defaults.get(name)
  }


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns a config as nested dicts of JSON's types."""
  return json.loads(config.to_json_best_effort())


def from_json(saved: Mapping) -> ml_collections.ConfigDict:
  """Returns a saved config; fields added since then have their defaults."""
  defaults = flatten(as_json(default.get_config()))
  return ml_collections.ConfigDict(unflatten(defaults | flatten(saved)))


# What run.json and embedder.json share.
SAVED_FIELDS = {
  'config': saved_json.OBJECT,
  'class_names': saved_json.optional(saved_json.TEXTS),
}


def read_run(workdir: str) -> dict | None:
  """Returns the content of run.json; None if it does not exist.

  Raises:
    ValueError: if it is damaged; names the file and the field.
  """
  path = os.path.join(workdir, 'run.json')
  fields = SAVED_FIELDS | {
    'dataset_digest': saved_json.optional(saved_json.TEXT),
    'weights_digest': saved_json.optional(saved_json.TEXT),
  }
  if saved := saved_json.read(path, fields):
    check_saved(path, saved['config'])
  return saved


def check_saved(path: str, saved: Mapping) -> None:
  """Raises ValueError if a saved config has a field of a wrong type or range.

  Fields that this version does not know are ignored, and missing ones have
  their defaults.

  Args:
    path: the file that holds the config, for the message.
    saved: the config, as nested dicts of JSON.
  """
  try:
    flat = flatten(saved)
  except RecursionError:
    saved_json.fail(path, 'config is nested too deeply')
  groups = {name.rpartition('.')[0] for name in FIELDS}
  for name, value in flat.items():
    problem = None
    if name in FIELDS:
      value = tuple(value) if isinstance(value, list) else value
      if not FIELDS[name].accepts(value):
        problem = f'is {saved_json.describe(value)}; it must be {FIELDS[name]}'
    elif name in groups:
      problem = f'is {saved_json.describe(value)}; it must be an object'
    elif any(
      name.startswith(f'{field}.') for field in FIELDS
    ) or not re.fullmatch(r'\w+(\.\w+)*', name):
      problem = 'is no field'
    if problem:
      saved_json.fail(path, f'config.{name} {problem}')


def flatten(tree: Mapping, prefix: str = '') -> dict[str, Any]:
  """Returns {'a.b': value} of nested mappings."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dicts of {'a.b': value}; undoes `flatten`."""
  tree = {}
  for name, value in flat.items():
    *path, last = name.split('.')
    group = tree
    for part in path:
      group = group.setdefault(part, {})
    group[last] = value
  return tree
