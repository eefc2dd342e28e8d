import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from proxy_nca_jax import configuration, fine_tuning, models, train_step
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import default
from proxy_nca_jax.evaluate import embed

_MODULES = ('Conv_0', 'BatchNorm_0', 'Conv_1', 'Conv_5')


def _config(**fields):
  config = default.get_config()
  config.update_from_flattened_dict(
    {
      'dataset.name': 'glyphs',
      'dataset.image_size': 8,
      'model.width': 2,
      'model.embedding_dim': 4,
      'optimizer.name': 'adamw',
      'optimizer.backbone.weight_decay': 0.1,
      **fields,
    }
  )
  configuration.check(config)
  return config


def _setup(config):
  """Returns (model, state, step, batch) of a config."""
  model, mesh = models.create_model(config), mesh_lib.make_mesh()
  optimizer = optimizer_lib.make_optimizer(config)
  state = state_lib.create(
    config, model, optimizer, class_sizes=np.full(3, 4), mesh=mesh
  )
  step = train_step.make_train_step(
    model,
    optimizer,
    train_step.make_loss(config),
    stop_frozen=functools.partial(fine_tuning.stop_frozen, config.model),
    ema_decay=config.optimizer.ema_decay,
  )
  rng = np.random.default_rng(0)
  size = config.dataset.image_size
  batch = {
    'image': jnp.asarray(rng.integers(0, 256, (8, size, size, 3)), jnp.uint8),
    'label': jnp.asarray(np.arange(8) % 3, jnp.int32),
  }
  return model, state, step, batch


class LayersTest(parameterized.TestCase):
  @parameterized.parameters(
    'small_cnn',
    'bn_inception',
    'efficientnet_lite0',
    'resnet18',
    'vit_s16',
    'convnextv2_nano',
    'pe_core_b16',
    'eva02_b14',
  )
  def test_each_module_is_in_one_layer(self, name):
    size = 32 if models.BACKBONES[name].patch_size != 14 else 28
    config = _config(
      **{'model.name': name, 'dataset.image_size': size, 'model.width': 64}
    )
    variables = jax.eval_shape(
      functools.partial(models.create_model(config).init, train=False),
      jax.random.key(0),
      jnp.zeros((1, size, size, 3), jnp.uint8),
    )
    modules = variables['params']['backbone']
    numbers = {fine_tuning.layer_of(name, module) for module in modules}
    self.assertEqual(numbers, set(range(len(models.BACKBONES[name].layers))))
    dense = {
      layer
      for module in modules.values()
      for layer, part in (module.items() if isinstance(module, dict) else ())
      if isinstance(part, dict) and np.ndim(part.get('kernel')) == 2
    }
    own = {'q', 'kv', 'proj', 'conv_pw', 'conv_pwl'}  # Not those of blocks.
    self.assertEqual(dense - own, {*models.BACKBONES[name].dense})

  def test_a_module_without_a_layer_is_an_error(self):
    with self.assertRaisesRegex(ValueError, "'Conv_6' is in no layer"):
      fine_tuning.layer_of('small_cnn', 'Conv_6')

  def test_updates_fall_from_the_last_layer_to_the_first(self):
    config = _config(
      **{
        'optimizer.name': 'sgd',
        'optimizer.backbone.weight_decay': 0.0,
        'optimizer.layer_decay': 0.5,
      }
    )
    optimizer = optimizer_lib.make_optimizer(config)
    params = {
      'backbone': {name: {'kernel': jnp.ones(2)} for name in _MODULES},
      'head': jnp.ones(2),
      'proxies': jnp.ones(2),
    }
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    rates = {
      name: float(-part['kernel'][0])
      for name, part in updates['backbone'].items()
    }
    expected = {name: 1e-3 / 2 ** (5 - int(name[-1])) for name in _MODULES}
    for name in _MODULES:
      self.assertAlmostEqual(rates[name], expected[name], places=9)
    np.testing.assert_allclose(updates['head'], -1e-3)


