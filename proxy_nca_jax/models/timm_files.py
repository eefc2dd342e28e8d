"""Trained networks as files that timm loads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from safetensors import numpy as safetensors

from proxy_nca_jax.models import pretrained, published
from proxy_nca_jax.models.backbones import BACKBONES

if TYPE_CHECKING:
  # benchmarks/train_step.py runs without ml_collections.
  import ml_collections

# Poolings, and what timm calls them.
_POOLINGS = {
  'cls': 'token',
  'attention': 'map',
  'average': 'avg',
  'max': 'max',
}


def make_file(
  config: ml_collections.ConfigDict, params: dict, model_state: dict
) -> bytes:
  """Returns a network as safetensors, the head as timm's classifier.

  The metadata of the file has the arguments of timm.create_model, the
  statistics of the pixels, and what follows the pooling and the classifier.

  Args:
    config: of the run.
    params: {'backbone', 'head'}.
    model_state: batch statistics.

  Raises:
    ValueError: if timm has no such network, pooling or head.
  """
  name, backbone = config.model.name, BACKBONES[config.model.name]
  arguments = _arguments(config)
  if config.model.head_hidden:
    raise ValueError(
      f'The head has {config.model.head_hidden} hidden units, and those of '
      'timm are linear: save the network with `save` or `export`.'
    )
  variables = {
    'params': params['backbone'],
    'batch_stats': model_state.get('batch_stats', {}).get('backbone', {}),
  }
  tensors = pretrained.export_tensors(variables, name)
  if arguments['global_pool'] != 'map':
    tensors = {
      key: value
      for key, value in tensors.items()
      if not key.startswith('attn_pool.')
    }
  head, classifier = params['head']['embedding'], backbone.classifier or 'head'
  tensors[f'{classifier}.weight'] = np.asarray(head['kernel']).T
  tensors[f'{classifier}.bias'] = np.asarray(head['bias'])
  metadata = {
    'create_model': arguments,
    'mean': [x / 255 for x in backbone.mean],
    'std': [x / 255 for x in backbone.std],
    'image_size': config.dataset.image_size,
    'layer_norm_of_pooled_features': config.model.layer_norm,
    'unit_norm_of_embeddings': config.model.normalize,
  }
  return safetensors.save(
    {key: np.ascontiguousarray(value) for key, value in tensors.items()},
    {key: json.dumps(value) for key, value in metadata.items()},
  )


def _arguments(config) -> dict:
  """Returns the arguments of timm.create_model."""
  fields, backbone = config.model, BACKBONES[config.model.name]
  weights = published.WEIGHTS.get(fields.name)
  if not weights or not weights.architecture:
    raise ValueError(f'timm has no {fields.name}: use `save` or `export`.')
  pooling = fields.pooling
  if pooling == 'published':
    pooling = backbone.pooling
  if pooling not in _POOLINGS:
    raise ValueError(
      f'timm has no pooling like {pooling} (config.model.pooling): use `save` '
      'or `export`.'
    )
  arguments = {
    'model_name': weights.architecture,
    'num_classes': fields.embedding_dim,
    'global_pool': _POOLINGS[pooling],
  }
  if backbone.patch_size == 1:
    return arguments
  size, traits = config.dataset.image_size, backbone.make.keywords
  arguments['img_size'] = size
  # By default, timm moves the last norm behind some poolings.
  is_rotary = traits.get('rotary') is not None
  norm = 'use_fc_norm' if is_rotary else 'fc_norm'
  arguments[norm] = traits.get('has_pooled_norm', False)
  if is_rotary and traits.get('has_first_norm'):
    # Those of PE: timm scales positions at other sizes, its authors do not.
    arguments['ref_feat_shape'] = (size // backbone.patch_size,) * 2
  return arguments
