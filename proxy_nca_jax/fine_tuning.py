"""Which weights of a pretrained backbone are trained, and how fast.

A backbone is a row of layers: the stem or patch embedding, the stages or
blocks, and what follows them (`Backbone.layers`). Layers can be frozen from
the first one on, and learning rates can fall from the last layer to the first.
LoRA (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685) freezes all
weights and adds a trained product of two thin matrices to some of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from proxy_nca_jax import models

if TYPE_CHECKING:
  # benchmarks/train_step.py runs without ml_collections.
  import ml_collections

# The label of parameters that no optimizer changes.
FROZEN = 'frozen'

_Params = dict[str, Any]


def layer_of(name: str, module: str) -> int:
  """Returns the number of the layer, from 0, that a module belongs to.

  Args:
    name: of the backbone.
    module: name of a module or parameter directly below the backbone.
  """
  for number, pattern in enumerate(models.BACKBONES[name].layers):
    if re.fullmatch(pattern, module):
      return number
  raise ValueError(f'{module!r} is in no layer of {name}.')


def labels(config: ml_collections.ConfigDict, params: _Params) -> _Params:
  """Returns the optimizer's group of each parameter, as a prefix of the tree.

  Args:
    config: `model` of a run's config.
    params: {'backbone', 'head', 'proxies'}, and 'adapters' of LoRA.
  """
  groups = {name: name for name in params}
  if 'adapters' in params:
    return groups | {'backbone': FROZEN, 'adapters': 'backbone'}
  if config.freeze_layers:
    groups['backbone'] = {
      module: FROZEN
      if layer_of(config.name, module) < config.freeze_layers
      else 'backbone'
      for module in params['backbone']
    }
  return groups


def stop_frozen(config: ml_collections.ConfigDict, params: _Params) -> _Params:
  """Returns parameters whose frozen ones have no gradient.

  Args:
    config: `model` of a run's config.
    params: as of `labels`.
  """

  def stop(label, part):
    return jax.lax.stop_gradient(part) if label == FROZEN else part

  return jax.tree.map(stop, labels(config, params), params)


def scale_by_layer(name: str, decay: float) -> optax.GradientTransformation:
  """Scales the updates of a backbone by decay^(layers that follow).

  Layer-wise learning-rate decay, as of ELECTRA and BEiT: layers that see pixels
  are more general, and change less.

  Args:
    name: of the backbone.
    decay: in (0, 1].
  """
  last = len(models.BACKBONES[name].layers) - 1

  def update(updates, params):
    del params

    def scale(modules):
      return {
        module: optax.tree.scale(decay ** (last - layer_of(name, module)), part)
        for module, part in modules.items()
      }

    parts = {
      key: scale(updates[key])
      for key in ('backbone', 'adapters')
      if isinstance(updates.get(key), dict)
    }
    return updates | parts

  return optax.stateless(update)


def make_adapters(
  key: jax.Array, backbone: _Params, *, rank: int, layers: tuple[str, ...]
) -> _Params:
  """Returns LoRA's matrices for the kernels of dense layers.

  Args:
    key: of the random matrices.
    backbone: the parameters of the backbone.
    rank: inner dimension of the products.
    layers: names of dense layers below a module of the backbone, such as
      'attn.qkv'.

  Returns:
    {module: {layer: {'in': [width, rank], 'out': [rank, width]}}}, float32:
    'in' is random, with outputs of unit variance for such inputs, and 'out' is
    0, so that the first step starts from the pretrained weights.
  """
  adapters = {}
  for module, parts in backbone.items():
    for layer in layers:
      if not isinstance(parts, dict) or layer not in parts:
        continue
      num_in, num_out = parts[layer]['kernel'].shape
      key, own = jax.random.split(key)
      adapters.setdefault(module, {})[layer] = {
        'in': jax.random.normal(own, (num_in, rank)) / jnp.sqrt(num_in),
        'out': jnp.zeros((rank, num_out)),
      }
  return adapters


def merge(params: _Params) -> _Params:
  """Returns parameters whose kernels contain the products of the adapters.

  Args:
    params: {'backbone', ...}, and 'adapters' of LoRA; without it, the result
      is the same.
  """
  params = dict(params)
  adapters = params.pop('adapters', None)
  if adapters is None:
    return params
  backbone = dict(params['backbone'])
  for module, parts in adapters.items():
    backbone[module] = dict(backbone[module])
    for layer, factors in parts.items():
      dense = backbone[module][layer]
      kernel = dense['kernel'] + factors['in'] @ factors['out']
      backbone[module][layer] = dense | {'kernel': kernel}
  return params | {'backbone': backbone}
