"""The published recipes: how each paper, or its code, trains on a data set.

A data set's config takes the name of one after a colon,
`--config=configs/cub200.py:proxynca_pp`, and what follows on the command line
changes it further. Each function below says where its numbers come from, and
which of them have no source. Steps are epochs of `num_images // batch_size`,
and a run is scored about ten times.
"""

import math

import ml_collections

# Name and weights of the networks. Those of BN-Inception are a file of Cadene's
# pretrained-models.pytorch, ported from Caffe.
_BN_INCEPTION = ('bn_inception', 'bn_inception-52deb4733.pth')
_RESNET50 = ('resnet50', 'timm/resnet50.tv_in1k')
_DINO = ('dino_s16', 'timm/vit_small_patch16_224.dino')


def apply(
  recipe: str,
  config: ml_collections.ConfigDict,
  *,
  num_images: int,
  num_classes: int,
) -> ml_collections.ConfigDict:
  """Sets the fields of a recipe.

  Args:
    recipe: its name.
    config: with `dataset.name`; is changed.
    num_images: to train on.
    num_classes: to train on.

  Returns:
    The config, locked.

  Raises:
    ValueError: if the recipe is unknown.
  """
  if recipe not in RECIPES:
    raise ValueError(
      f'Unknown recipe {recipe!r} (--config=configs/{config.dataset.name}.py:'
      f'RECIPE): choose one of {", ".join(RECIPES)}.'
    )
  RECIPES[recipe](config, num_images=num_images, num_classes=num_classes)
  return config.lock()


def paper(config, *, num_images, num_classes):
  """Proxy-NCA, https://arxiv.org/abs/1703.07464.

  BN-Inception, 64 dimensions, squares of 256 pixels cropped to 227, batches of
  32, RMSprop and a decay by 0.94 are the paper's, partly as others relay them.
  By its author, proxies begin as Xavier's (dichotomies/proxy-nca, issue 9).

  The paper gives no learning rate, length or temperature. Rates, an epoch for
  the decay, and 20 epochs are those of dichotomies/proxy-nca, whose best epochs
  on CUB, Cars and SOP are 15 to 17. RMSprop's decay of 0.9 and eps of 1 are
  those that Inception-v4 was trained with, at the same rate of 0.045
  (https://arxiv.org/abs/1602.07261, section 4). 1/9 is ProxyNCA++'s.
  """
  config.batch_size = 32
  config.dataset.resize = 256
  config.dataset.image_size = 227
  config.model.name, config.model.init_from = _BN_INCEPTION
  config.model.embedding_dim = 64
  # Xavier's variance is 2 / (dimensions + classes).
  config.proxies.init_norm = math.sqrt(2 * 64 / (64 + num_classes))
  config.optimizer.name = 'rmsprop'
  config.optimizer.momentum = 0.0
  config.optimizer.rms_decay = 0.9
  steps = _set_epochs(config, 20, num_images=num_images)
  _set_dichotomies_rates(config, steps)


def dichotomies(config, *, num_images, num_classes):
  """The reimplementation of record, dichotomies/proxy-nca at ad9880a.

  Numbers are of its README and config.json; those for In-Shop, which it does
  not train on, are SOP's. The factors 3 and 3 (on SOP 1 and 8) of embeddings
  and proxies are a temperature of 1/9 (1/8). Its proxies are normals divided by
  8, of norm 1, and the new layer begins with a standard deviation of 0.001.
  """
  del num_classes
  is_large = config.dataset.name in ('sop', 'inshop')
  config.batch_size = 32
  _crop_originals(config, resize=256, image_size=227)
  config.model.name, config.model.init_from = _BN_INCEPTION
  config.model.embedding_dim = 64
  config.model.embedding_stddev = 0.001
  config.model.batch_norm_momentum = 0.1  # Its port's, 0.9 in torch's terms.
  config.loss.proxy_nca.temperature = 1 / 8 if is_large else 1 / 9
  config.loss.proxy_nca.positive_in_denominator = True
  config.loss.proxy_nca.label_smoothing = 0.1
  config.optimizer.name = 'adam'
  epochs = 20 if config.dataset.name == 'cub200' else 50
  steps = _set_epochs(config, epochs, num_images=num_images)
  _set_dichotomies_rates(config, steps)


def _set_dichotomies_rates(config, steps):
  is_large = config.dataset.name in ('sop', 'inshop')
  config.optimizer.eps = 1.0
  rates = {'backbone': 0.045, 'head': 0.045, 'proxies': 10 if is_large else 1}
  for name, rate in rates.items():
    group = config.optimizer[name]
    group.learning_rate = float(rate)
    group.schedule = 'exponential'
    group.decay_rate = 0.94
    group.decay_every = steps


