"""What a config may be: the table, the rules, and the fields a run keeps."""

import importlib
import math

import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax import configuration, datasets, losses
from proxy_nca_jax.configs import default
from proxy_nca_jax.losses import pairwise


def _config(**fields):
  config = default.get_config()
  config.dataset.name = 'glyphs'
  with config.unlocked(), config.ignore_type():
    for name, value in fields.items():
      *path, last = name.split('.')
      group = config
      for part in path:
        group = group[part]
      group[last] = value
  return config


def _outside(row):
  """Yields values that a row of the table must refuse."""
  yield from (
    'foo',
    (),
    None,
    True,
    np.nan,
    math.inf,
    -math.inf,
    object(),
  )
  if isinstance(row, configuration.Number):
    step = 1 if row.kind is int else 1e-3
    yield from (row.low - step, row.high + step, row.high * 2 + 1)
    yield from (row.low,) if row.bounds[0] == '(' else ()
    yield from (row.high,) if row.bounds[1] == ')' else ()
    if row.kind is int:
      yield from (0.5, '1', np.float32(1), 2**63, -(2**63))


class FieldsTest(parameterized.TestCase):
  def test_every_field_of_the_defaults_has_a_row_and_no_other(self):
    fields = configuration._flatten_config(default.get_config())
    self.assertSameElements(fields, configuration.FIELDS)

  def test_every_row_accepts_its_default(self):
    fields = configuration._flatten_config(_config())
    for name, row in configuration.FIELDS.items():
      self.assertTrue(row.accepts(fields[name]), name)

  def test_every_number_has_finite_bounds_or_says_infinity(self):
    unbounded = []
    for name, row in configuration.FIELDS.items():
      row = getattr(row, 'of', row)
      if isinstance(row, configuration.Number) and math.isinf(row.high):
        unbounded.append(name)
    # Infinity turns the mining off.
    self.assertEqual(unbounded, ['loss.multi_similarity.epsilon'])

  def test_numbers_refuse_whatever_is_outside(self):
    for name, row in configuration.FIELDS.items():
      if isinstance(row, configuration.Number):
        for value in _outside(row):
          if not (value == math.inf and row.high == math.inf):
            self.assertFalse(row.accepts(value), (name, value))

  def test_a_refused_value_is_one_line_with_field_value_and_range(self):
    for name, row in configuration.FIELDS.items():
      config = _config(**{name: object()})
      value = configuration._flatten_config(config)[name]
      self.assertEqual(
        list(configuration._outside_range(config)),
        [f'config.{name} ({value!r}) must be {row}.'],
      )

  def test_numbers_accept_their_bounds(self):
    for name, row in configuration.FIELDS.items():
      if isinstance(row, configuration.Number):
        self.assertEqual(row.accepts(row.low), row.bounds[0] == '[', name)
        self.assertEqual(row.accepts(row.high), row.bounds[1] == ']', name)
        if row.kind is float and row.low <= 1 <= row.high:
          self.assertEqual(row.accepts(1), row.accepts(1.0), name)

  @parameterized.parameters('embeddings', 'image_folder')
  def test_recipes_that_start_from_data_take_losses_without_proxies(self, name):
    module = importlib.import_module(f'proxy_nca_jax.configs.{name}')
    config = module.get_config()
    for loss in ('sup_con', 'triplet', 'center'):
      config.loss.name = loss
      configuration.check(config)

  def test_zero_is_refused_where_it_makes_no_sense(self):
    refused = set()
    for name, row in configuration.FIELDS.items():
      row = getattr(row, 'of', row)
      if isinstance(row, configuration.Number) and not row.accepts(0):
        # Groups of parameters and losses have fields of the same names.
        refused.add(name.rsplit('.', 1)[-1])
    self.assertSameElements(
      refused,
      """
      batch_size min_styles test_fraction image_size crop_scale
      crop_ratio width embedding_dim num_centers init_norm eps max_skipped_steps
      plateau_factor layer_decay recall_at precision_at kmeans_num_starts
      steps_per_dispatch
      log_every save_every keep_checkpoints profile_steps scale temperature
      alpha beta concentration proxy_chunk gamma decay_rate decay_every decay_at
      """.split(),
    )

  @parameterized.parameters(
    ('embedding_dim', 'model.embedding_dim', -1),
    ('seed', 'seed', 2**63),
    ('negative seed', 'seed', -1),
    ('text in a tuple', 'evaluation.recall_at', ('abc',)),
    ('fraction in a tuple', 'evaluation.recall_at', (1.5,)),
    ('eps', 'optimizer.eps', -1.0),
    ('rate', 'optimizer.head.learning_rate', math.nan),
    ('clip_norm', 'optimizer.clip_norm', -1.0),
    ('stall_seconds', 'stall_seconds', math.nan),
    ('kmeans_start', 'evaluation.kmeans_start', 'foo'),
    ('resize', 'dataset.resize', 100_000),
    ('batch', 'batch_size', 10**9),
    ('workers', 'dataset.num_workers', 1000),
    ('descending steps', 'optimizer.head.decay_at', (3, 2)),
    ('one of two steps', 'profile_steps', (3,)),
    ('profile 0', 'profile_steps', (0, 3)),
    ('profile backwards', 'profile_steps', (4, 3)),
    ('profile fraction', 'profile_steps', (1, 2.5)),
    ('crop upside down', 'dataset.crop_scale', (1.0, 0.5)),
    ('three jitters', 'dataset.color_jitter', (0.1, 0.1, 0.1)),
    ('factor', 'optimizer.plateau_factor', 1.5),
    ('loss', 'loss.name', 'proxy_ncaa'),
    ('dataset', 'dataset.name', ''),
  )
  def test_check_names_field_value_and_range(self, _, name, value):
    with self.assertRaises(ValueError) as raised:
      configuration.check(_config(**{name: value}))
    self.assertEqual(
      str(raised.exception),
      f'config.{name} ({value!r}) must be {configuration.FIELDS[name]}.',
    )

  def test_ranges_read_well(self):
    rows = {
      'batch_size': 'an integer in [1, 1,048,576]',
      'dataset.test_fraction': 'a number in (0, 1)',
      'loss.proxy_nca.proxy_chunk': 'None or an integer in [1, 1,000,000,000]',
      'optimizer.name': 'one of adam, adamw, rmsprop, sgd',
      'report': 'True or False',
      'profile_steps': (
        'a tuple of 0 or 2 values, each an integer in [1, 1,000,000,000], '
        'ascending'
      ),
    }
    for name, text in rows.items():
      self.assertEqual(str(configuration.FIELDS[name]), text)

  def test_all_problems_are_named_at_once(self):
    with self.assertRaisesRegex(
      ValueError, r'config\.seed .*config\.num_steps'
    ):
      configuration.check(_config(seed=-1, num_steps=-1))

  def test_steps_and_epochs_exclude_one_another(self):
    configuration.check_length(_config(num_steps=0, num_epochs=2.0))
    configuration.check_length(_config(num_steps=20, num_epochs=0.0))
    with self.assertRaisesRegex(ValueError, r'num_steps \(20\).*epochs \(2.0'):
      configuration.check_length(_config(num_steps=20, num_epochs=2.0))

  def test_epochs_determine_the_number_of_steps(self):
    config = _config(num_epochs=2.5, batch_size=32, steps_per_dispatch=2)
    configuration.set_num_steps(config, num_images=656)
    self.assertEqual(config.num_steps, 52)  # 51.25, in dispatches of two.
    configuration.set_num_steps(config, num_images=1)
    self.assertEqual(config.num_steps, 2)
    config = _config(num_steps=7)
    configuration.set_num_steps(config, num_images=656)
    self.assertEqual(config.num_steps, 7)

  def test_periods_in_epochs_are_multiples_of_whole_epochs(self):
    config = _config(
      **{
        'num_epochs': 4.5,
        'period_unit': 'epoch',
        'batch_size': 32,
        'steps_per_dispatch': 5,
        'num_steps': 1000,
        'log_every': 5,
        'eval_every': 2,
        'optimizer.head.freeze_steps': 1,
        'optimizer.head.warmup_steps': 2,
        'optimizer.head.decay_every': 3,
        'optimizer.head.decay_at': (3, 4),
      }
    )
    configuration.check(config)
    configuration.set_num_steps(config, num_images=656)
    # 20.5 batches are an epoch of 4 dispatches of 5 steps.
    self.assertEqual(config.num_steps, 90)
    steps = configuration.in_steps(config, num_images=656)
    configuration.check(steps)
    head = steps.optimizer.head
    self.assertEqual(steps.eval_every, 40)
    self.assertEqual((head.freeze_steps, head.warmup_steps), (20, 40))
    self.assertEqual((head.decay_every, head.decay_at), (60, (60, 80)))
    self.assertEqual(config.eval_every, 2)
    self.assertEqual(configuration.in_steps(steps, 656), steps)
    self.assertEqual(configuration.in_steps(config, 1).eval_every, 10)

  def test_a_run_of_epochs_resumes_with_its_number_of_steps(self):
    config = _config(num_epochs=2.0)
    saved = configuration.as_json(_config(num_epochs=2.0, num_steps=41))
    configuration.check_same_run(config, saved)
    configuration.keep_num_steps(config, saved)
    self.assertEqual(config.num_steps, 41)
    with self.assertRaisesRegex(ValueError, 'num_epochs was 2.0 and is 1.0'):
      configuration.check_same_run(_config(num_epochs=1.0), saved)

  def test_unknown_and_missing_fields_are_named(self):
    config = _config(depth=3)
    with self.assertRaisesRegex(ValueError, 'config.depth is no field'):
      configuration.check(config)
    config = _config()
    with config.unlocked():
      del config.model.width
    with self.assertRaisesRegex(ValueError, 'config.model.width is missing'):
      configuration.check(config)

  def test_choices_are_those_of_the_code(self):
    mining = configuration.FIELDS['loss.triplet.mining'].names
    self.assertSameElements(mining, pairwise._MINING)


