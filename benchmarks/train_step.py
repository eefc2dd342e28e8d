"""Measures the training step: speed, utilization, memory; also in PyTorch.

python benchmarks/train_step.py [--models=resnet50,bn_inception,vit_s16]
  [--dtypes=bfloat16,float32] [--proxies=11318,1000000] [--batch_size=0]
  [--image_size=0] [--steps=20] [--rounds=3] [--proxy_chunk=0]
  [--peak_tflops=0] [--peer=compiled]

Runs the trainer's step (train_step.make_train_step) with the softmax form of
Proxy-NCA and Adam, on one device and one batch of random images that stays
there; with 11,318 proxies, the train classes of Stanford Online Products (SOP),
and with a million. Networks, image sizes, batch sizes and embeddings are those
of ProxyNCA++ on SOP, Proxy-NCA and HIER in configs/recipes.py, and those of
configs/image_folder.py for efficientnet_lite0 and of configs/glyphs.py for
small_cnn; a size of 0 selects theirs.
Columns:

  ms, images/s   medians over the rounds, per step
  TFLOP/s, used  operations of the step, counted by XLA before optimization,
                 per second; and as a fraction of the device's peak
  planned        MiB of arguments, results and temporaries (memory_analysis)
  peak           largest MiB in use (memory_stats), if the device reports it
  compile        seconds to trace and compile

Each row is measured in a separate process. `--peer` adds the same step in
PyTorch: torchvision's, timm's or Cadene's network, channels last, autocast for
bfloat16, the loss in plain torch, Adam, and torch.compile (--peer=eager omits
it). Unlike ours, that step computes no metrics beside the loss. Its compile
time is the time of the first step. On CPUs both sides get huge pages, as the
training command does; GLIBC_TUNABLES=glibc.malloc.hugetlb=0 withholds them.

Needs jax, flax, optax, chex, scipy, orbax-checkpoint, huggingface-hub and
safetensors, none of the project's other requirements, and no dataset. `--peer`
needs: pip install torch torchvision timm pretrainedmodels munch six
"""

import argparse
import functools
import math
import multiprocessing
import pathlib
import statistics
import sys
import time
from concurrent import futures
from concurrent.futures import process

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from proxy_nca_jax import losses, train_step
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.models import backbones, embedding
from proxy_nca_jax.runtime import huge_pages

# Batch, image size, pooling, LayerNorm, dimensions.
RECIPES = {
  'resnet50': (192, 256, 'max', True, 2048),
  'bn_inception': (32, 227, 'average', False, 64),
  'vit_s16': (180, 224, 'cls', True, 384),
  'efficientnet_lite0': (32, 224, 'average', False, 512),
  'small_cnn': (64, 32, 'average', False, 64),
}
_TEMPERATURE = 1 / 9

# Peak TFLOP/s of dense matrix products of one device: in bfloat16, and in JAX's
# default precision for float32, which is TF32 on GPUs and bfloat16 on TPUs. The
# first name contained in the device's name is used. Sources: NVIDIA's data
# sheets, whose numbers with sparsity are halved, and the system architecture
# pages of https://cloud.google.com/tpu/docs.
_PEAKS = {
  'H100 PCIe': (756, 378),
  'H100': (989, 495),
  'H200': (989, 495),
  'A100': (312, 156),
  'L40S': (362, 183),
  'L4': (121, 60),
  'TPU v4': (275, 275),
  'TPU v5 lite': (197, 197),
  'TPU v5': (459, 459),
  'TPU v6': (918, 918),
}


def find_peak(device_kind: str, dtype: str) -> float:
  """Returns the peak TFLOP/s, or NaN if the device is not in the table."""
  for name, peaks in _PEAKS.items():
    if name in device_kind:
      return peaks[dtype == 'float32']
  return math.nan


