"""Vision Transformers: ViT-S and ViT-B, with the changes of DINOv2.

Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021,
https://arxiv.org/abs/2010.11929. Modules are named as in timm, so that its
weights, and those of DINO and DINOv2, load without a table of names.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

# Without a dtype argument, it computes in float32, that of the residual stream.
_norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class _LayerScale(nn.Module):
  """Multiplies each channel by a learned factor."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    # The initial value of DINOv2.
    init = nn.initializers.constant(1e-5)
    gamma = self.param('gamma', init, (x.shape[-1],))
    return x * gamma[None, None, :]


class _Block(nn.Module):
  """A pre-norm transformer block: self-attention and MLP, each with a residual.

  Attributes:
    num_heads: number of attention heads.
    layer_scale: whether to scale both before the addition, as in DINOv2.
    dtype: compute dtype of the matmuls.
  """

  num_heads: int
  layer_scale: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = self._attend(_norm(name='norm1')(x))
    x = x + (_LayerScale(name='ls1')(y) if self.layer_scale else y)
    y = _norm(name='norm2')(x)
    y = self._dense('mlp.fc1', 4 * x.shape[-1])(y)
    y = self._dense('mlp.fc2', x.shape[-1])(nn.gelu(y, approximate=False))
    return x + (_LayerScale(name='ls2')(y) if self.layer_scale else y)

  def _attend(self, x):
    batch, length, dim = x.shape
    qkv = self._dense('attn.qkv', 3 * dim)(x)
    shape = (batch, length, 3, self.num_heads, dim // self.num_heads)
    query, key, value = jnp.moveaxis(qkv.reshape(shape), 2, 0)
    x = jax.nn.dot_product_attention(query, key, value)
    return self._dense('attn.proj', dim)(x.reshape(batch, length, dim))

  def _dense(self, name, dim):
    return nn.Dense(
      dim,
      kernel_init=nn.initializers.truncated_normal(0.02),
      dtype=self.dtype,
      name=name,
    )


class ViT(nn.Module):
  """Maps images [batch, height, width, 3] to tokens [batch, 1 + patches, dim].

  The class token comes first, then the patches, row by row.

  Attributes:
    patch_size: height and width of a patch in pixels, a divisor of the image's.
    dim: dimension of the tokens.
    num_heads: number of attention heads.
    layer_scale: whether blocks have LayerScale, as in DINOv2.
    dtype: compute dtype of the matmuls.
    remat: whether to recompute each block in the backward pass.
    num_blocks: number of blocks.
  """

  patch_size: int
  dim: int
  num_heads: int
  layer_scale: bool = False
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  num_blocks: int = 12

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    del train  # There are no batch statistics and no dropout.
    x = nn.Conv(
      self.dim,
      (self.patch_size, self.patch_size),
      strides=(self.patch_size, self.patch_size),
      padding='VALID',
      dtype=self.dtype,
      name='patch_embed.proj',
    )(images.astype(self.dtype))
    x = x.reshape(x.shape[0], -1, self.dim)
    init = nn.initializers.truncated_normal(0.02)
    cls_token = self.param('cls_token', init, (1, 1, self.dim))
    cls_tokens = jnp.tile(cls_token, (x.shape[0], 1, 1))
    # The residual stream is at least float32; only matmuls may have less.
    x = x.astype(jnp.promote_types(x.dtype, cls_token.dtype))
    x = jnp.concatenate([cls_tokens.astype(x.dtype), x], axis=1)
    x += self.param('pos_embed', init, (1, *x.shape[1:]))
    block = nn.remat(_Block) if self.remat else _Block
    for index in range(self.num_blocks):
      x = block(
        self.num_heads, self.layer_scale, self.dtype, name=f'blocks.{index}'
      )(x)
    return _norm(name='norm')(x)
