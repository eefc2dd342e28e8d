"""Published training recipes, one function each.

The suffix of a dataset's config selects one:
`--config=configs/cub200.py:proxynca_pp`. Flags such as `--config.num_steps`
override its fields. Each docstring gives the source of every number and says
which numbers have none. An epoch is `num_images // batch_size` steps, and each
run is evaluated about ten times. The user's own images, whose number is not
known yet, get the numbers of CUB, and periods in epochs.
"""

import math

import ml_collections

# Name and weights of each network. Those of BN-Inception are a file from
# Cadene's pretrained-models.pytorch, ported from Caffe.
_BN_INCEPTION = ('bn_inception', 'bn_inception-52deb4733.pth')
_RESNET50 = ('resnet50', 'timm/resnet50.tv_in1k')
_DINO = ('dino_s16', 'timm/vit_small_patch16_224.dino')


def apply(
  recipe: str,
  config: ml_collections.ConfigDict,
  *,
  num_images: int | None,
) -> ml_collections.ConfigDict:
  """Applies a recipe to a config in place.

  Args:
    recipe: a key of `RECIPES`.
    config: the config to change; its `dataset.name` must be set.
    num_images: number of train images; None if it is known only once the
      data is loaded.

  Returns:
    The same config, locked.

  Raises:
    ValueError: if the recipe is unknown.
  """
  if recipe not in RECIPES:
    raise ValueError(
      f'Unknown recipe {recipe!r} (--config=configs/{config.dataset.name}.py:'
      f'RECIPE): choose one of {", ".join(RECIPES)}.'
    )
  RECIPES[recipe](config, num_images=num_images)
  return config.lock()


def paper(config, *, num_images):
  """Proxy-NCA, https://arxiv.org/abs/1703.07464.

  From the paper, partly as quoted by others: BN-Inception, 64 dimensions,
  images resized to squares of 256 pixels and cropped to 227, batches of 32,
  RMSprop, and a learning rate decay of 0.94. From its author: Xavier
  initialization of the proxies (dichotomies/proxy-nca, issue 9).

  The paper gives no learning rate, number of steps or temperature. The learning
  rates, their decay every epoch, and 20 epochs come from dichotomies/proxy-nca,
  whose best epochs on CUB, Cars and SOP are 15 to 17. RMSprop's decay of 0.9
  and eps of 1 trained Inception-v4 at the same learning rate of 0.045
  (https://arxiv.org/abs/1602.07261, section 4). The temperature of 1/9 is
  ProxyNCA++'s.
  """
  config.batch_size = 32
  config.dataset.resize = 256
  config.dataset.image_size = 227
  config.model.name, config.model.init_from = _BN_INCEPTION
  config.model.embedding_dim = 64
  config.proxies.init = 'xavier'
  config.optimizer.name = 'rmsprop'
  config.optimizer.momentum = 0.0
  config.optimizer.rms_decay = 0.9
  steps = _set_epochs(config, 20, num_images=num_images)
  _set_dichotomies_learning_rates(config, steps)


def dichotomies(config, *, num_images):
  """The established reimplementation, dichotomies/proxy-nca at ad9880a.

  Numbers come from its README and config.json. It does not train on In-Shop,
  which gets the numbers of SOP. It scales embeddings and proxies by 3 and 3 (on
  SOP by 1 and 8), which equals a temperature of 1/9 (1/8). Its proxies are
  normal variates divided by 8, whose norm is about 1, and the new layer is
  initialized with a standard deviation of 0.001.
  """
  is_large = config.dataset.name in ('sop', 'inshop')
  config.batch_size = 32
  _crop_originals(config, resize=256, image_size=227)
  config.model.name, config.model.init_from = _BN_INCEPTION
  config.model.embedding_dim = 64
  config.model.embedding_stddev = 0.001
  config.model.batch_norm_momentum = 0.1  # Its port's; 0.9 as torch counts.
  config.loss.proxy_nca.temperature = 1 / 8 if is_large else 1 / 9
  config.loss.proxy_nca.positive_in_denominator = True
  config.loss.proxy_nca.label_smoothing = 0.1
  config.optimizer.name = 'adam'
  epochs = 20 if _numbers_of(config) == 'cub200' else 50
  steps = _set_epochs(config, epochs, num_images=num_images)
  _set_dichotomies_learning_rates(config, steps)