def make_batch(
  batch_size: int, size: int, num_proxies: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns random images and labels."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch_size, size, size, 3), np.uint8)
  return images, rng.integers(0, num_proxies, batch_size).astype(np.int32)


def make_state(model, optimizer, size, *, num_proxies, dim):
  """Initializes as the trainer does, in one program."""

  @jax.jit
  def init():
    model_key, proxies_key = jax.random.split(jax.random.key(0))
    variables = model.init(
      model_key, jnp.zeros((1, size, size, 3)), train=False
    )
    params = variables.pop('params')
    params['proxies'] = jax.random.normal(proxies_key, (num_proxies, dim))
    return state_lib.TrainState(
      step=jnp.int32(0),
      params=params,
      loss_state={},
      model_state=variables,
      averages={},
      skipped_steps=jnp.int32(0),
      skipped_in_row=jnp.int32(0),
      opt_state=optimizer.init(params),
    )

  return init()


def make_model(name: str, dtype: str, size: int):
  """Returns the network of a recipe, for images of `size` pixels."""
  _, _, pooling, layer_norm, dim = RECIPES[name]
  return embedding.EmbeddingModel(
    functools.partial(
      backbones.make_backbone,
      name,
      dtype=jnp.dtype(dtype),
      remat=False,
      batch_norm_momentum=0.9,
      width=64,
    ),
    functools.partial(
      embedding.Head,
      pooling=pooling,
      layer_norm=layer_norm,
      num_hidden=0,
      embedding_dim=dim,
      normalize=True,
      stddev=0.0,
    ),
    mean=(127.5,) * 3,
    std=(127.5,) * 3,
    is_bgr=False,
    input_shape=(size, size, 3),
  )


def measure(row, *, steps: int, rounds: int, proxy_chunk: int) -> dict:
  """Measures one row: (model, dtype, batch_size, image_size, num_proxies)."""
  name, dtype, batch_size, size, num_proxies = row
  dim = RECIPES[name][-1]
  model = make_model(name, dtype, size)
  optimizer = optax.adam(1e-5)
  fn = functools.partial(
    losses.proxy_nca_pp_loss,
    temperature=_TEMPERATURE,
    proxy_chunk=proxy_chunk or None,
  )
  step = train_step.make_train_step(
    model,
    optimizer,
    losses.LOSSES['proxy_nca_pp']._replace(fn=fn),
  )
  state = make_state(model, optimizer, size, num_proxies=num_proxies, dim=dim)
  images, labels = make_batch(batch_size, size, num_proxies)
  batch = jax.device_put({'image': images, 'label': labels})
  start = time.perf_counter()
  lowered = step.lower(state, batch)
  compiled = lowered.compile()
  result = {'compile': time.perf_counter() - start}

  def run(num_steps):
    nonlocal state
    for _ in range(num_steps):
      state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))

  result['ms'] = time_steps(run, steps=steps, rounds=rounds)
  memory = compiled.memory_analysis()
  planned = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  return result | {
    'flops': lowered.cost_analysis()['flops'],
    'planned': planned,
    'peak': stats.get('peak_bytes_in_use', math.nan),
    'device': device.device_kind,
  }


def time_steps(run, *, steps: int, rounds: int) -> float:
  """Returns the median over the rounds, in milliseconds per step."""
  run(2)
  seconds = []
  for _ in range(rounds):
    start = time.perf_counter()
    run(steps)
    seconds.append(time.perf_counter() - start)
  return 1e3 * statistics.median(seconds) / steps