class RulesTest(parameterized.TestCase):
  @parameterized.parameters(*losses.LOSSES)
  def test_every_loss_passes(self, name):
    configuration.check(
      _config(**{'loss.name': name, 'model.normalize': name != 'adaface'})
    )

  @parameterized.parameters(*datasets.DATASETS)
  def test_every_dataset_passes(self, name):
    configuration.check(_config(**{'dataset.name': name, 'dataset.resize': 64}))

  @parameterized.parameters(
    (
      {'steps_per_dispatch': 4, 'save_every': 6, 'num_steps': 1001},
      r'config.num_steps \(1001\), config.log_every \(50\), config.save_every '
      r'\(6\) must be divisible by config.steps_per_dispatch \(4\)',
    ),
    ({'loss.name': 'adaface'}, 'set config.model.normalize to False'),
    (
      {'loss.name': 'dynamic_proxy_nca', 'proxies.init': 'class_means'},
      "config.loss.name is 'dynamic_proxy_nca': set config.proxies.init to",
    ),
    (
      {'loss.pairs': 'semi_hard'},
      "loss 'proxy_nca' compares no pairs .* circle, contrastive, multi_sim",
    ),
    (
      {'loss.name': 'n_pairs', 'loss.memory_size': 10},
      "loss 'n_pairs' takes no memory: .* circle, contrastive, multi_sim",
    ),
    ({'profile_steps': (999, 1001)}, 'at most config.num_steps .1000.'),
    (
      {'optimizer.plateau_factor': 0.1, 'eval_every': 5},
      'plateau_factor .0.1. follows .* set config.dataset.validation',
    ),
    (
      {'optimizer.plateau_factor': 0.1, 'dataset.validation': '2/2'},
      'plateau_factor .0.1. follows .* config.eval_every',
    ),
    ({'dataset.validation': '2/2'}, 'set config.eval_every'),
    (
      {'dataset.validation': 'folder', 'eval_every': 5},
      'image_folder; glyphs has none',
    ),
    ({'dataset.validation': '3/2', 'eval_every': 5}, "'3/2'. must be i/n"),
    ({'dataset.validation': '1/1', 'eval_every': 5}, "'1/1'. must be i/n"),
    ({'dataset.validation': 'half', 'eval_every': 5}, "'half'. must be i/n"),
    (
      {
        'dataset.validation': '2/2',
        'eval_every': 5,
        'evaluation.select_by': 'recall@3',
      },
      "select_by .'recall@3'. must be one of recall@1, .*harmonic_mean",
    ),
    (
      {
        'dataset.validation': '2/2',
        'eval_every': 5,
        'evaluation.select_by': 'harmonic_mean',
        'evaluation.kmeans_iterations': 0,
      },
      "select_by .'harmonic_mean'. must be one of",
    ),
    ({'evaluation.recall_at': ()}, 'at least one K'),
    ({'dataset.long_tail': 0.5}, 'long_tail .0.5. must be above 1'),
    ({'dataset.name': 'sop', 'dataset.resize': 0}, 'resize .0. must be at'),
    ({'dataset.name': 'image_folder'}, 'resize .0. must be at least'),
    (
      {'dataset.table': 'x.csv'},
      "table .'x.csv'. is for image_folder; .*glyph",
    ),
    ({'dataset.huggingface': 'x'}, 'huggingface .*x.* is for image_folder'),
    (
      {
        'dataset.name': 'image_folder',
        'dataset.resize': 64,
        'dataset.huggingface': 'x',
        'dataset.root': '/x',
      },
      'has its own images: leave config.dataset.table and config.dataset.root',
    ),
    ({'dataset.cache_size': 5}, 'cache_size .5. must be 0, or'),
    ({'dataset.images_per_class': 5}, 'batch_size .64. must be divisible by'),
    ({'dataset.color_jitter': (0, 0, 0, 0.6)}, 'hue'),
    (
      {
        'dataset.name': 'image_folder',
        'dataset.resize': 64,
        'dataset.crop': 'random_resized',
      },
      'image_folder stores resized',
    ),
    (
      {
        'dataset.resize': 64,
        'dataset.cache_size': 64,
        'dataset.crop': 'random_resized',
      },
      'cache_size stores resized',
    ),
    (
      {'dataset.on_device': True, 'dataset.erasing': 0.5},
      'only crops, pads and flips',
    ),
    (
      {'dataset.on_device': True, 'dataset.color_jitter': (0, 0, 0, 0.1)},
      'only crops, pads and flips',
    ),
    (
      {'dataset.on_device': True, 'dataset.crop': 'random_resized'},
      'only crops, pads and flips',
    ),
    ({'model.pooling': 'cls'}, 'small_cnn has no class token'),
    ({'model.name': 'vit_s16', 'dataset.image_size': 30}, 'multiple of 16'),
    ({'model.remat': True}, 'no blocks to recompute'),
    (
      {'model.name': 'vit_s16', 'model.freeze_batch_norm_steps': 3},
      'no batch statistics to freeze',
    ),
    (
      {'loss.name': 'triplet', 'loss.class_weighting': 1.0},
      'defined on the batch as a whole',
    ),
    (
      {'loss.name': 'cosface', 'loss.logit_adjustment': 1.0},
      "'cosface' takes no log_priors",
    ),
    ({'proxies.by_size': True}, "'proxy_nca' assigns no classes"),
    ({'loss.name': 'triplet', 'proxies.sharded': True}, 'proxies.sharded is'),
    (
      {'loss.name': 'dynamic_proxy_nca', 'proxies.sharded': True},
      'proxies.sharded is',
    ),
    (
      {'loss.proxy_nca.proxy_chunk': 2, 'proxies.sharded': True},
      'proxies.sharded is',
    ),
    ({'loss.proxy_nca.label_smoothing': 0.1}, 'label_smoothing'),
    (
      {
        'optimizer.head.schedule': 'cosine',
        'optimizer.head.warmup_steps': 1000,
      },
      'config.optimizer.head: freeze_steps . warmup_steps .1000. must be below',
    ),
  )
  def test_fields_that_exclude_each_other_are_refused(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      configuration.check(_config(**fields))

  def test_steps_to_trace_may_be_one_or_all(self):
    for steps in ((), (1, 1), (1, 1000)):
      configuration.check(_config(profile_steps=steps))


class SameRunTest(parameterized.TestCase):
  def _check(self, saved, mode='train', **fields):
    configuration.check_same_run(
      _config(**fields), configuration.as_json(saved), mode=mode
    )

  def test_the_same_configuration_passes(self):
    self._check(_config())

  @parameterized.parameters(
    {'log_every': 1},
    {'save_every': 3},
    {'keep_checkpoints': 9},
    {'dataset.root': '/elsewhere'},
    {'dataset.table': '/elsewhere/table.csv'},
    {'dataset.huggingface': '/elsewhere'},
    {'dataset.data_dir': '/elsewhere'},
    {'dataset.num_workers': 2},
    {'profile_steps': (1, 2)},
    {'stall_seconds': 1.0},
    {'optimizer.max_skipped_steps': 1},
  )
  def test_fields_beside_the_mathematics_may_differ(self, **fields):
    self._check(_config(), **fields)

  @parameterized.parameters(
    {'seed': 1},
    {'batch_size': 32},
    {'loss.proxy_nca.temperature': 0.5},
    {'optimizer.proxies.learning_rate': 2.0},
    {'dataset.split_seed': 1},
    {'num_steps': 10},
    {'optimizer.on_nonfinite': 'skip'},
  )
  def test_any_other_field_is_named(self, **fields):
    (name,) = fields
    with self.assertRaisesRegex(ValueError, name):
      self._check(_config(), **fields)

  def test_all_differing_fields_are_named_at_once(self):
    with self.assertRaisesRegex(ValueError, 'batch_size.*seed'):
      self._check(_config(), seed=1, batch_size=32)

  def test_steps_may_be_added_unless_the_schedule_knows_their_number(self):
    self._check(_config(), num_steps=2000)
    cosine = {'optimizer.head.schedule': 'cosine'}
    with self.assertRaisesRegex(ValueError, 'num_steps'):
      self._check(_config(**cosine), num_steps=2000, **cosine)

  def test_a_field_younger_than_the_run_has_its_default(self):
    saved = configuration.as_json(_config())
    del saved['model']['width']
    configuration.check_same_run(_config(), saved)
    with self.assertRaisesRegex(ValueError, 'model.width was 64 and is 8'):
      configuration.check_same_run(_config(**{'model.width': 8}), saved)

  def test_a_field_that_is_no_more_is_named(self):
    saved = configuration.as_json(_config())
    saved['model']['depth'] = 3
    with self.assertRaisesRegex(ValueError, "depth was 3 and is 'absent'"):
      configuration.check_same_run(_config(), saved)

  @parameterized.parameters(
    {'evaluation.kmeans_iterations': 3},
    {'evaluation.recall_at': (1, 3)},
    {'evaluation.nearest_only': True},
    {'eval_every': 7},
  )
  def test_evaluation_may_change_where_nothing_selects_by_it(self, **fields):
    self._check(_config(), **fields)
    selecting = {'dataset.validation': '2/2', 'eval_every': 5}
    with self.assertRaisesRegex(ValueError, next(iter(fields))):
      self._check(_config(**selecting), **(selecting | fields))
    # Scoring again trains nothing.
    self._check(_config(**selecting), mode='eval', **(selecting | fields))

  def test_changed_fields_are_those_of_the_group(self):
    saved = configuration.as_json(
      _config(**{'evaluation.kmeans_iterations': 3})
    )
    config = _config(seed=1)
    self.assertEqual(
      configuration.changed_fields(config, saved, 'evaluation.'),
      ['evaluation.kmeans_iterations'],
    )


class JsonTest(absltest.TestCase):
  def test_a_config_survives_json(self):
    config = _config(seed=7)
    again = configuration.from_json(configuration.as_json(config))
    configuration.check(again)
    self.assertEqual(again.seed, 7)

  def test_overrides_are_the_fields_that_differ(self):
    config = _config(seed=7, **{'evaluation.recall_at': (1,)})
    self.assertEqual(
      configuration.overrides(config),
      {'seed': 7, 'dataset.name': 'glyphs', 'evaluation.recall_at': [1]},
    )

  def test_unflatten_undoes_flatten(self):
    tree = {'a': {'b': {'c': 1}, 'd': 2}, 'e': 3}
    flat = configuration.flatten(tree)
    self.assertEqual(flat, {'a.b.c': 1, 'a.d': 2, 'e': 3})
    self.assertEqual(configuration.unflatten(flat), tree)


if __name__ == '__main__':
  absltest.main()
