"""Convolutions that XLA's CPU backend computes slowly, written faster.

It computes a grouped convolution one channel at a time, the gradient of a
filter over three channels one value at a time, and that of other filters in up
to three times the time of the convolution. On CPUs the first is written as a
sum of shifted images, which fuses into one loop over contiguous channels, and
the gradients as products of matrices. Accelerators take the plain convolutions.

Padding is that of TensorFlow's 'SAME' by default: where it is odd, the larger
half is at the bottom and right.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp


def _for_platform(
  cpu: Callable, default: Callable, cpu_gradients: Callable
) -> Callable:
  """Returns (x, kernel, stride) -> the convolution, with its gradients.

  Args:
    cpu: the convolution on CPUs; all three take the stride by keyword.
    default: the convolution elsewhere.
    cpu_gradients: maps (x, kernel, gradient) to the gradients of x and kernel.
  """

  @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
  def convolve(x, kernel, stride):
    return jax.lax.platform_dependent(
      x,
      kernel,
      cpu=functools.partial(cpu, stride=stride),
      default=functools.partial(default, stride=stride),
    )

  def default_gradients(x, kernel, gradient, *, stride):
    plain = functools.partial(default, stride=stride)
    return jax.vjp(plain, x, kernel)[1](gradient)

  def forward(x, kernel, stride):
    return convolve(x, kernel, stride), (x, kernel)

  def backward(stride, saved, gradient):
    return jax.lax.platform_dependent(
      *saved,
      gradient,
      cpu=functools.partial(cpu_gradients, stride=stride),
      default=functools.partial(default_gradients, stride=stride),
    )

  convolve.defvjp(forward, backward)
  return convolve


def _plain(x, kernel, *, stride, padding='SAME'):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1] // kernel.shape[2],
  )


def _paddings(
  lengths: Sequence[int], size: int, stride: int
) -> list[tuple[int, int]]:
  """Returns the pixels before and after each axis."""
  pads = []
  for length in lengths:
    total = max((-(-length // stride) - 1) * stride + size - length, 0)
    pads.append((total // 2, total - total // 2))
  return pads


def _shifts(
  padded: jax.Array, size: int, stride: int, shape: Sequence[int]
) -> Iterator[jax.Array]:
  """Yields the input [..., *shape, channels] of each tap, row by row.

  Args:
    padded: the padded images [..., height, width, channels].
    size: of the filter.
    stride: of both axes.
    shape: height and width of the result.
  """
  height, width = (stride * (length - 1) + 1 for length in shape)
  for row in range(size):
    for column in range(size):
      yield padded[
        ...,
        row : row + height : stride,
        column : column + width : stride,
        :,
      ]


def _correlate(padded, kernel, stride, shape) -> jax.Array:
  """Sums the shifted images, each times its tap of every channel."""
  taps = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
  shifts = _shifts(padded, len(kernel), stride, shape)
  return sum(shifted * tap for shifted, tap in zip(shifts, taps))


def _depthwise(x, kernel, *, stride):
  pads = _paddings(x.shape[1:3], len(kernel), stride)
  padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  return _correlate(
    padded, kernel, stride, [-(-n // stride) for n in x.shape[1:3]]
  )


def _depthwise_gradients(x, kernel, gradient, *, stride):
  size, lengths = len(kernel), x.shape[1:3]
  pads = _paddings(lengths, size, stride)
  # Of x: the gradient, spread out by the stride, correlated with the filter
  # turned by 180 degrees; padded such that the result has the size of x.
  spread_pads = []
  for length, out, (low, _) in zip(lengths, gradient.shape[1:3], pads):
    before = size - 1 - low
    after = length + size - 1 - before - ((out - 1) * stride + 1)
    spread_pads.append((before, after, stride - 1))
  zero, uncut = jnp.zeros((), gradient.dtype), (0, 0, 0)
  spread = jax.lax.pad(gradient, zero, [uncut, *spread_pads, uncut])
  dx = _correlate(spread, kernel[::-1, ::-1], 1, lengths)

  # Of the filter: summed over the images one by one, since XLA reduces a whole
  # batch to its channels one value at a time.
  def add(sums, image):
    x, gradient = image
    padded = jnp.pad(x, (*pads, (0, 0)))
    shifts = _shifts(padded, size, stride, gradient.shape[:2])
    return [s + shift * gradient for s, shift in zip(sums, shifts)], None

  zeros = [jnp.zeros(gradient.shape[1:], gradient.dtype)] * size**2
  sums, _ = jax.lax.scan(add, zeros, (x, gradient))
  dkernel = jnp.stack([jnp.sum(s, (0, 1)) for s in sums])
  return dx, dkernel.reshape(kernel.shape)


_valid = functools.partial(_plain, padding='VALID')


def _valid_gradients(x, kernel, gradient, *, stride):
  # That of x is not computed where nothing depends on it, as for images.
  (dx,) = jax.vjp(lambda x: _valid(x, kernel, stride=stride), x)[1](gradient)
  shifts = _shifts(x, len(kernel), stride, gradient.shape[1:3])
  patches = jnp.concatenate(list(shifts), axis=-1)
  dkernel = patches.reshape(-1, patches.shape[-1]).T @ gradient.reshape(
    -1, gradient.shape[-1]
  )
  return dx, dkernel.reshape(kernel.shape)


# Maps float [batch, height, width, channels], a filter for each channel, [size,
# size, 1, channels], and the stride to [batch, ceil(height / stride),
# ceil(width / stride), channels].
depthwise_conv = _for_platform(_depthwise, _plain, _depthwise_gradients)
_valid_conv = _for_platform(_valid, _valid, _valid_gradients)


def conv(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  padding: tuple[int, int] | None = None,
) -> jax.Array:
  """Convolves images with dense filters.

  Args:
    x: float [batch, height, width, channels].
    kernel: [size, size, channels, filters].
    stride: of both axes.
    padding: pixels before and after both axes; None pads as 'SAME'.

  Returns:
    [batch, out_height, out_width, filters].
  """
  pads = (
    [padding] * 2 if padding else _paddings(x.shape[1:3], len(kernel), stride)
  )
  return _valid_conv(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel, stride)