class FreezeTest(parameterized.TestCase):
  def test_frozen_layers_keep_every_bit_and_the_others_train(self):
    config = _config(
      **{'model.freeze_layers': 2, 'model.freeze_batch_norm_steps': -1}
    )
    _, state, step, batch = _setup(config)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, batch, freeze_batch_norm=True)
    after = jax.tree.map(np.asarray, state.params)
    for module, part in before['backbone'].items():
      is_same = jax.tree.all(
        jax.tree.map(np.array_equal, part, after['backbone'][module])
      )
      number = fine_tuning.layer_of('small_cnn', module)
      self.assertEqual(is_same, number < 2, module)
    self.assertGreater(float(metrics['gradient_norm.backbone']), 0)

  def test_frozen_layers_have_no_moments(self):
    config = _config(
      **{'model.freeze_layers': 2, 'model.freeze_batch_norm_steps': -1}
    )
    _, frozen, _, _ = _setup(config)
    _, trained, _, _ = _setup(_config())
    sizes = [
      sum(x.size for x in jax.tree.leaves(state.opt_state))
      for state in (frozen, trained)
    ]
    self.assertLess(sizes[0], sizes[1])

  @parameterized.parameters(
    ({'model.freeze_layers': 6}, r'below 6, the number of layers'),
    ({'model.freeze_layers': 1}, r'freeze_batch_norm_steps to -1'),
    ({'model.lora_rank': 4}, r'small_cnn has no dense layers'),
    (
      {
        'model.name': 'vit_s16',
        'dataset.image_size': 16,
        'model.lora_rank': 4,
        'model.lora_layers': ('attn.q',),
      },
      r"lora_layers \('attn.q',\) must name some of attn.qkv",
    ),
    (
      {
        'model.name': 'vit_s16',
        'dataset.image_size': 16,
        'model.lora_rank': 4,
        'model.freeze_layers': 2,
      },
      r'freeze_layers to 0',
    ),
  )
  def test_what_does_not_fit_is_refused(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      _config(**fields)


class LoraTest(parameterized.TestCase):
  def _params(self):
    rng = np.random.default_rng(0)
    layer = {'kernel': jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)}
    backbone = {
      'blocks.0': {'attn.qkv': layer, 'mlp.fc1': layer},
      'pos_embed': jnp.ones(3),
    }
    adapters = fine_tuning.make_adapters(
      jax.random.key(0), backbone, rank=2, layers=('attn.qkv',)
    )
    return {'backbone': backbone, 'adapters': adapters, 'head': jnp.ones(2)}

  def test_the_first_step_starts_from_the_weights(self):
    params = self._params()
    merged = fine_tuning.merge(params)
    self.assertNotIn('adapters', merged)
    jax.tree.map(
      np.testing.assert_array_equal, merged['backbone'], params['backbone']
    )

  def test_merged_kernels_have_the_products(self):
    params = self._params()
    factors = params['adapters']['blocks.0']['attn.qkv']
    factors['out'] = jnp.ones_like(factors['out'])
    before = params['backbone']['blocks.0']
    merged = fine_tuning.merge(params)['backbone']['blocks.0']
    np.testing.assert_allclose(
      merged['attn.qkv']['kernel'] - before['attn.qkv']['kernel'],
      factors['in'] @ factors['out'],
      rtol=1e-5,
      atol=1e-6,
    )
    np.testing.assert_array_equal(
      merged['mlp.fc1']['kernel'], before['mlp.fc1']['kernel']
    )

  def test_only_the_adapters_train(self):
    config = _config(
      **{
        'model.name': 'vit_s16',
        'dataset.image_size': 16,
        'model.lora_rank': 2,
        'optimizer.layer_decay': 0.9,
      }
    )
    optimizer = optimizer_lib.make_optimizer(config)
    params = self._params() | {'proxies': jnp.ones((3, 2))}
    gradients = jax.grad(
      lambda params: sum(
        jnp.sum(jnp.sin(x))
        for x in jax.tree.leaves(
          fine_tuning.merge(fine_tuning.stop_frozen(config.model, params))
        )
      )
    )(params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    jax.tree.map(
      np.testing.assert_array_equal, after['backbone'], params['backbone']
    )
    factors = after['adapters']['blocks.0']['attn.qkv']
    self.assertTrue(np.any(factors['out']))
    self.assertFalse(np.any(optax.tree.norm(gradients['backbone'])))


class AveragesTest(parameterized.TestCase):
  def test_the_averages_are_evaluated(self):
    config = _config(**{'optimizer.ema_decay': 0.75})
    model, state, step, batch = _setup(config)
    state = state.restart_averages()
    expected = jax.tree.map(np.asarray, state.averages)
    for _ in range(3):
      state, _ = step(state, batch)
      now = {'params': state.params, 'model_state': state.model_state}
      expected = jax.tree.map(lambda m, x: 0.75 * m + 0.25 * x, expected, now)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
      state.averages,
      expected,
    )
    embed_fn = embed.make_embed_fn(model, mesh_lib.make_mesh())
    given = model.apply(
      {
        'params': {k: expected['params'][k] for k in ('backbone', 'head')},
        **expected['model_state'],
      },
      batch['image'],
      train=False,
    )
    np.testing.assert_allclose(
      embed_fn(state, batch)['embedding'], given, rtol=1e-4, atol=1e-5
    )

  def test_without_averages_the_weights_are_evaluated(self):
    _, state, _, _ = _setup(_config())
    self.assertEqual(state.averages, {})
    self.assertIs(state.evaluated['params'], state.params)


if __name__ == '__main__':
  absltest.main()
