"""Every field of a run, with its default. Other configs change some of them."""

import ml_collections
from ml_collections import config_dict


def _loss_arguments() -> dict[str, dict]:
  # Anew for each config: configs that hold one placeholder share its value.
  return {
    'arcface': dict(scale=64.0, margin=0.5),
    'center': dict(),
    'center_softmax': dict(weight=0.003),
    'contrastive': dict(margin=1.0),
    'cosface': dict(scale=64.0, margin=0.35),
    'dynamic_proxy_nca': dict(temperature=1 / 9, normalize=True),
    'facility_location': dict(margin_multiplier=1.0, num_refinements=5),
    'fractional_proxy_nca': dict(temperature=1 / 9, normalize=True),
    'lifted_structure': dict(margin=1.0),
    'magnet': dict(alpha=1.0),
    'multi_similarity': dict(alpha=2.0, beta=50.0, base=0.5, epsilon=0.1),
    'n_pairs': dict(regularization=0.0),
    'normalized_softmax': dict(temperature=0.05),
    'proxy_anchor': dict(alpha=32.0, margin=0.1),
    'proxy_nca': dict(
      temperature=1 / 9,  # ProxyNCA++'s.
      positive_in_denominator=False,  # The paper's form.
      normalize=True,
      label_smoothing=0.0,
      proxy_chunk=config_dict.placeholder(int),  # Proxies at a time; None: all.
    ),
    'proxy_nca_pp': dict(
      temperature=1 / 9, proxy_chunk=config_dict.placeholder(int)
    ),
    'proxy_triplet': dict(margin=0.2, normalize=True),
    'soft_triple': dict(scale=20.0, margin=0.01, gamma=0.1, tau=0.2),
    'subcenter_arcface': dict(scale=64.0, margin=0.5),
    'triplet': dict(margin=0.2, mining='semi_hard'),
  }


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults; a data set must still be named."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # Of initialisation, record order, augmentation, k-means.
  config.num_steps = 1000
  config.batch_size = 64  # Of all devices together.

  config.dataset = ml_collections.ConfigDict()
  config.dataset.name = ''
  config.dataset.data_dir = ''  # '' is TFDS's own: ~/tensorflow_datasets.
  config.dataset.root = ''  # image_folder: the folder of pictures.
  config.dataset.manual_dir = ''  # Archives or folders that you have.
  config.dataset.allow_incomplete = False  # Archives not quite as published.
  config.dataset.fonts_dir = ''  # glyphs: your fonts; '' is matplotlib's.
  config.dataset.min_styles = 8  # glyphs: fewest drawings of a class.
  config.dataset.num_classes = 0  # Use only so many classes; 0 is all.
  config.dataset.test_fraction = 0.5  # Of the classes.
  config.dataset.num_train_classes = 0  # Learn only so many; 0 is all.
  # Thins the train classes, the largest so many times the smallest; 0: not. A
  # quarter of each is held out, and scored by frequency.
  config.dataset.long_tail = 0.0
  config.dataset.validation = ''  # Train classes to select by: 2/2, 1/4, ...
  config.dataset.split_seed = 0  # Not `seed`: seeds compare on one split.
  config.dataset.images_per_class = 0  # Of a class in a batch; 0: any.
  config.dataset.num_workers = 0  # Reading processes; 0 is threads.
  # Hold the resized train pictures in the devices' memory, each a part; crop
  # and flip there: the same batches, with next to nothing to send.
  config.dataset.on_device = False

  # Resized, cropped and flipped as uint8 on the host, normalised on the device.
  config.dataset.resize = 0  # Before the crop, to so many pixels; 0: not.
  config.dataset.resize_mode = 'square'  # Or shorter: of the shorter side.
  config.dataset.interpolation = 'bilinear'  # Or bicubic, of every resize.
  config.dataset.cache_size = 0  # Store what is resized: `resize`, or 0: not.
  config.dataset.allow_resized_source = False  # Even if a crop is of originals.
  config.dataset.image_size = 32  # Side of the crop that the network sees.
  config.dataset.crop = 'random'  # Or random_resized, of the original.
  config.dataset.padding = 0  # random: black pixels on each side before it.
  config.dataset.crop_scale = (0.08, 1.0)  # random_resized: share of the area.
  config.dataset.crop_ratio = (3 / 4, 4 / 3)  # random_resized: width / height.
  config.dataset.flip = True  # Mirror half of the training images.
  # Brightness, contrast, saturation and hue, as torchvision's ColorJitter.
  config.dataset.color_jitter = (0.0, 0.0, 0.0, 0.0)
  config.dataset.erasing = 0.0  # Of so many images, a random rectangle.

  config.model = ml_collections.ConfigDict()
  config.model.name = 'small_cnn'
  config.model.init_from = ''  # A file of weights or a Hugging Face name.
  config.model.width = 64  # small_cnn: channels of the first stage.
  config.model.pooling = 'average'  # average, max, average_max, gem or cls.
  config.model.layer_norm = False  # Of what is pooled, without parameters.
  config.model.embedding_dim = 64  # The paper's.
  config.model.normalize = True  # Embeddings of unit norm.
  config.model.embedding_stddev = 0.0  # Of the first head weights; 0: LeCun's.
  config.model.batch_norm_momentum = 0.9  # The share that is kept.
  config.model.freeze_batch_norm_steps = 0  # The first so many; -1: all.
  config.model.dtype = 'float32'  # Of the backbone: float32 or bfloat16.
  config.model.remat = False  # Recompute each block in the backward pass.

  config.loss = ml_collections.ConfigDict()
  config.loss.name = 'proxy_nca'
  config.loss.num_centers = 3  # Of a class: soft_triple, subcenter_arcface, ...
  config.loss.num_proxies = 0  # dynamic and fractional; 0: one a class.
  # For classes of different sizes n: each example's loss times n^-power (1: all
  # classes weigh alike), and n's log times so much in the logits; 0: not.
  config.loss.class_weighting = 0.0
  config.loss.logit_adjustment = 0.0  # proxy_nca and proxy_nca_pp.
  # Arguments of each loss, which its function explains; those of `name` count.
  for name, arguments in _loss_arguments().items():
    config.loss[name] = ml_collections.ConfigDict(arguments)

  config.proxies = ml_collections.ConfigDict()
  config.proxies.init_norm = 1.0  # About the norm of each proxy at first.
  config.proxies.by_size = False  # fractional: more for large classes.
  config.proxies.sharded = False  # Each device holds some, none all of them.

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = 'adam'  # adam, adamw, rmsprop or sgd.
  config.optimizer.eps = 1e-8  # Of adam and rmsprop.
  config.optimizer.momentum = 0.9  # Adam's b1; of sgd and rmsprop.
  config.optimizer.rms_decay = 0.9  # rmsprop: share kept of the squares.
  config.optimizer.clip_norm = 0.0  # Largest norm of all gradients; 0: any.
  config.optimizer.decay_vectors = False  # Weight decay of biases and norms.
  # What a loss or gradient that is not finite does: stop the run, or skip its
  # step, which then changes nothing.
  config.optimizer.on_nonfinite = 'stop'
  config.optimizer.max_skipped_steps = 10  # skip: so many in a row stop, too.
  # All rates are multiplied by it when more than `plateau_patience` validation
  # scores in a row are not better than the best; 1: never.
  config.optimizer.plateau_factor = 1.0
  config.optimizer.plateau_patience = 4  # ProxyNCA++'s, whose factor is 0.1.
  for group in ('backbone', 'head', 'proxies'):
    config.optimizer[group] = ml_collections.ConfigDict(
      dict(
        learning_rate=1e-3,
        freeze_steps=0,  # First steps without an update; then the warm-up ...
        warmup_steps=0,  # ... linear from 0; then the schedule begins.
        schedule='constant',  # constant, cosine (to 0), exponential or step.
        decay_rate=0.94,  # The paper's. Of `exponential` ...
        decay_every=1000,  # ... each so many steps ...
        decay_at=(),  # ... and of `step`, at each of these.
        weight_decay=0.0,  # In the gradient; adamw's is decoupled from it.
        clip_value=0.0,  # Largest entry of a gradient, in size; 0: any.
      )
    )

  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.batch_size = 256
  config.evaluation.baselines = True  # First, raw pixels and untrained.
  config.evaluation.recall_at = (1, 2, 4, 8)  # K of Recall@K, or of CMC@K.
  # On the validation classes; harmonic_mean is of nmi and recall@1.
  config.evaluation.select_by = 'recall@1'
  config.evaluation.nearest_only = False  # Recall@K alone, faster; no MAP@R.
  config.evaluation.kmeans_iterations = 20  # FAISS's; 0 is no clustering.
  config.evaluation.kmeans_start = 'random'  # Or k-means++.
  config.evaluation.kmeans_num_starts = 1  # The one of least inertia counts.

  # Where steps are short: so many by one call to the device. All the numbers of
  # steps here must be divisible by it.
  config.steps_per_dispatch = 1

  config.report = True  # Write WORKDIR/report.html at the end.
  config.dry_run = False  # Print data, parameters and memory, and stop.
  config.log_every = 50
  config.eval_every = 0  # On validation, or test; 0 is only at the end.
  config.save_every = 500  # Besides at the end and when stopped.
  config.keep_checkpoints = 2  # The newest; an older one mends a torn one.
  # The log tells when a step waits so long for input or device; 0: never. More
  # than compiling a large network takes.
  config.stall_seconds = 300.0
  config.profile_steps = ()  # (100, 110): their trace, to WORKDIR/profile.
  return config.lock()
