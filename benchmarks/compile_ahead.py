"""Compiles what a run computes for TPUs that this machine does not have.

pip install 'jax[tpu]'
python benchmarks/compile_ahead.py --topology=v5e:2x4 [--only=REGEX]
  [--dataset=sop] [--list]

Programs: the training step of every recipe, and the embedding of a batch, with
the sizes of a dataset; the crops of images in device memory; neighbors and an
update of k-means of Stanford Online Products; and a step of sharded proxies, a
million in 512 dimensions, on 4, 8 and 16 chips.

Prints for each chip: memory against its HBM; flops and bytes as XLA counts
them; the time that these need at the chip's peak rates, which no program
reaches; and the largest collective. "seconds" is what compiling took here.
Nothing is run.

Exits with status 1 if a program does not fit into the memory, computes in
float64, calls the host, or moves an array as large as [batch, classes] or, with
sharded proxies, as all proxies.
"""

import argparse
import dataclasses
import importlib
import math
import os
import pathlib
import re
import sys
import time
import types
from collections.abc import Callable, Iterator

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax import (
  blocked,
  clustering,
  configuration,
  dry_run,
  models,
  state,
  train,
)
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax.configs import default, recipes
from proxy_nca_jax.evaluate import embed
from proxy_nca_jax.input_pipeline import on_device
from proxy_nca_jax.retrieval import neighbors, ranks