def _set_dichotomies_learning_rates(config, steps):
  is_large = config.dataset.name in ('sop', 'inshop')
  config.optimizer.eps = 1.0
  learning_rates = {
    'backbone': 0.045,
    'head': 0.045,
    'proxies': 10.0 if is_large else 1.0,
  }
  for name, learning_rate in learning_rates.items():
    group = config.optimizer[name]
    group.learning_rate = learning_rate
    group.schedule = 'exponential'
    group.decay_rate = 0.94
    group.decay_every = steps


def proxynca_pp(config, *, num_images, embedding_dim=2048):
  """ProxyNCA++, https://arxiv.org/abs/2004.01113, from euwern/proxynca_pp.

  Numbers come from its config/*.json and train.py: the softmax form at a
  temperature of 1/9, max pooling, LayerNorm without parameters, class-balanced
  batches, fast proxies, and five extra epochs at the start with a frozen
  backbone. Proxies are normal variates divided by 8. Differences: the original
  computes partly in float16 and scores embeddings without normalizing them.

  The original decays the learning rates at epochs that a first run finds by
  training on half of the classes:

    --config.dataset.validation=2/2 --config.evaluation.select_by=harmonic_mean
    --config.optimizer.plateau_factor=0.1 --config.eval_every=EPOCH

  A second run trains on all classes with `schedule='step'`, `decay_rate=0.1`
  and those epochs in `decay_at`. The epochs are not published, so the learning
  rates are constant here, as in the author's recipe for In-Shop (issue 10).
  """
  epochs, batch_size, images_per_class, learning_rate, proxies_learning_rate = {
    'cub200': (40, 32, 4, 4e-3, 4e2),
    'cars196': (40, 32, 4, 4e-3, 4e2),
    'sop': (80, 192, 3, 2.4e-2, 2.4e2),
    'inshop': (80, 192, 3, 2.4e-2, 2.4e3),
  }[_numbers_of(config)]
  config.batch_size = batch_size
  config.dataset.images_per_class = images_per_class
  _crop_originals(config, resize=288, image_size=256)
  config.model.name, config.model.init_from = _RESNET50
  config.model.pooling = 'max'
  config.model.layer_norm = True
  config.model.embedding_dim = embedding_dim
  config.loss.proxy_nca.positive_in_denominator = True
  config.proxies.init_norm = math.sqrt(embedding_dim) / 8
  config.optimizer.name = 'adam'
  config.optimizer.eps = 1.0
  steps = _set_epochs(config, 5 + epochs, num_images=num_images)
  config.optimizer.backbone.freeze_steps = 5 * steps
  config.optimizer.backbone.learning_rate = learning_rate
  config.optimizer.head.learning_rate = learning_rate
  config.optimizer.proxies.learning_rate = proxies_learning_rate
  config.optimizer.backbone.clip_value = 10.0
  config.optimizer.head.clip_value = 10.0


def proxynca_pp_512(config, *, num_images):
  """ProxyNCA++ with 512 dimensions.

  The paper also reports results for 512 dimensions, but no recipe for them is
  published. The other numbers are those for 2,048 dimensions, without a source.
  """
  proxynca_pp(config, num_images=num_images, embedding_dim=512)