def proxynca_pp(config, *, num_images, num_classes, embedding_dim=2048):
  """ProxyNCA++, https://arxiv.org/abs/2004.01113, as of euwern/proxynca_pp.

  Numbers are of its config/*.json and train.py: softmax form of temperature
  1/9, maximum pooling, LayerNorm without parameters, class-balanced batches,
  fast proxies, and five epochs before the others in which the backbone waits.
  Proxies are normals divided by 8. Its networks compute in float16 in part, and
  its embeddings are scored without projection to the sphere.

  The rates fall there at epochs that a first run finds, on half of the classes:

    --config.dataset.validation=2/2 --config.evaluation.select_by=harmonic_mean
    --config.optimizer.plateau_factor=0.1 --config.eval_every=EPOCH

  and then on all of them with `schedule='step'`, `decay_rate=0.1` and those
  epochs as `decay_at`. They are not published, so that here the rates stay; on
  In-Shop that is the author's recipe (issue 10).
  """
  del num_classes
  epochs, batch_size, images_per_class, rate, proxies_rate = {
    'cub200': (40, 32, 4, 4e-3, 4e2),
    'cars196': (40, 32, 4, 4e-3, 4e2),
    'sop': (80, 192, 3, 2.4e-2, 2.4e2),
    'inshop': (80, 192, 3, 2.4e-2, 2.4e3),
  }[config.dataset.name]
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
  config.optimizer.backbone.learning_rate = rate
  config.optimizer.head.learning_rate = rate
  config.optimizer.proxies.learning_rate = proxies_rate
  config.optimizer.backbone.clip_value = 10.0
  config.optimizer.head.clip_value = 10.0


def proxynca_pp_512(config, *, num_images, num_classes):
  """ProxyNCA++ in 512 dimensions.

  Its paper gives results in 512 dimensions as well. Their recipe is not in the
  code: all but the dimensions is that of 2,048, without a source.
  """
  proxynca_pp(
    config, num_images=num_images, num_classes=num_classes, embedding_dim=512
  )


def proxy_anchor(config, *, num_images, num_classes):
  """Proxy-Anchor, https://arxiv.org/abs/2003.13911, as of its code.

  Numbers are of tjddus9597/Proxy-Anchor-CVPR2020: the commands of its README
  for BN-Inception, and the defaults of its code/train.py. It pools by the sum
  of average and maximum, decays all parameters, and trains the new layers alone
  in the first epoch.
  """
  rate, has_frozen_norms, decay_epochs, decay_rate = {
    'cub200': (1e-4, True, 10, 0.5),
    'cars196': (1e-4, True, 20, 0.5),
    'sop': (6e-4, False, 20, 0.25),
    'inshop': (6e-4, False, 20, 0.25),
  }[config.dataset.name]
  config.batch_size = 180
  _crop_originals(config, resize=256, image_size=224)
  config.model.name, config.model.init_from = _BN_INCEPTION
  config.model.pooling = 'average_max'
  config.model.embedding_dim = 512
  config.model.batch_norm_momentum = 0.1  # Its port's, 0.9 in torch's terms.
  config.model.freeze_batch_norm_steps = -1 if has_frozen_norms else 0
  config.loss.name = 'proxy_anchor'
  config.loss.proxy_anchor.alpha = 32.0
  config.loss.proxy_anchor.margin = 0.1
  config.proxies.init_norm = _kaiming_norm(config, num_classes)
  config.optimizer.name = 'adamw'
  config.optimizer.decay_vectors = True
  steps = _set_epochs(config, 60, num_images=num_images)
  config.optimizer.backbone.freeze_steps = steps
  rates = {'backbone': rate, 'head': rate, 'proxies': 100 * rate}
  for name, rate in rates.items():
    group = config.optimizer[name]
    group.learning_rate = rate
    group.weight_decay = 1e-4
    group.clip_value = 10.0
    group.schedule = 'step'
    group.decay_rate = decay_rate
    # A group's schedule begins when it is no longer frozen.
    group.decay_at = tuple(
      epoch * steps - group.freeze_steps
      for epoch in range(decay_epochs, 60, decay_epochs)
    )


def vit(config, *, num_images, num_classes):
  """A vision transformer with the softmax form.

  No paper trains just so. Images, network, batches and optimiser are those of
  HIER (https://arxiv.org/abs/2212.14258) for DINO's ViT-S/16, of the scripts
  and hier/train.py of tjddus9597/HIER-CVPR23: bicubic, class token, LayerNorm
  without parameters, 90 classes of two images, AdamW at 5e-6 with proxies at
  10,000 times that, new layers alone in the first epochs. There the loss is a
  hyperbolic Proxy-Anchor with a regulariser, gradients are of float16 with an
  eps of 1e-4 to match, and the network's first layer, trained here, is frozen.

  384 dimensions are those of its table; the scripts have 128. The temperature
  is ProxyNCA++'s; there is no source for one with a transformer.

  DINOv2 instead, for which there is no published result at all:

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
  config.proxies.init_norm = _kaiming_norm(config, num_classes)
  config.optimizer.name = 'adamw'
  config.optimizer.decay_vectors = True
  steps = _set_epochs(config, 150 if is_large else 100, num_images=num_images)
  config.optimizer.backbone.freeze_steps = (5 if is_large else 1) * steps
  rate = 5e-6
  rates = {
    'backbone': rate,
    'head': 100 * rate if is_large else rate,
    'proxies': 1e4 * rate,
  }
  for name, rate in rates.items():
    group = config.optimizer[name]
    group.learning_rate = rate
    group.weight_decay = 1e-4 if is_large else 1e-2
    group.clip_value = 10.0


def _crop_originals(config, *, resize, image_size):
  """Trains on parts of the originals, and scores centres of resized ones."""
  config.dataset.crop = 'random_resized'
  config.dataset.resize = resize
  config.dataset.resize_mode = 'shorter'
  config.dataset.image_size = image_size


def _kaiming_norm(config, num_classes) -> float:
  """The norm of proxies from PyTorch's kaiming_normal_(mode='fan_out')."""
  return math.sqrt(2 * config.model.embedding_dim / num_classes)


def _set_epochs(config, epochs, *, num_images) -> int:
  """Sets how many steps are trained and scored; returns those of an epoch."""
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
}
