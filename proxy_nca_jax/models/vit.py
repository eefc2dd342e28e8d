"""Vision Transformers, with the changes of the families that followed.

Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021,
https://arxiv.org/abs/2010.11929. `models/backbones.py` has the arguments of
each family. Modules are named as in timm, so that its weights, and those of
DINO and DINOv2, load without a table of names.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from proxy_nca_jax.models import rotary as rotary_lib

_init = nn.initializers.truncated_normal(0.02)
_exact_gelu = functools.partial(nn.gelu, approximate=False)


@dataclasses.dataclass(frozen=True)
class Style:
  """How the blocks of a family differ from those of ViT.

  Attributes:
    epsilon: of every LayerNorm.
    layer_scale: initial factor of each channel of attention and MLP before the
      addition (LayerScale); None for no factors.
    has_gammas: whether the factors are named gamma_1 instead of ls1.gamma.
    has_qkv_bias: whether the joint projection to queries, keys and values has
      biases.
    has_split_qkv: whether the three have projections of their own, of which
      that to keys has no biases.
    is_gated: whether the hidden units of the MLP are those of SwiGLU, SiLU(a)
      times b (Shazeer, https://arxiv.org/abs/2002.05202).
    has_hidden_norm: whether they pass a LayerNorm.
    mlp_ratio: hidden units for each channel.
    activation: of the hidden units that are not gated.
  """

  epsilon: float = 1e-6
  layer_scale: float | None = None
  has_gammas: bool = False
  has_qkv_bias: bool = True
  has_split_qkv: bool = False
  is_gated: bool = False
  has_hidden_norm: bool = False
  mlp_ratio: float = 4.0
  activation: Callable[[jax.Array], jax.Array] = _exact_gelu


def quick_gelu(x: jax.Array) -> jax.Array:
  """The approximation of GELU that CLIP was trained with."""
  return x * nn.sigmoid(1.702 * x)


def _norm(epsilon, name):
  # Without a dtype argument, it computes in float32, that of the residual
  # stream.
  return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


def _dense(dim, dtype, name, use_bias=True):
  return nn.Dense(
    dim, use_bias=use_bias, kernel_init=_init, dtype=dtype, name=name
  )


class _LayerScale(nn.Module):
  """Multiplies each channel by a learned factor."""

  initial: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.constant(self.initial)
    gamma = self.param('gamma', init, (x.shape[-1],))
    return x * gamma[None, None, :]


class _Block(nn.Module):
  """A pre-norm transformer block: self-attention and MLP, each with a residual.

  Attributes:
    num_heads: number of attention heads.
    style: of the family.
    rotary: the rotary embedding of queries and keys, or None.
    dtype: compute dtype of the matmuls.
  """

  num_heads: int
  style: Style
  rotary: rotary_lib.Rotary | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, turns: jax.Array | None) -> jax.Array:
    norm = functools.partial(_norm, self.style.epsilon)
    x += self._scale(self._attend(norm('norm1')(x), turns), 1)
    return x + self._scale(self._mlp(norm('norm2')(x)), 2)

  def _scale(self, x, number):
    initial = self.style.layer_scale
    if initial is None:
      return x
    if not self.style.has_gammas:
      return _LayerScale(initial, name=f'ls{number}')(x)
    init = nn.initializers.constant(initial)
    gamma = self.param(f'gamma_{number}', init, (x.shape[-1],))
    return x * gamma[None, None, :]

  def _attend(self, x, turns):
    batch, length, dim = x.shape
    shape = (batch, length, self.num_heads, dim // self.num_heads)
    if self.style.has_split_qkv:
      query, key, value = (
        self._dense(f'attn.{name}_proj', dim, use_bias=name != 'k')(x)
        for name in 'qkv'
      )
    else:
      use_bias = self.style.has_qkv_bias
      qkv = self._dense('attn.qkv', 3 * dim, use_bias)(x)
      query, key, value = jnp.split(qkv, 3, axis=-1)
    query, key, value = (y.reshape(shape) for y in (query, key, value))
    if self.rotary:
      query, key = (self.rotary.rotate(y, turns) for y in (query, key))
    x = jax.nn.dot_product_attention(query, key, value)
    return self._dense('attn.proj', dim)(x.reshape(batch, length, dim))

  def _mlp(self, x):
    style, dim = self.style, x.shape[-1]
    num_hidden = int(style.mlp_ratio * dim)
    if style.is_gated:
      gate = nn.silu(self._dense('mlp.fc1_g', num_hidden)(x))
      y = gate * self._dense('mlp.fc1_x', num_hidden)(x)
    else:
      y = style.activation(self._dense('mlp.fc1', num_hidden)(x))
    if style.has_hidden_norm:
      y = _norm(style.epsilon, 'mlp.norm')(y)
    return self._dense('mlp.fc2', dim)(y)

  def _dense(self, name, dim, use_bias=True):
    return _dense(dim, self.dtype, name, use_bias)


class _AttentionPool(nn.Module):
  """Pools tokens by the attention of a learned query, then an MLP.

  Zhai et al., Scaling Vision Transformers, https://arxiv.org/abs/2106.04560.

  Attributes:
    num_heads: number of attention heads.
    epsilon: of the LayerNorm.
    dtype: compute dtype of the matmuls.
  """

  num_heads: int
  epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps [batch, tokens, dim] to [batch, 1, dim]."""
    batch, length, dim = tokens.shape
    head_dim = dim // self.num_heads
    latent = self.param('latent', _init, (1, 1, dim))
    query = _dense(dim, self.dtype, 'q')(jnp.tile(latent, (batch, 1, 1)))
    pairs = _dense(2 * dim, self.dtype, 'kv')(tokens)
    key, value = (
      y.reshape(batch, length, self.num_heads, head_dim)
      for y in jnp.split(pairs, 2, axis=-1)
    )
    query = query.reshape(batch, 1, self.num_heads, head_dim)
    x = jax.nn.dot_product_attention(query, key, value)
    x = _dense(dim, self.dtype, 'proj')(x.reshape(batch, 1, dim))
    x = x.astype(tokens.dtype)
    y = _norm(self.epsilon, 'norm')(x)
    y = _exact_gelu(_dense(4 * dim, self.dtype, 'mlp.fc1')(y))
    return x + _dense(dim, self.dtype, 'mlp.fc2')(y)


class ViT(nn.Module):
  """Maps images [batch, height, width, 3] to tokens [batch, n, dim].

  First those that summarize the image: the output of the attention pool if
  `num_pool_heads`, then the class token if `has_class_token`; then the patches,
  row by row. Registers (Darcet et al., https://arxiv.org/abs/2309.16588) are
  left out.

  Attributes:
    patch_size: height and width of a patch in pixels, a divisor of the image's.
    dim: dimension of the tokens.
    num_heads: number of attention heads.
    num_blocks: number of blocks.
    style: of the blocks.
    rotary: the rotary embedding of queries and keys, or None.
    has_class_token: whether there is a class token.
    num_registers: number of registers.
    has_positions: whether learned position embeddings are added to the tokens.
    has_class_position: whether the class token has one of them.
    has_first_norm: whether a LayerNorm precedes the blocks; then the embedding
      of patches has no biases.
    has_pooled_norm: whether the last LayerNorm is that of pooled features,
      `norm_pooled`, instead of that of the tokens.
    num_pool_heads: number of heads of the attention pool; 0 for none.
    dtype: compute dtype of the matmuls.
    remat: whether to recompute each block in the backward pass.
  """

  patch_size: int
  dim: int
  num_heads: int
  num_blocks: int = 12
  style: Style = Style()
  rotary: rotary_lib.Rotary | None = None
  has_class_token: bool = True
  num_registers: int = 0
  has_positions: bool = True
  has_class_position: bool = True
  has_first_norm: bool = False
  has_pooled_norm: bool = False
  num_pool_heads: int = 0
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  def setup(self):
    if self.has_pooled_norm:
      self.last_norm = _norm(self.style.epsilon, 'fc_norm')

  def norm_pooled(self, pooled: jax.Array) -> jax.Array:
    """Normalizes pooled features [batch, dim], if the family does."""
    return self.last_norm(pooled) if self.has_pooled_norm else pooled

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    del train  # There are no batch statistics and no dropout.
    x = nn.Conv(
      self.dim,
      (self.patch_size, self.patch_size),
      strides=(self.patch_size, self.patch_size),
      padding='VALID',
      use_bias=not self.has_first_norm,
      dtype=self.dtype,
      name='patch_embed.proj',
    )(images.astype(self.dtype))
    # The residual stream is at least float32; only matmuls may have less.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    turns = None
    if self.rotary:
      turns = jnp.asarray(
        self.rotary.make_turns(*x.shape[1:3], self.dim // self.num_heads),
        x.dtype,
      )
    x = self._add_tokens(x.reshape(x.shape[0], -1, self.dim))
    if self.has_first_norm:
      x = _norm(self.style.epsilon, 'norm_pre')(x)
    block = nn.remat(_Block) if self.remat else _Block
    for index in range(self.num_blocks):
      x = block(
        self.num_heads,
        self.style,
        self.rotary,
        self.dtype,
        name=f'blocks.{index}',
      )(x, turns)
    if not self.has_pooled_norm:
      x = _norm(self.style.epsilon, 'norm')(x)
    elif self.is_initializing():
      self.norm_pooled(x[:, 0])
    num_first = int(self.has_class_token)
    parts = [x[:, :num_first], x[:, num_first + self.num_registers :]]
    if self.num_pool_heads:
      pool = _AttentionPool(
        self.num_pool_heads, self.style.epsilon, self.dtype, name='attn_pool'
      )
      parts.insert(0, pool(x))
    return jnp.concatenate(parts, axis=1)

  def _add_tokens(self, x):
    """Adds the class token, registers and positions to patches."""

    def add_positions(x):
      if not self.has_positions:
        return x
      return x + self.param('pos_embed', _init, (1, *x.shape[1:]))

    first = []
    if self.has_class_token:
      first.append(self.param('cls_token', _init, (1, 1, self.dim)))
    if self.num_registers:
      shape = (1, self.num_registers, self.dim)
      first.append(self.param('reg_token', _init, shape))
    if not self.has_class_position:
      x = add_positions(x)
    first = [jnp.tile(y, (x.shape[0], 1, 1)).astype(x.dtype) for y in first]
    x = jnp.concatenate([*first, x], axis=1)
    return add_positions(x) if self.has_class_position else x
