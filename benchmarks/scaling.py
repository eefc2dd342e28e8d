"""Measures what loss and proxies cost per device: memory, flops, communication.

python benchmarks/scaling.py [--classes=1000000] [--dim=512] [--batch_size=256]
  [--devices=8]

Compiles, but does not run, the trainer's step with the softmax form of
Proxy-NCA and Adam, on given embeddings that a learned vector scales, for 1 to
--devices emulated CPU devices, with replicated proxies and with
config.proxies.sharded. Prints what XLA reports for one device: bytes of
arguments (proxies and moments), bytes of temporaries, flops, bytes of the
results of collectives, and the largest collective. Beside them it prints the
cost model of docs/scaling.md ("model"), then the cost model for more devices,
for a step and for evaluation.
"""

import argparse
import math
import os
import pathlib
import sys


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, value, text in (
    ('classes', 10**6, 'number of classes, with one proxy each'),
    ('dim', 512, 'dimension of the embeddings'),
    ('batch_size', 256, 'global batch size'),
    ('devices', 8, 'largest number of devices'),
  ):
    parser.add_argument(f'--{name}', type=int, default=value, help=text)
  return parser.parse_args()


_ARGUMENTS = parse()
# Must be set before jax is imported.
os.environ['XLA_FLAGS'] = (
  f'--xla_force_host_platform_device_count={_ARGUMENTS.devices}'
)
os.environ['JAX_PLATFORMS'] = 'cpu'

import compile_ahead
import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax import mesh as mesh_lib

_MIB = 2**20


def compile_step(num_devices, num_classes, dim, batch_size, *, sharded):
  """Compiles the step for the first `num_devices` devices."""
  mesh = mesh_lib.make_mesh(jax.devices()[:num_devices])
  config = compile_ahead.proxy_config(dim, batch_size, sharded=sharded)
  return compile_ahead.lower_step(
    config, mesh, num_classes=num_classes, model=compile_ahead.Scale(dim)
  ).compile()


def print_compiled(num_classes, dim, batch_size) -> None:
  print(
    f'{num_classes:,} x {dim} proxies, batch {batch_size}, jax '
    f'{jax.__version__}; MiB per device'
  )
  print(
    f'{"":11}{"devices":>8}{"args":>9}{"temp":>9}{"model":>9}'
    f'{"Gflop":>9}{"model":>9}{"traffic":>9}  largest collective'
  )
  for sharded in (False, True):
    num_devices = 1
    while num_devices <= jax.device_count():
      compiled = compile_step(
        num_devices, num_classes, dim, batch_size, sharded=sharded
      )
      memory = compiled.memory_analysis()
      traffic = compile_ahead.collectives(compiled)
      model = cost(num_devices, num_classes, dim, batch_size, sharded=sharded)
      print(
        f'{"sharded" if sharded else "replicated":11}{num_devices:8}'
        f'{memory.argument_size_in_bytes / _MIB:9.0f}'
        f'{memory.temp_size_in_bytes / _MIB:9.0f}'
        f'{model["memory"] / _MIB:9.0f}'
        f'{compiled.cost_analysis()["flops"] / 1e9:9.1f}'
        f'{model["flops"] / 1e9:9.1f}'
        f'{sum(size for size, *_ in traffic) / _MIB:9.2f}'
        f'  {traffic[0][2] if traffic else "none"}'
      )
      num_devices *= 2


def cost(num_devices, num_classes, dim, batch_size, *, sharded) -> dict:
  """Returns the model for one device and step: bytes, flops, bytes received.

  Memory: proxies, Adam's two moments and gradients, and the similarities with
  their gradient. Flops: three products, for the similarities and the gradients
  of both sides. Traffic: embeddings to all devices, and their gradients back;
  for replicated proxies, the gradients of all proxies.
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
  """Prints the model of sharded proxies for more devices than exist here."""
  print(
    f'\nCost model per device: sharded proxies, {dim} dimensions, batch size '
    f'{batch_size}'
  )
  print(
    f'{"classes":>12}{"devices":>9}{"GiB":>10}{"Tflop":>10}{"MiB traffic":>13}'
  )
  for num_classes in (11_318, 10**6, 10**7, 10**8):
    for num_devices in (1, 8, 64, 256):
      model = cost(num_devices, num_classes, dim, batch_size, sharded=True)
      print(
        f'{num_classes:12,}{num_devices:9}{model["memory"] / 2**30:10.2f}'
        f'{model["flops"] / 1e12:10.3f}{model["traffic"] / _MIB:13.1f}'
      )
  print(f'\nCost model per device: ranking all items, {dim} dimensions')
  print(f'{"items":>12}{"devices":>9}{"GiB":>10}{"Tflop":>10}')
  for num_items in (60_502, 10**6, 10**7):
    for num_devices in (1, 8, 64, 256):
      print(
        f'{num_items:12,}{num_devices:9}{4 * num_items * dim / 2**30:10.2f}'
        f'{2 * num_items**2 * dim / num_devices / 1e12:10.1f}'
      )


def main() -> None:
  print_compiled(_ARGUMENTS.classes, _ARGUMENTS.dim, _ARGUMENTS.batch_size)
  print_model(_ARGUMENTS.dim, _ARGUMENTS.batch_size)


if __name__ == '__main__':
  main()
