"""Renames the tensors of Google's Vision Transformers as in torch.

Google's .npz files come from Flax code that numbers layers in the order of
their creation: augreg (https://github.com/google-research/vision_transformer)
and big_vision, which numbers them differently. Attention kernels have an axis
for heads, and query, key and value are separate.
"""

from collections.abc import Mapping

import numpy as np

# Names of the attention, the second normalization and the MLP of a block.
_AUGREG = ('MultiHeadDotProductAttention_1', 'LayerNorm_2', 'MlpBlock_3')
_BIG_VISION = ('MultiHeadDotProductAttention_0', 'LayerNorm_1', 'MlpBlock_0')

_PREFIXES = ('opt/target/', 'params/img/', 'params/')


def to_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames and reshapes tensors; unknown names are kept unchanged.

  Args:
    arrays: {name: array} of an .npz file.

  Returns:
    {name: array} in torch's names and layouts. A tensor joined from several is
    omitted if one of them is missing.
  """
  for prefix in _PREFIXES:
    if f'{prefix}embedding/kernel' in arrays:
      # Other entries are the optimizer's state.
      arrays = {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
      }
  table = _table(arrays)
  tensors = {
    name: np.concatenate([_layout(part, arrays[part]) for part in parts])
    for name, parts in table.items()
    if all(part in arrays for part in parts)
  }
  known = {part for parts in table.values() for part in parts}
  return tensors | {
    name: value for name, value in arrays.items() if name not in known
  }


def _table(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
  """Returns {torch name: the names of the tensors that it concatenates}."""
  is_big_vision = 'pos_embedding' in arrays
  attention, norm2, mlp = _BIG_VISION if is_big_vision else _AUGREG
  positions = 'pos_embedding'
  if not is_big_vision:
    positions = 'Transformer/posembed_input/pos_embedding'
  modules = {
    'patch_embed.proj': ('kernel', 'embedding'),
    'norm': ('scale', 'Transformer/encoder_norm'),
    'head': ('kernel', 'head'),
  }
  blocks = {
    name.split('/')[1]
    for name in arrays
    if name.startswith('Transformer/encoderblock_')
  }
  for block in blocks:
    source = f'Transformer/{block}/'
    target = f'blocks.{block.removeprefix("encoderblock_")}.'
    parts = [f'{source}{attention}/{p}' for p in ('query', 'key', 'value')]
    modules |= {
      f'{target}norm1': ('scale', f'{source}LayerNorm_0'),
      f'{target}attn.qkv': ('kernel', *parts),
      f'{target}attn.proj': ('kernel', f'{source}{attention}/out'),
      f'{target}norm2': ('scale', f'{source}{norm2}'),
      f'{target}mlp.fc1': ('kernel', f'{source}{mlp}/Dense_0'),
      f'{target}mlp.fc2': ('kernel', f'{source}{mlp}/Dense_1'),
    }
  table = {'cls_token': ('cls',), 'pos_embed': (positions,)}
  for target, (weight, *sources) in modules.items():
    table[f'{target}.weight'] = tuple(f'{s}/{weight}' for s in sources)
    table[f'{target}.bias'] = tuple(f'{s}/bias' for s in sources)
  return table


def _layout(name: str, value: np.ndarray) -> np.ndarray:
  if not name.endswith('/kernel'):
    # torch concatenates the biases of the heads.
    return value.reshape(-1) if name.endswith(('/bias', '/scale')) else value
  if value.ndim == 4:
    return value.transpose(3, 2, 0, 1)
  # [dim, heads, head_dim], except for the output: [heads, head_dim, dim].
  if name.endswith('/out/kernel'):
    return value.reshape(-1, value.shape[-1]).T
  return value.reshape(value.shape[0], -1).T