def proxy_anchor(config, *, num_images):
  """Proxy-Anchor, https://arxiv.org/abs/2003.13911, from its code.

  Numbers come from tjddus9597/Proxy-Anchor-CVPR2020: the commands for
  BN-Inception in its README, and the defaults of its code/train.py. It pools by
  the sum of average and maximum, applies weight decay to all parameters, and
  trains only the new layers in the first epoch.
  """
  learning_rate, has_frozen_norms, decay_epochs, decay_rate = {
    'cub200': (1e-4, True, 10, 0.5),
    'cars196': (1e-4, True, 20, 0.5),
    'sop': (6e-4, False, 20, 0.25),
    'inshop': (6e-4, False, 20, 0.25),
  }[_numbers_of(config)]
  config.batch_size = 180
  _crop_originals(config, resize=256, image_size=224)
  config.model.name, config.model.init_from = _BN_INCEPTION
  config.model.pooling = 'average_max'
  config.model.embedding_dim = 512
  config.model.batch_norm_momentum = 0.1  # Its port's; 0.9 as torch counts.
  config.model.freeze_batch_norm_steps = -1 if has_frozen_norms else 0
  config.loss.name = 'proxy_anchor'
  config.loss.proxy_anchor.alpha = 32.0
  config.loss.proxy_anchor.margin = 0.1
  config.proxies.init = 'kaiming'  # By fan_out.
  config.optimizer.name = 'adamw'
  config.optimizer.decay_vectors = True
  steps = _set_epochs(config, 60, num_images=num_images)
  config.optimizer.backbone.freeze_steps = steps
  learning_rates = {
    'backbone': learning_rate,
    'head': learning_rate,
    'proxies': 100 * learning_rate,
  }
  for name, learning_rate in learning_rates.items():
    group = config.optimizer[name]
    group.learning_rate = learning_rate
    group.weight_decay = 1e-4
    group.clip_value = 10.0
    group.schedule = 'step'
    group.decay_rate = decay_rate
    # A group's schedule counts steps from the end of its freeze.
    group.decay_at = tuple(
      epoch * steps - group.freeze_steps
      for epoch in range(decay_epochs, 60, decay_epochs)
    )


def vit(config, *, num_images):
  """A vision transformer (DINO's ViT-S/16) with the softmax form.

  No paper publishes this combination. Images, network, batches and optimizer
  are those of HIER (https://arxiv.org/abs/2212.14258) for the same network,
  from the scripts and hier/train.py of tjddus9597/HIER-CVPR23: bicubic
  resizing, class token, LayerNorm without parameters, batches of 90 classes
  with two images each, AdamW at 5e-6 with 10,000 times that for the proxies,
  and only the new layers trained in the first epochs. Differences: HIER's loss
  is a hyperbolic Proxy-Anchor with a regularizer, its gradients are float16
  with an eps of 1e-4 to match, and it freezes the network's first layer.

  384 dimensions are those of HIER's table; its scripts use 128. The temperature
  is ProxyNCA++'s; no source gives one for a transformer.

  To train DINOv2 instead, for which no result is published:

    --config.model.name=dinov2_s14
    --config.model.init_from=timm/vit_small_patch14_dinov2.lvd142m
  """
  is_large = config.dataset.name in ('sop', 'inshop')
  config.batch_size = 180
  config.dataset.images_per_class = 2
  _crop_originals(config, resize=256, image_size=224)
  config.dataset.crop_scale = (0.2, 1.0)
  config.dataset.interpolation = 'bicubic'
  config.model.name, config.model.init_from = _DINO
  config.model.pooling = 'cls'
  config.model.layer_norm = True
  config.model.embedding_dim = 384
  config.loss.proxy_nca.positive_in_denominator = True
  config.proxies.init = 'kaiming'  # By fan_out.
  config.optimizer.name = 'adamw'
  config.optimizer.decay_vectors = True
  steps = _set_epochs(config, 150 if is_large else 100, num_images=num_images)
  config.optimizer.backbone.freeze_steps = (5 if is_large else 1) * steps
  learning_rate = 5e-6
  learning_rates = {
    'backbone': learning_rate,
    'head': (100 if is_large else 1) * learning_rate,
    'proxies': 1e4 * learning_rate,
  }
  for name, learning_rate in learning_rates.items():
    group = config.optimizer[name]
    group.learning_rate = learning_rate
    group.weight_decay = 1e-4 if is_large else 1e-2
    group.clip_value = 10.0