def make_peer(
  name: str, size: int, *, pooling: str, layer_norm: bool, dim: int
):
  """Returns the network in torch; its input is [batch, 3, height, width]."""
  import torch
  from torch.nn import functional

  if name == 'resnet50':
    import torchvision

    net = torchvision.models.resnet50(weights=None)
    # Without the pooling and the classifier.
    backbone, width = torch.nn.Sequential(*list(net.children())[:-2]), 2048
  elif name == 'efficientnet_lite0':
    import timm

    net = timm.create_model('tf_efficientnet_lite0', num_classes=0)
    net.forward = net.forward_features
    backbone, width = net, 1280
  elif name == 'bn_inception':
    import pretrainedmodels

    net = pretrainedmodels.bninception(pretrained=None)
    net.forward = net.features
    # Removes the classifier, whose parameters would get no gradients.
    net.last_linear = torch.nn.Identity()
    backbone, width = net, 1024
  elif name == 'small_cnn':
    layers, width = [], 3
    for number in range(6):
      before, width = width, 64 * 2 ** (number // 2)
      layers += [
        torch.nn.Conv2d(before, width, 3, 2 - number % 2, 1, bias=False),
        torch.nn.BatchNorm2d(width),
        torch.nn.ReLU(inplace=True),
      ]
    backbone = torch.nn.Sequential(*layers)
  else:
    import timm

    net = timm.create_model(
      'vit_small_patch16_224', num_classes=0, img_size=size
    )
    net.forward = net.forward_features
    backbone, width = net, 384

  class Peer(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.backbone = backbone
      self.embedding = torch.nn.Linear(width, dim)

    def forward(self, images):
      features = self.backbone(images)
      if pooling == 'cls':
        pooled = features[:, 0]
      elif pooling == 'max':
        pooled = features.amax((2, 3))
      else:
        pooled = features.mean((2, 3))
      if layer_norm:
        pooled = functional.layer_norm(pooled.float(), (width,))
      return functional.normalize(self.embedding(pooled).float())

  return Peer()


def measure_peer(row, *, steps: int, rounds: int, mode: str) -> dict:
  """Measures the same row in PyTorch."""
  import torch
  from torch.nn import functional

  name, dtype, batch_size, size, num_proxies = row
  _, _, pooling, layer_norm, dim = RECIPES[name]
  is_gpu = torch.cuda.is_available()
  device = torch.device('cuda' if is_gpu else 'cpu')
  torch.manual_seed(0)
  # JAX's default precision: TF32 for float32, on GPUs that have it.
  torch.set_float32_matmul_precision('high')
  torch.backends.cudnn.benchmark = True
  net = (
    make_peer(name, size, pooling=pooling, layer_norm=layer_norm, dim=dim)
    .to(device, memory_format=torch.channels_last)
    .train()
  )
  proxies = torch.nn.Parameter(torch.randn(num_proxies, dim, device=device))
  optimizer = torch.optim.Adam([*net.parameters(), proxies], lr=1e-5)
  images, labels = make_batch(batch_size, size, num_proxies)
  # The permuted images already have the strides of channels_last.
  images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
  labels = torch.from_numpy(labels).long().to(device)

  def mean_loss(images, labels):
    scaled = (images.float() - 127.5) / 127.5
    with torch.autocast(
      device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16'
    ):
      embeddings = net(scaled)
    # In float32, as ours.
    cosines = embeddings.float() @ functional.normalize(proxies).T
    return functional.cross_entropy(2 / _TEMPERATURE * cosines, labels)

  if mode == 'compiled':
    mean_loss = torch.compile(mean_loss)

  def run(num_steps):
    for _ in range(num_steps):
      optimizer.zero_grad()
      mean_loss(images, labels).backward()
      optimizer.step()
    if is_gpu:
      torch.cuda.synchronize()

  start = time.perf_counter()
  run(1)
  compile_seconds = time.perf_counter() - start
  milliseconds = time_steps(run, steps=steps, rounds=rounds)
  peak = torch.cuda.max_memory_allocated() if is_gpu else math.nan
  return {'ms': milliseconds, 'compile': compile_seconds, 'peak': peak}


def run_in_process(fn, *args, **kwargs):
  """Calls fn in a new process; returns its result or its exception."""
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    future = pool.submit(fn, *args, **kwargs)
    error = future.exception()
    if isinstance(error, process.BrokenProcessPool):
      return MemoryError('the process was killed, possibly for lack of memory')
    return error or future.result()


def format_cells(cells) -> str:
  texts = []
  for width, digits, value in cells:
    text = 'unknown' if math.isnan(value) else f'{value:,.{digits}f}'
    texts.append(f'{text:>{width}}')
  return ''.join(texts)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, value, text in (
    ('models', ','.join(RECIPES), 'networks to measure'),
    ('dtypes', 'bfloat16,float32', 'compute dtypes of the backbone'),
    ('proxies', '11318,1000000', 'numbers of proxies'),
  ):
    parser.add_argument(f'--{name}', default=value, help=text)
  for name, value, text in (
    ('batch_size', 0, 'batch size; 0 is that of the recipe'),
    ('image_size', 0, 'image side in pixels; 0 is that of the recipe'),
    ('steps', 20, 'steps of each measurement'),
    ('rounds', 3, 'repetitions of each measurement'),
    ('proxy_chunk', 0, 'proxies to compare with at a time; 0 is all'),
  ):
    parser.add_argument(f'--{name}', type=int, default=value, help=text)
  parser.add_argument(
    '--peak_tflops',
    type=float,
    default=0.0,
    help="peak of the device; 0 looks it up by the device's name",
  )
  parser.add_argument(
    '--peer',
    nargs='?',
    const='compiled',
    choices=('compiled', 'eager'),
    help='also measure PyTorch, with or without torch.compile',
  )
  arguments = parser.parse_args()
  timing = {'steps': arguments.steps, 'rounds': arguments.rounds}
  print(
    f'jax {jax.__version__}; {arguments.rounds} rounds of '
    f'{arguments.steps} steps'
  )
  titles = (
    (10, 'ms'),
    (10, 'images/s'),
    (9, 'TFLOP/s'),
    (9, 'used %'),
    (10, 'planned'),
    (10, 'peak'),
    (9, 'compile'),
  )
  if arguments.peer:
    titles += (
      (10, 'torch ms'),
      (8, 'faster'),
      (12, 'torch peak'),
      (14, 'torch compile'),
    )
  row_title = 'model, dtype, batch, pixels, proxies'
  print(f'{row_title:50}' + ''.join(f'{t:>{width}}' for width, t in titles))
  for name in arguments.models.split(','):
    for dtype in arguments.dtypes.split(','):
      for num_proxies in map(int, arguments.proxies.split(',')):
        batch_size, size, *_ = RECIPES[name]
        batch_size = arguments.batch_size or batch_size
        row = (
          name,
          dtype,
          batch_size,
          arguments.image_size or size,
          num_proxies,
        )
        print(f'{", ".join(map(str, row)):50}', end='', flush=True)
        ours = run_in_process(
          measure, row, proxy_chunk=arguments.proxy_chunk, **timing
        )
        if isinstance(ours, BaseException):
          print(f'  {type(ours).__name__}: {str(ours).splitlines()[:1]}')
          continue
        rate = ours['flops'] / ours['ms'] / 1e9
        peak = arguments.peak_tflops or find_peak(ours['device'], dtype)
        cells = [
          (10, 2, ours['ms']),
          (10, 1, 1e3 * batch_size / ours['ms']),
          (9, 2, rate),
          (9, 1, 100 * rate / peak),
          (10, 0, ours['planned'] / 2**20),
          (10, 0, ours['peak'] / 2**20),
          (9, 1, ours['compile']),
        ]
        print(format_cells(cells), end='', flush=True)
        if arguments.peer:
          peer = run_in_process(
            measure_peer, row, mode=arguments.peer, **timing
          )
          if isinstance(peer, BaseException):
            print(f'  {type(peer).__name__}: {str(peer).splitlines()[:1]}')
            continue
          print(
            format_cells(
              [
                (10, 2, peer['ms']),
                (8, 2, peer['ms'] / ours['ms']),
                (12, 0, peer['peak'] / 2**20),
                (14, 1, peer['compile']),
              ]
            ),
            end='',
          )
        print(flush=True)


if __name__ == '__main__':
  huge_pages.restart()
  main()
