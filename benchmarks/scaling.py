"""What loss, proxies and evaluation cost a device: memory, arithmetic, traffic.

python benchmarks/scaling.py [--classes=1000000] [--dim=512] [--batch_size=256]

Compiles, without running it, a step of the softmax form of Proxy-NCA on given
embeddings with Adam for the proxies, for 1 to --devices devices of this
machine's processor, with a copy of the proxies on each and with
config.proxies.sharded. Of each it prints what XLA says of one device: bytes of
parameters and moments, bytes besides, flops, and the bytes that its collectives
hold, the largest of them named. Then the cost model of docs/scaling.md, whose
formulas must agree with what was compiled.
"""

import argparse
import math
import os
import pathlib
import re
import sys


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--classes', type=int, default=10**6)
  parser.add_argument('--dim', type=int, default=512)
  parser.add_argument('--batch_size', type=int, default=256)
  parser.add_argument('--devices', type=int, default=8)
  return parser.parse_args()


_ARGUMENTS = parse()
# As many devices of the host's processor as the largest mesh has.
os.environ['XLA_FLAGS'] = (
  f'--xla_force_host_platform_device_count={_ARGUMENTS.devices}'
)
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax import losses, train_step
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.configs import default

_MIB = 2**20
_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|'
  r'reduce-scatter)(?:-start)?\('
)
_ARRAY = re.compile(r'\b[a-z]+(\d+)\[([\d,]*)\]')


def compile_step(num_devices, num_classes, dim, batch_size, *, sharded):
  """Compiles the step for the first devices of this machine."""
  mesh = mesh_lib.make_mesh(jax.devices()[:num_devices])
  config = default.get_config()
  config.proxies.sharded = sharded
  reshard = train_step.make_reshard(config, num_classes, mesh)
  adam = optax.adam(1e-3)

  def step(points, moments, embeddings, labels):
    def mean_loss(points, embeddings):
      x, p, y = reshard(embeddings, points, labels)
      return jnp.mean(losses.proxy_nca_pp_loss(x, p, y))

    gradients, of_embeddings = jax.grad(mean_loss, (0, 1))(points, embeddings)
    updates, moments = adam.update(gradients, moments)
    return optax.apply_updates(points, updates), moments, of_embeddings

  rows = mesh_lib.by_row(mesh)
  of_points = rows if sharded else mesh_lib.replicated(mesh)
  num_rows = num_classes + (-num_classes % num_devices if sharded else 0)
  points = jax.ShapeDtypeStruct(
    (num_rows, dim), jnp.float32, sharding=of_points
  )
  moments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      sharding=of_points if x.ndim else mesh_lib.replicated(mesh),
    ),
    jax.eval_shape(adam.init, points),
  )
  embeddings = jax.ShapeDtypeStruct(
    (batch_size, dim), jnp.float32, sharding=rows
  )
  labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows)
  outputs = (of_points, jax.tree.map(lambda x: x.sharding, moments), rows)
  return (
    jax.jit(step, donate_argnums=(0, 1), out_shardings=outputs)
    .lower(points, moments, embeddings, labels)
    .compile()
  )


def collectives(compiled) -> list[tuple[int, str]]:
  """Returns (bytes of the result, kind and shape) of each, largest first."""
  found = []
  for line in compiled.as_text().splitlines():
    if match := _COLLECTIVE.search(line):
      arrays = [
        (
          int(bits) // 8 * math.prod(int(n) for n in shape.split(',') if n),
          shape,
        )
        for bits, shape in _ARRAY.findall(match[1])
      ]
      total = sum(size for size, _ in arrays)
      found.append((total, f'{match[2]} of [{max(arrays)[1]}]'))
  return sorted(found, reverse=True)


def print_compiled(num_classes, dim, batch_size) -> None:
  print(
    f'{num_classes:,} x {dim} proxies, batch {batch_size}, jax '
    f'{jax.__version__}; MiB of one device'
  )
  print(
    f'{"":11}{"devices":>8}{"held":>9}{"besides":>9}{"model":>9}'
    f'{"Gflop":>9}{"model":>9}{"traffic":>9}  largest collective'
  )
  for sharded in (False, True):
    number = 1
    while number <= jax.device_count():
      compiled = compile_step(
        number, num_classes, dim, batch_size, sharded=sharded
      )
      memory = compiled.memory_analysis()
      traffic = collectives(compiled)
      model = cost(number, num_classes, dim, batch_size, sharded=sharded)
      print(
        f'{"sharded" if sharded else "copies":11}{number:8}'
        f'{memory.argument_size_in_bytes / _MIB:9.0f}'
        f'{memory.temp_size_in_bytes / _MIB:9.0f}'
        f'{model["memory"] / _MIB:9.0f}'
        f'{compiled.cost_analysis()["flops"] / 1e9:9.1f}'
        f'{model["flops"] / 1e9:9.1f}'
        f'{sum(size for size, _ in traffic) / _MIB:9.2f}'
        f'  {traffic[0][1] if traffic else "none"}'
      )
      number *= 2


def cost(num_devices, num_classes, dim, batch_size, *, sharded) -> dict:
  """The model, of one device and step: bytes, flops, bytes received.

  Memory is that of the proxies, Adam's two moments and the gradients, and the
  similarities with their gradient. Three products: similarities, and the
  gradients of both sides. Traffic: embeddings to all devices and their
  gradients back; of copies, the gradients of all proxies.
  """
  rows = math.ceil(num_classes / num_devices) if sharded else num_classes
  batch = batch_size if sharded else batch_size / num_devices
  matrix = 4 * rows * dim
  traffic = 4 * (3 * batch_size * dim if sharded else num_classes * dim)
  return {
    'memory': 4 * matrix + 2 * 4 * batch * rows,
    'flops': 6 * batch * rows * dim,
    'traffic': traffic if num_devices > 1 else 0,
  }


def print_model(dim: int, batch_size: int) -> None:
  """Prints the model, of sharded proxies, beyond what this machine holds."""
  print(
    f'\nThe model: sharded, {dim} dimensions, batch {batch_size}; of one device'
  )
  print(
    f'{"classes":>12}{"devices":>9}{"GiB":>10}{"Tflop":>10}{"MiB traffic":>13}'
  )
  for num_classes in (11_318, 10**6, 10**7, 10**8):
    for number in (1, 8, 64, 256):
      model = cost(number, num_classes, dim, batch_size, sharded=True)
      print(
        f'{num_classes:12,}{number:9}{model["memory"] / 2**30:10.2f}'
        f'{model["flops"] / 1e12:10.3f}{model["traffic"] / _MIB:13.1f}'
      )
  print(
    f'\nEvaluation: all ranks of N items, {dim} dimensions, shared; of one '
    'device'
  )
  print(f'{"items":>12}{"devices":>9}{"GiB":>10}{"Tflop":>10}')
  for num_items in (60_502, 10**6, 10**7):
    for number in (1, 8, 64, 256):
      print(
        f'{num_items:12,}{number:9}{4 * num_items * dim / 2**30:10.2f}'
        f'{2 * num_items**2 * dim / number / 1e12:10.1f}'
      )


def main() -> None:
  print_compiled(_ARGUMENTS.classes, _ARGUMENTS.dim, _ARGUMENTS.batch_size)
  print_model(_ARGUMENTS.dim, _ARGUMENTS.batch_size)


if __name__ == '__main__':
  main()
