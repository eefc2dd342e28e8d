"""Weights and images that a name and a shape determine, on any machine.

The tests give them to our networks, `benchmarks/parity.py originals` gave them
to the torch originals and stored what came out.
"""

import math
import zlib

import numpy as np

# Arguments of a tiny network of each family.
_TINY_VIT = {'dim': 32, 'num_heads': 2, 'num_blocks': 1}
_TINY_CONVNEXT = {'depths': (0, 0, 1, 0), 'widths': (8, 12, 16, 24)}
TINY = {
  'dinov2_s14_reg': _TINY_VIT,
  'tipsv2_b14': _TINY_VIT,
  'dinov3_s16': _TINY_VIT,
  'dinov3_s16_plus': _TINY_VIT,
  'siglip2_b16': _TINY_VIT | {'num_pool_heads': 2},
  'pe_core_b16': _TINY_VIT,
  'eva02_b14': _TINY_VIT,
  'clip_l14': _TINY_VIT,
  'convnext_tiny': _TINY_CONVNEXT,
  'convnextv2_nano': _TINY_CONVNEXT,
}


def tiny_size(patch_size: int) -> int:
  """Returns the height and width of images for a tiny network."""
  return 3 * patch_size if patch_size > 1 else 37


def make_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Draws a tensor of a torch state dict, float32 but for counts."""
  if name.endswith('num_batches_tracked'):
    return np.zeros(shape, np.int64)
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if name.endswith('weight') and len(shape) > 1:
    # float32 draws: a network of 86 million parameters takes a second.
    fan_in = math.prod(shape[1:])
    values = rng.standard_normal(shape, np.float32)
    return values * np.float32(math.sqrt(1.5 / fan_in))
  is_scale = name.endswith(('weight', 'running_var', 'gamma'))
  low, high = (0.5, 1.5) if is_scale else (-0.2, 0.2)
  return rng.uniform(low, high, shape).astype(np.float32)


def make_images(size: int, batch: int = 2) -> np.ndarray:
  """Draws float32 [batch, size, size, 3] of about unit variance."""
  shape = (batch, size, size, 3)
  return np.random.default_rng(size).standard_normal(shape, np.float32)