_MIB = 2**20
# GiB of HBM, Tflop/s of bfloat16 and GB/s of HBM of a chip, from
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
_CHIPS = {
  'v4': (32, 275, 1228),
  'v5e': (16, 197, 819),
  'v5p': (95, 459, 2765),
  'v6e': (32, 918, 1640),
}
# Training images and classes, test images.
_DATASETS = {
  'cub200': (5_864, 100, 5_924),
  'cars196': (8_054, 98, 8_131),
  'sop': (59_551, 11_318, 60_502),
}
_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|'
  r'reduce-scatter)(?:-start)?\('
)
_ARRAY = re.compile(r'\b[a-z]+(\d*)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to compile.

  Attributes:
    name: of the row.
    lower: maps a mesh to the lowered program.
    num_devices: of the mesh; None takes all of the topology.
    forbidden: elements of an array that no collective may reach.
  """

  name: str
  lower: Callable[[jax.sharding.Mesh], jax.stages.Lowered]
  num_devices: int | None = None
  forbidden: int | None = None


def lower_step(config, mesh, *, num_classes: int, model=None):
  """Lowers the trainer's step, in which no metrics of proxies are logged.

  Args:
    config: the run's config.
    mesh: the devices.
    num_classes: of five images each.
    model: the network; by default that of the config.
  """
  split = types.SimpleNamespace(
    num_classes=num_classes, class_sizes=np.full(num_classes, 5)
  )
  model = model or models.create_model(config)
  optimizer = optimizer_lib.make_optimizer(config)
  step = train.make_train_step(
    config,
    model,
    optimizer,
    split,
    mesh,
    # XLA counts the more expensive side of a condition.
    is_logged=lambda step: jnp.bool_(False),
  )
  shapes = state.abstract(
    config, model, optimizer, class_sizes=split.class_sizes, mesh=mesh
  )
  return step.lower(shapes, dry_run.batch_shapes(config, model, mesh), 1.0)


class Scale:
  """The smallest network with a gradient: it scales given embeddings."""

  def __init__(self, dim: int):
    self._dim = dim

  def example(self, batch_size):
    return jax.ShapeDtypeStruct((batch_size, self._dim), jnp.float32)

  def init(self, key, vectors, *, train):
    del key, vectors, train
    return {'params': {'backbone': {}, 'head': jnp.ones(self._dim)}}

  def apply(self, variables, vectors, *, train, mutable):
    del train, mutable
    return vectors * variables['params']['head'], {}


def proxy_config(dim, batch_size, *, sharded):
  """Returns the config of a step of the softmax form with Adam."""
  config = default.get_config()
  config.loss.name = 'proxy_nca_pp'
  config.num_steps, config.batch_size = 1000, batch_size
  config.model.embedding_dim = dim
  config.proxies.sharded = sharded
  return config


def _lower_embedding(config, mesh):
  model = models.create_model(config)
  size = blocked.round_up(config.evaluation.batch_size, mesh.size)
  variables = jax.eval_shape(
    lambda key, x: model.init(key, x, train=True),
    jax.random.key(0),
    model.example(size),
  )
  variables = _place(variables, mesh_lib.replicated(mesh))
  params = variables.pop('params')
  batch = _place({'image': model.example(size)}, mesh_lib.by_row(mesh))
  return embed.make_forward(model, mesh).lower(
    params=params, model_state=variables, batch=batch
  )


def _place(tree, sharding):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def _lower_cut(mesh, *, num_images, batch_size, side=256, image_size=224):
  rows = mesh_lib.by_row(mesh)
  batch_size = blocked.round_up(batch_size, mesh.size)
  crops = {
    name: jax.ShapeDtypeStruct((batch_size,), dtype, sharding=rows)
    for name, dtype in (
      ('top', jnp.int32),
      ('left', jnp.int32),
      ('id', jnp.int32),
      ('flip', jnp.bool_),
    )
  }
  images = jax.ShapeDtypeStruct(
    (blocked.round_up(num_images, mesh.size), side * side * 3),
    jnp.uint8,
    sharding=rows,
  )
  cut = on_device.make_cut(
    mesh, height=side, width=side, image_size=image_size, padding=0
  )
  return cut.lower(images, crops)


def _rows(mesh, layout, *shape, dtype=jnp.float32):
  sharding = jax.sharding.NamedSharding(mesh, layout.sharded)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _lower_nearest(mesh, *, num_items, dim, k):
  num_rows = -(-num_items // mesh.size)
  layout = blocked.Layout(mesh, mesh_lib.AXIS, 1024, num_items)
  items = _rows(mesh, layout, num_rows * mesh.size, dim)
  queries = jax.ShapeDtypeStruct(
    (1, 1024, dim), jnp.float32, sharding=mesh_lib.replicated(mesh)
  )
  return neighbors._nearest.lower(
    items, queries, k=k, is_self=True, recall_target=None, layout=layout
  )


def _lower_ranks(mesh, *, num_items, dim):
  layout = blocked.make_layout(mesh, mesh_lib.AXIS, 1024, num_items)
  size = layout.block_size
  num_rows = blocked.round_up(num_items, mesh.size * size)
  num_blocks = num_rows // mesh.size // size
  items = (
    _rows(mesh, layout, num_rows, dim),
    _rows(mesh, layout, num_rows, dtype=jnp.int32),
  )
  shape = (mesh.size * num_blocks, size)
  offsets = np.arange(num_blocks + 1, dtype=np.int32)
  return ranks._count.lower(
    (items, items, _rows(mesh, layout, *shape)),
    _rows(mesh, layout, *shape, dtype=jnp.int32),
    (0, offsets, 0, num_blocks),
    is_symmetric=True,
    layout=layout,
  )


def _lower_kmeans(mesh, *, num_points, dim, num_clusters):
  layout = blocked.make_layout(mesh, mesh_lib.AXIS, 1024, num_points)
  num_rows = blocked.round_up(num_points, mesh.size * layout.block_size)
  replicated = mesh_lib.replicated(mesh)
  centroids, inertia = _place(
    (jnp.zeros((num_clusters, dim)), jnp.zeros(())), replicated
  )
  clusters = clustering._State(
    scores=_rows(mesh, layout, num_rows),
    ids=_rows(mesh, layout, num_rows, dtype=jnp.int32),
    centroids=centroids,
    inertia=inertia,
  )
  points = _rows(mesh, layout, num_rows, dim)
  return clustering._update.lower(points, clusters, 0.0, layout=layout)


def programs(dataset: str) -> Iterator[Program]:
  """Yields all programs, the fastest to compile first."""
  num_images, num_classes, _ = _DATASETS[dataset]
  for num_devices in (4, 8, 16):
    config = proxy_config(512, 256, sharded=True)
    yield Program(
      f'step, sharded 1M x 512, {num_devices} chips',
      lambda mesh, config=config: lower_step(
        config, mesh, num_classes=10**6, model=Scale(512)
      ),
      num_devices,
      forbidden=10**6,
    )
  yield Program(
    'crops of images in device memory',
    lambda mesh: _lower_cut(mesh, num_images=num_images, batch_size=128),
    forbidden=num_images * 224,
  )
  yield Program(
    'k-means, 60,502 x 512, 11,316 clusters',
    lambda mesh: _lower_kmeans(
      mesh, num_points=60_502, dim=512, num_clusters=11_316
    ),
  )
  yield Program(
    'ranks, 60,502 x 512, nearest only',
    lambda mesh: _lower_ranks(mesh, num_items=60_502, dim=512),
  )
  yield Program(
    'neighbors, 1,024 of 60,502 x 512',
    lambda mesh: _lower_nearest(mesh, num_items=60_502, dim=512, k=10),
    forbidden=1024 * 60_502,
  )
  module = importlib.import_module(f'proxy_nca_jax.configs.{dataset}')
  for recipe in recipes.RECIPES:
    config = module.get_config(recipe).copy_and_resolve_references()
    configuration.set_num_steps(config, num_images)
    config = configuration.in_steps(config, num_images)
    yield Program(
      f'step, {dataset}:{recipe}',
      lambda mesh, config=config: lower_step(
        config, mesh, num_classes=num_classes
      ),
      forbidden=config.batch_size * num_classes,
    )
    yield Program(
      f'embedding, {dataset}:{recipe}',
      lambda mesh, config=config: _lower_embedding(config, mesh),
    )


def collectives(compiled) -> list[tuple[int, int, str]]:
  """Returns (bytes, elements, kind and shape) of each collective's result.

  The largest comes first.
  """
  results = []
  for line in compiled.as_text().splitlines():
    if match := _COLLECTIVE.search(line):
      arrays = [
        (
          math.prod(int(n) for n in shape.split(',') if n),
          int(bits or 8) // 8,  # pred has no number.
          shape,
        )
        for bits, shape in _ARRAY.findall(match[1])
      ]
      total = sum(size * width for size, width, _ in arrays)
      size, _, shape = max(arrays, default=(0, 0, ''))
      results.append((total, size, f'{match[2]} of [{shape}]'))
  return sorted(results, reverse=True)


def _problems(compiled, memory, hbm, traffic, forbidden) -> Iterator[str]:
  text = compiled.as_text()
  if memory > hbm:
    yield f'needs {memory / _MIB:,.0f} MiB of {hbm / _MIB:,.0f}'
  if re.search(r'\bf64\[', text):
    yield 'computes in float64'
  if re.search(r'callback|outfeed|infeed|host_compute', text):
    yield 'calls the host'
  if forbidden and traffic and max(size for _, size, _ in traffic) >= forbidden:
    yield f'moves an array of at least {forbidden:,} elements'


def report(program: Program, mesh, chip) -> list[str]:
  """Compiles a program, prints its row and returns its problems."""
  gibibytes, teraflops, gigabytes = chip
  start = time.monotonic()
  compiled = program.lower(mesh).compile()
  seconds = time.monotonic() - start
  memory = compiled.memory_analysis()
  total = (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  costs, traffic = compiled.cost_analysis(), collectives(compiled)
  flops, moved = costs.get('flops', 0), costs.get('bytes accessed', 0)
  ideal = max(flops / teraflops / 1e12, moved / gigabytes / 1e9)
  largest = (
    f'{traffic[0][2]}, {traffic[0][0] / _MIB:.1f} MiB' if traffic else 'none'
  )
  print(
    f'| {program.name} | {total / _MIB:,.0f} of {gibibytes * 1024:,} | '
    f'{flops / 1e9:,.1f} | {moved / 1e9:,.2f} | {ideal * 1e3:,.2f} | {largest} '
    f'| {seconds:.0f} |',
    flush=True,
  )
  hbm = gibibytes * 2**30
  return list(_problems(compiled, total, hbm, traffic, program.forbidden))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--topology', default='v5e:2x4', help='chip and shape: v5e:2x4, v4:2x2x2'
  )
  parser.add_argument('--only', default='', help='programs that match this')
  parser.add_argument('--dataset', default='sop', choices=_DATASETS)
  parser.add_argument('--list', action='store_true', help='lists the programs')
  arguments = parser.parse_args()
  found = [
    program
    for program in programs(arguments.dataset)
    if re.search(arguments.only, program.name)
  ]
  if arguments.list:
    print(*(program.name for program in found), sep='\n')
    return
  name = arguments.topology.split(':')[0]
  if name not in _CHIPS:
    sys.exit(
      f'Unknown chip {name!r} (--topology): choose one of {", ".join(_CHIPS)}, '
      'and a shape, such as v5e:2x4.'
    )
  try:
    topology = topologies.get_topology_desc(arguments.topology, 'tpu')
  except Exception as error:  # Whatever the plugin or its absence raises.
    sys.exit(
      f'No compiler for {arguments.topology} ({error}): '
      "pip install 'jax[tpu]', and give a shape that the chip has."
    )
  devices = topology.devices
  print(
    f'{arguments.topology}: {len(devices)} x {devices[0].device_kind}, jax '
    f'{jax.__version__}; for each chip\n\n'
    '| program | MiB | Gflop | GB | ms at peak | largest collective | seconds '
    '|\n| --- | --- | --- | --- | --- | --- | --- |'
  )
  problems = []
  for program in found:
    number = program.num_devices or len(devices)
    if number > len(devices):
      continue
    mesh = mesh_lib.make_mesh(devices[:number])
    problems += [
      f'{program.name}: {problem}'
      for problem in report(program, mesh, _CHIPS[name])
    ]
  if problems:
    print()
    sys.exit('\n'.join(problems))


if __name__ == '__main__':
  main()
