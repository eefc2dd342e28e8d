"""Tensors of published files under the names, and in the form, of timm's."""

from collections.abc import Mapping

import numpy as np

_CLIP = 'vision_model.'


def rename_registers(
  tensors: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Maps the files of DINOv2 with registers to timm's.

  Their position embeddings have one for the class token, which is a constant
  added to it.
  """
  tensors = dict(tensors)
  if 'register_tokens' not in tensors:
    return tensors
  tensors['reg_token'] = tensors.pop('register_tokens')
  positions = tensors.get('pos_embed')
  if 'cls_token' in tensors and np.ndim(positions) == 3:
    tensors['cls_token'] = tensors['cls_token'] + positions[:, :1]
    tensors['pos_embed'] = positions[:, 1:]
  return tensors


def rename_masked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Takes the last norm of tokens as that of pooled features, as timm does.

  Files of training on masked images have the former.
  """
  tensors = dict(tensors)
  for leaf in ('weight', 'bias'):
    if f'norm.{leaf}' in tensors and f'fc_norm.{leaf}' not in tensors:
      tensors[f'fc_norm.{leaf}'] = tensors.pop(f'norm.{leaf}')
  return tensors


def rename_clip(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Maps the vision tower of CLIP in Hugging Face's transformers to timm's."""
  if not any(name.startswith(_CLIP) for name in tensors):
    return dict(tensors)
  renamed = {}
  for name, tensor in tensors.items():
    # A file may have the tower of texts too, and the projections of both.
    if not name.startswith(_CLIP) or name.endswith('.position_ids'):
      continue
    name = name.removeprefix(_CLIP)
    for old, new in _CLIP_MODULES.items():
      name = name.replace(old, new)
    renamed[name] = tensor
  for name, num_axes in (('cls_token', 1), ('pos_embed', 2)):
    if np.ndim(renamed.get(name)) == num_axes:
      renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
  return _join_qkv(renamed)


# `pre_layrnorm` is how transformers spells it.
_CLIP_MODULES = {
  'embeddings.class_embedding': 'cls_token',
  'embeddings.position_embedding.weight': 'pos_embed',
  'embeddings.patch_embedding': 'patch_embed.proj',
  'pre_layrnorm': 'norm_pre',
  'post_layernorm': 'norm',
  'encoder.layers': 'blocks',
  'layer_norm': 'norm',
  'self_attn.out_proj': 'attn.proj',
  'self_attn': 'attn',
}


def _join_qkv(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Concatenates the projections to queries, keys and values."""
  joined = {}
  for name, tensor in tensors.items():
    for leaf in ('weight', 'bias'):
      if not name.endswith(f'.q_proj.{leaf}'):
        continue
      prefix = name.removesuffix(f'q_proj.{leaf}')
      parts = [tensors.get(f'{prefix}{x}_proj.{leaf}') for x in 'qkv']
      if all(np.shape(part) == tensor.shape for part in parts):
        joined[f'{prefix}qkv.{leaf}'] = np.concatenate(parts)
  used = {
    name.replace('.qkv.', f'.{x}_proj.') for name in joined for x in 'qkv'
  }
  return {k: v for k, v in tensors.items() if k not in used} | joined
