"""Rotary position embeddings of patches in a plane.

Su et al., RoFormer, https://arxiv.org/abs/2104.09864: pairs of the channels of
queries and keys are turned by angles proportional to a position, so that their
products depend on differences of positions. In a plane, half of the pairs turn
by the position along one axis and half by that along the other.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rotary:
  """The rotary embedding of a family.

  Attributes:
    make_angles: maps (height, width) of the grid and the number of channels of
      a head to the angles, float64 [height * width, channels / 2].
    is_interleaved: whether channels 2i and 2i + 1 form a pair, or i and i +
      channels / 2.
  """

  make_angles: Callable[[int, int, int], np.ndarray]
  is_interleaved: bool

  def make_turns(self, height: int, width: int, channels: int) -> np.ndarray:
    """Returns cosines and sines of the angles, [2, patches, channels / 2]."""
    angles = self.make_angles(height, width, channels)
    return np.stack([np.cos(angles), np.sin(angles)])

  def rotate(self, x: jax.Array, turns: jax.Array) -> jax.Array:
    """Rotates the patches, which are the last tokens.

    Args:
      x: [batch, tokens, heads, channels]; the tokens before the patches have no
        position.
      turns: float32 or wider, of `make_turns`.

    Returns:
      The same shape and dtype; computed in the dtype of the turns.
    """
    cos, sin = turns[:, None, :, None, :]
    prefix, patches = jnp.split(x, [x.shape[1] - turns.shape[1]], axis=1)
    if self.is_interleaved:
      first, second = patches[..., ::2], patches[..., 1::2]
    else:
      first, second = jnp.split(patches, 2, axis=-1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    if self.is_interleaved:
      rotated = jnp.stack(pairs, axis=-1).reshape(patches.shape)
    else:
      rotated = jnp.concatenate(pairs, axis=-1)
    return jnp.concatenate([prefix, rotated.astype(x.dtype)], axis=1)


def _plane(first, second, frequencies) -> np.ndarray:
  """Returns angles by two coordinates of each patch, [height, width]."""
  coordinates = np.stack([first.reshape(-1), second.reshape(-1)], axis=1)
  angles = coordinates[:, :, None] * frequencies
  return angles.reshape(len(angles), -1)


def _frequencies(channels: int, temperature: float) -> np.ndarray:
  quarter = channels // 4
  return temperature ** -(np.arange(quarter) / quarter)


def _centered(height: int, width: int, channels: int) -> np.ndarray:
  """The centers of patches in an image that spans [-1, 1] in both axes."""
  y, x = np.meshgrid(
    *((2 * np.arange(n) + 1) / n - 1 for n in (height, width)), indexing='ij'
  )
  return _plane(y, x, 2 * math.pi * _frequencies(channels, 100.0))


def _stretched(height: int, width: int, channels: int) -> np.ndarray:
  """Indices, scaled to those of the 16 x 16 patches of pretraining."""
  y, x = np.meshgrid(
    *(np.arange(n) / n * 16 for n in (height, width)), indexing='ij'
  )
  return _plane(y, x, _frequencies(channels, 10_000.0))


def _counted(height: int, width: int, channels: int) -> np.ndarray:
  """Indices from 1, x before y; the class token is at (0, 0)."""
  y, x = np.meshgrid(
    np.arange(1, height + 1), np.arange(1, width + 1), indexing='ij'
  )
  return _plane(x, y, _frequencies(channels, 10_000.0))


# https://github.com/facebookresearch/dinov3/blob/main/dinov3/layers
# /rope_position_encoding.py
DINOV3 = Rotary(_centered, is_interleaved=False)
# https://github.com/baaivision/EVA/blob/master/EVA-02/asuka/rope.py
EVA02 = Rotary(_stretched, is_interleaved=True)
# https://github.com/facebookresearch/perception_models/blob/main/core
# /vision_encoder/rope.py
PE = Rotary(_counted, is_interleaved=True)