def foundation(config, *, num_images):
  """A pretrained transformer of today: a linear probe, then gentle fine-tuning.

  No result of this recipe is published, and none was measured here. The report
  shows the scores of the frozen features beside those after training.

  The network is DINOv2's ViT-B/14 with registers, which is under Apache-2.0.
  `proxy-nca models` lists the others; one flag selects one, with its weights
  and its pooling:

    --config.model.name=dinov3_b16

  Learning rates (1e-5, ten times that for the proxies), their schedule (warm-up
  for a tenth of the steps, then cosine), no weight decay, batches of 64 and the
  scale of the softmax (32, a temperature of 1/16) are those of UNICOM, whose
  ViT-B/16 reaches 88.8% on SOP and 95.5% on In-Shop (deepglint/unicom: its
  docs, unicom/scripts and retrieval.py). So are 64 and 128 epochs on these; 32
  elsewhere are that program's default. Its loss has a margin, and its network
  another head. Images are those of `vit`. 384 dimensions are HIER's, and no
  transformer of that table has fewer features. The layer decay
  of 0.65 is MAE's for ViT-B (facebookresearch/mae, FINETUNE.md; for ViT-L
  0.75). bfloat16 is for accelerators; on a CPU, set model.dtype to float32.

  Head and proxies start from the features, as in configs/image_folder.py, and
  are then trained on them for 1,000 steps; that number has no source.

  To train LoRA's matrices instead of the weights, with a rank of 8 and a
  learning rate that have no source:

    --config.model.lora_rank=8 --config.optimizer.layer_decay=1
    --config.optimizer.backbone.learning_rate=1e-4
  """
  epochs = {'sop': 64, 'inshop': 128}.get(config.dataset.name, 32)
  config.batch_size = 64
  _crop_originals(config, resize=256, image_size=224)
  config.dataset.crop_scale = (0.2, 1.0)
  config.dataset.interpolation = 'bicubic'
  config.model.name = 'dinov2_b14_reg'
  config.model.init_from = 'published'
  config.model.pooling = 'published'
  config.model.embedding_dim = 384
  config.model.head_init = 'lda'
  config.model.dtype = 'bfloat16'
  config.head_steps = 1000
  config.proxies.init = 'class_means'
  config.loss.proxy_nca.temperature = 1 / 16
  config.loss.proxy_nca.positive_in_denominator = True
  config.optimizer.name = 'adamw'
  config.optimizer.layer_decay = 0.65
  steps = _set_epochs(config, epochs, num_images=num_images)
  learning_rate = 1e-5
  learning_rates = {
    'backbone': learning_rate,
    'head': learning_rate,
    'proxies': 10 * learning_rate,
  }
  for name, learning_rate in learning_rates.items():
    group = config.optimizer[name]
    group.learning_rate = learning_rate
    group.schedule = 'cosine'
    group.warmup_steps = epochs // 10 * steps


def _numbers_of(config) -> str:
  """Returns the dataset whose numbers a recipe takes."""
  name = config.dataset.name
  return 'cub200' if name == 'image_folder' else name


def _crop_originals(config, *, resize, image_size):
  """Trains on random crops of the originals; tests on resized center crops."""
  config.dataset.crop = 'random_resized'
  config.dataset.resize = resize
  config.dataset.resize_mode = 'shorter'
  config.dataset.image_size = image_size


def _set_epochs(config, epochs, *, num_images) -> int:
  """Sets the length and eval_every; returns an epoch in the unit of periods."""
  if num_images is None:
    config.num_steps = 0
    config.num_epochs = float(epochs)
    config.period_unit = 'epoch'
    config.eval_every = epochs // 10
    return 1
  steps = num_images // config.batch_size
  config.num_steps = epochs * steps
  config.eval_every = epochs // 10 * steps
  return steps


RECIPES = {
  'paper': paper,
  'dichotomies': dichotomies,
  'proxynca_pp': proxynca_pp,
  'proxynca_pp_512': proxynca_pp_512,
  'proxy_anchor': proxy_anchor,
  'vit': vit,
  'foundation': foundation,
}
