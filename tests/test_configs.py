"""Tests that every config loads, is valid and builds its model."""

import importlib
import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl.testing import absltest, parameterized
from ml_collections import config_flags

from proxy_nca_jax import configuration, losses, models
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import default, recipes

_ROOT = pathlib.Path(__file__).parent.parent
_WITH_RECIPES = ('cub200', 'cars196', 'sop', 'inshop')
_CONFIGS = (
  [
    (path.stem, None)
    for path in (_ROOT / 'configs').glob('*.py')
    if path.stem != 'recipes'
  ]
  + [
    (name, recipe)
    for name in (*_WITH_RECIPES, 'image_folder')
    for recipe in recipes.RECIPES
  ]
  + [('market1501', 'foundation')]
)


def _load(name, recipe=None):
  get_config = importlib.import_module(
    f'proxy_nca_jax.configs.{name}'
  ).get_config
  return get_config(recipe) if recipe else get_config()


def _parse(*arguments):
  """Returns the config that the command line arguments produce."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, flag_values=values)
  # ml_collections looks up overrides in sys.argv.
  argv = ['main.py', *arguments]
  with absltest.mock.patch.object(sys, 'argv', argv):
    values(argv)
  return values.config


class ConfigsTest(parameterized.TestCase):
  def test_every_network_of_a_config_gives_embeddings(self):
    networks = {}
    for name, recipe in _CONFIGS:
      config = _load(name, recipe)
      # Recipes of several datasets share a network.
      network = (str(config.model), config.dataset.image_size, config.loss.name)
      networks.setdefault(network, config)
    self.assertGreater(len(networks), 5)
    for config in networks.values():
      with self.subTest(config.model.name):
        self._assert_gives_embeddings(config)

  def _assert_gives_embeddings(self, config):
    model = models.create_model(config, vector_dim=5)
    optimizer = optimizer_lib.make_optimizer(config)
    mesh = mesh_lib.make_mesh(jax.devices()[:1])

    def embed(images):
      state = state_lib.create(
        config, model, optimizer, class_sizes=np.ones(7, int), mesh=mesh
      )
      self.assertSameElements(state.params, ('backbone', 'head', 'proxies'))
      params = {k: state.params[k] for k in ('backbone', 'head')}
      variables = {'params': params, **state.model_state}
      return model.apply(variables, images, train=False)

    embeddings = jax.eval_shape(embed, model.example(3))
    self.assertEqual(embeddings.shape, (3, config.model.embedding_dim))
    self.assertEqual(embeddings.dtype, jnp.float32)

  @parameterized.parameters(*_CONFIGS)
  def test_its_values_are_valid_and_all_its_groups_train(self, name, recipe):
    config = _load(name, recipe)
    # Only the defaults name no dataset.
    config.dataset.name = config.dataset.name or 'glyphs'
    configuration.check(config)
    configuration.check_length(config)
    configuration.set_num_steps(config, 5_864)
    config = configuration.in_steps(config, 5_864)
    optimizer_lib.make_optimizer(config)
    for group in optimizer_lib.GROUPS:
      learning_rate = optimizer_lib.make_schedule(
        config.optimizer, group, config.num_steps
      )
      self.assertGreater(learning_rate(config.optimizer[group].warmup_steps), 0)
      self.assertLess(
        config.optimizer[group].freeze_steps, config.num_steps / 2
      )
    images_per_class = config.dataset.images_per_class
    self.assertEqual(config.batch_size % (images_per_class or 1), 0)

  @parameterized.parameters(*_CONFIGS)
  def test_config_has_the_fields_of_the_defaults(self, name, recipe):
    fields = configuration.flatten(_load(name, recipe).to_dict())
    defaults = configuration.flatten(default.get_config().to_dict())
    self.assertSameElements(fields, defaults)

  def test_each_loss_section_has_the_defaults_of_its_function(self):
    for name, loss in losses.LOSSES.items():
      arguments = {
        argument.name: argument.default
        for argument in inspect.signature(loss.fn).parameters.values()
        if argument.kind is argument.KEYWORD_ONLY
      }
      # Arguments that the trainer supplies.
      for given in (
        'where',
        'centers',
        'assignment',
        'log_priors',
        'memory',
        'pairs',
      ):
        arguments.pop(given, None)
      self.assertEqual(
        default.get_config().loss[name].to_dict(), arguments, name
      )

  def test_changing_one_config_leaves_others_unchanged(self):
    changed = default.get_config()
    for loss, field in (('proxy_nca', 'proxy_chunk'), ('triplet', 'margin')):
      before = default.get_config().loss[loss][field]
      changed.loss[loss][field] = 2
      self.assertEqual(default.get_config().loss[loss][field], before)

  def test_a_misspelled_field_is_rejected(self):
    with self.assertRaisesRegex(AttributeError, 'num_stepz'):
      default.get_config().num_stepz = 3
    config = _load('cub200', 'proxy_anchor')
    with self.assertRaisesRegex(AttributeError, 'alhpa'):
      config.loss.proxy_anchor.alhpa = 3.0


class RecipesTest(parameterized.TestCase):
  @parameterized.parameters(*_WITH_RECIPES)
  def test_the_paper_is_the_default(self, name):
    config = _load(name)
    self.assertEqual(config, _load(name, 'paper'))
    self.assertEqual(
      (config.batch_size, config.dataset.resize, config.dataset.image_size),
      (32, 256, 227),
    )
    self.assertNotEqual(config, _load(name, 'vit'))

  @parameterized.parameters(*_WITH_RECIPES)
  def test_an_unknown_recipe_lists_the_choices(self, name):
    with self.assertRaisesRegex(ValueError, "'papr'.*paper, dichotomies"):
      _load(name, 'papr')

  @parameterized.parameters(*recipes.RECIPES)
  def test_a_folder_of_as_many_images_has_the_recipe_of_cub(self, recipe):
    config, cub = _load('image_folder', recipe), _load('cub200', recipe)
    configuration.set_num_steps(config, 5_864)
    config = configuration.in_steps(config, 5_864)
    differing = {'dataset.name', 'dataset.allow_resized_source', 'num_epochs'}
    for name in optimizer_lib.GROUPS:
      if cub.optimizer[name].schedule != 'exponential':
        differing.add(f'optimizer.{name}.decay_every')  # Not used.
    expected = configuration.flatten(configuration.as_json(cub))
    self.assertEqual(
      {
        name: value
        for name, value in configuration.flatten(
          configuration.as_json(config)
        ).items()
        if name not in differing
      },
      {k: v for k, v in expected.items() if k not in differing},
    )

  def test_an_unknown_recipe_of_market_lists_the_choices(self):
    with self.assertRaisesRegex(ValueError, "'papr'.*scratch, foundation"):
      _load('market1501', 'papr')

  def test_an_unknown_recipe_of_a_folder_lists_the_choices(self):
    with self.assertRaisesRegex(ValueError, "'papr'.*finetune, .*paper, dicho"):
      _load('image_folder', 'papr')

  def test_flags_override_fields_of_a_recipe(self):
    config = _parse(
      f'--config={_ROOT}/configs/cars196.py:proxy_anchor',
      '--config.loss.proxy_anchor.alpha=16.0',
      '--config.optimizer.head.decay_at=(10, 20)',
      '--config.profile_steps=100,110',
    )
    self.assertEqual(config.profile_steps, (100, 110))
    self.assertEqual(config.dataset.name, 'cars196')
    self.assertEqual(
      config.loss.proxy_anchor.to_dict(), {'alpha': 16.0, 'margin': 0.1}
    )
    self.assertEqual(config.optimizer.head.decay_at, (10, 20))

  def test_only_the_backbone_of_proxynca_pp_is_frozen_at_first(self):
    # 5,864 images make 183 batches of 32; the first five epochs are extra.
    config = _load('cub200', 'proxynca_pp')
    self.assertEqual(config.num_steps, 45 * 183)
    self.assertEqual(config.optimizer.backbone.freeze_steps, 915)
    self.assertEqual(config.optimizer.proxies.freeze_steps, 0)
    ratio = (
      config.optimizer.proxies.learning_rate
      / config.optimizer.backbone.learning_rate
    )
    self.assertAlmostEqual(ratio, 1e5)

  def test_learning_rates_of_all_groups_decay_at_the_same_step(self):
    # 8,054 images make 44 batches of 180; learning rates halve every 20 epochs.
    config = _load('cars196', 'proxy_anchor')
    for step, expected in ((879, 1), (880, 0.5), (1759, 0.5), (1760, 0.25)):
      for group in optimizer_lib.GROUPS:
        fields = config.optimizer[group]
        learning_rate = optimizer_lib.make_schedule(
          config.optimizer, group, config.num_steps
        )
        self.assertAlmostEqual(
          float(learning_rate(step - fields.freeze_steps))
          / fields.learning_rate,
          expected,
          places=5,
        )


if __name__ == '__main__':
  absltest.main()
