import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax.models import convolutions


def _plain(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1] // kernel.shape[2],
  )


class ConvolutionsTest(parameterized.TestCase):
  @parameterized.parameters(
    *itertools.product((3, 5), (1, 2), ((7, 8), (8, 7), (9, 9), (2, 1)))
  )
  def test_depthwise_convolution_and_its_gradients_are_xlas(
    self, size, stride, sides
  ):
    self._compare(
      convolutions.depthwise_conv, (3, *sides, 4), (size, size, 1, 4), stride
    )

  @parameterized.parameters((8, 8), (9, 7))
  def test_convolution_of_images_and_its_gradients_are_xlas(self, *sides):
    self._compare(convolutions.conv, (2, *sides, 3), (3, 3, 3, 5), 2)

  @parameterized.product(stride=(1, 2), sides=((8, 8), (7, 9)))
  def test_padded_convolution_and_its_gradients_are_xlas(self, stride, sides):
    self._compare(
      lambda x, k, stride: convolutions.conv(x, k, stride, (1, 1)),
      (2, *sides, 4),
      (3, 3, 4, 5),
      stride,
      padding=((1, 1), (1, 1)),
    )

  def _compare(self, convolve, shape, kernel_shape, stride, padding='SAME'):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
      x = jnp.asarray(rng.normal(size=shape))
      kernel = jnp.asarray(rng.normal(size=kernel_shape))
      actual, pull = jax.vjp(lambda x, k: convolve(x, k, stride), x, kernel)
      expected, plain_pull = jax.vjp(
        functools.partial(_plain, stride=stride, padding=padding), x, kernel
      )
      gradient = jnp.asarray(rng.normal(size=expected.shape))
      np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)
      for ours, theirs in zip(pull(gradient), plain_pull(gradient)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)

  def test_accelerators_get_the_plain_convolution(self):
    x, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 1, 4))
    convolve = jax.jit(lambda x, k: convolutions.depthwise_conv(x, k, 1))
    text = {
      platform: convolve.trace(x, kernel)
      .lower(lowering_platforms=(platform,))
      .as_text()
      for platform in ('cpu', 'tpu')
    }
    self.assertIn('stablehlo.convolution', text['tpu'])
    self.assertNotIn('stablehlo.convolution', text['cpu'])


if __name__ == '__main__':
  absltest.main()
