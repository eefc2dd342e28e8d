"""Two convolutions that XLA's CPU backend computes slowly, written faster.

It computes a grouped convolution one channel at a time, and the gradient of a
filter over three channels one value at a time. On CPUs the former is written as
a sum of shifted images, which fuses into one loop over contiguous channels, and
the latter as a product of matrices. Accelerators take the plain convolutions.

Both pad as TensorFlow's 'SAME': where the padding is odd, the larger half is at
the bottom and right.
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


def _plain(x, kernel, *, stride):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding='SAME',
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


def _patches(x, kernel, stride) -> jax.Array:
  """Returns the inputs of each output, [batch * height * width, inputs]."""
  pads = _paddings(x.shape[1:3], len(kernel), stride)
  padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  shape = [-(-n // stride) for n in x.shape[1:3]]
  shifts = list(_shifts(padded, len(kernel), stride, shape))
  patches = jnp.concatenate(shifts, axis=-1)
  return patches.reshape(-1, patches.shape[-1])


def _stem_gradients(x, kernel, gradient, *, stride):
  def plain(x):
    return _plain(x, kernel, stride=stride)

  # That of x is not computed where nothing depends on it, as for images.
  (dx,) = jax.vjp(plain, x)[1](gradient)
  rows = gradient.reshape(-1, gradient.shape[-1])
  dkernel = _patches(x, kernel, stride).T @ rows
  return dx, dkernel.reshape(kernel.shape)


# Maps float [batch, height, width, channels], a filter for each channel, [size,
# size, 1, channels], and the stride to [batch, ceil(height / stride),
# ceil(width / stride), channels].
depthwise_conv = _for_platform(_depthwise, _plain, _depthwise_gradients)
# The same for images and filters [size, size, 3, channels].
stem_conv = _for_platform(_plain, _plain, _stem_gradients)
