"""All config fields with their defaults; the other configs override some."""

import ml_collections
from ml_collections import config_dict


def _loss_arguments() -> dict[str, dict]:
  # Built for each config: configs that share a placeholder share its value.
  return {
    'adaface': dict(scale=64.0, margin=0.4, concentration=0.333),
    'arcface': dict(scale=64.0, margin=0.5),
    'center': dict(),
    'center_softmax': dict(weight=0.003),
    'circle': dict(scale=80.0, margin=0.4),
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
    'nt_xent': dict(temperature=0.1),
    'proxy_anchor': dict(alpha=32.0, margin=0.1),
    'proxy_nca': dict(
      temperature=1 / 9,  # From ProxyNCA++; the paper gives none.
      positive_in_denominator=False,  # False is the paper's form.
      normalize=True,
      label_smoothing=0.0,
      # Number of proxies to compare with at a time; None compares with all.
      proxy_chunk=config_dict.placeholder(int),
    ),
    'proxy_nca_pp': dict(
      temperature=1 / 9, proxy_chunk=config_dict.placeholder(int)
    ),
    'proxy_triplet': dict(margin=0.2, normalize=True),
    'smooth_ap': dict(temperature=0.01),
    'soft_margin_triplet': dict(mining='batch_hard'),
    'soft_triple': dict(scale=20.0, margin=0.01, gamma=0.1, tau=0.2),
    'subcenter_arcface': dict(scale=64.0, margin=0.5),
    'sup_con': dict(temperature=0.1),
    'triplet': dict(margin=0.2, mining='semi_hard'),
  }


def get_config() -> ml_collections.ConfigDict:
  """Returns the default config; its `dataset.name` must still be set."""
  config = ml_collections.ConfigDict()
  # Seeds initialization, image order, augmentation and k-means.
  config.seed = 0
  config.num_steps = 1000
  # Number of passes over the train images, in place of num_steps: one of the
  # two must be 0.
  config.num_epochs = 0.0
  # Unit of eval_every and of the optimizer's freeze_steps, warmup_steps,
  # decay_every and decay_at: step, or epoch. With epoch, each epoch, also those
  # of num_epochs, is rounded down to num_images // batch_size steps.
  config.period_unit = 'step'
  # Steps that train only head and proxies on the features of the train images,
  # before step 1.
  config.head_steps = 0
  config.batch_size = 64  # Global: summed over all devices.

  config.dataset = ml_collections.ConfigDict()
  config.dataset.name = ''
  # Folder of prepared datasets; '' is TFDS's default, ~/tensorflow_datasets.
  config.dataset.data_dir = ''
  # image_folder: the folder of images. embeddings: the file of vectors.
  config.dataset.root = ''
  # image_folder: a table of images with the columns path and label, in a .csv,
  # .tsv or .parquet file; '' takes the sub-folders of `root` as classes.
  config.dataset.table = ''
  # image_folder: a Hugging Face dataset: a folder that save_to_disk wrote or
  # load_dataset reads, or a name on the Hub or in the local cache.
  config.dataset.huggingface = ''
  # huggingface: columns of images and labels; '' finds them by their types.
  config.dataset.image_column = ''
  config.dataset.label_column = ''
  # Folder of downloaded archives or of their extracted folders; '' downloads.
  config.dataset.manual_dir = ''
  # Accept archives with missing, duplicate or unreadable images.
  config.dataset.allow_incomplete = False
  config.dataset.fonts_dir = ''  # glyphs: folder of fonts; '' is matplotlib's.
  # glyphs: drop characters with fewer distinct drawings than this.
  config.dataset.min_styles = 8
  config.dataset.num_classes = 0  # Number of classes to use; 0 uses all.
  config.dataset.test_fraction = 0.5  # Fraction of the classes to test on.
  # Number of train classes to train on; 0 uses all.
  config.dataset.num_train_classes = 0
  # Subsample the train classes to a long tail: the largest fraction of images
  # that a class keeps is this many times the smallest; 0 disables. A quarter of
  # each class is held out first, and scored by class frequency.
  config.dataset.long_tail = 0.0
  # Train classes to hold out for selecting a checkpoint: i/n is the i-th of n
  # equal parts, such as 2/2 for the second half; '' holds out none. 'folder'
  # takes the classes of the folder val, valid or validation of image_folder, or
  # of that split of its table; 'column' those of the split of embeddings.
  config.dataset.validation = ''
  # Seeds the split by class, so that runs with other `seed`s share one split.
  config.dataset.split_seed = 0
  # Images per class in class-balanced batches; 0 shuffles all images.
  config.dataset.images_per_class = 0
  # Number of processes that read images; 0 reads in threads.
  config.dataset.num_workers = 0
  # Keep the resized train images in device memory, divided among the devices,
  # and crop and flip them there. Batches are the same as from the host.
  config.dataset.on_device = False

  # The fields from here to `erasing` are for images.
  # The host resizes, crops and flips images as uint8; the device normalizes.
  # Side in pixels to resize to before the crop; 0 disables resizing.
  config.dataset.resize = 0
  # square resizes both sides to `resize`; shorter only the shorter side,
  # keeping the aspect ratio.
  config.dataset.resize_mode = 'square'
  # Interpolation of every resize: bilinear or bicubic.
  config.dataset.interpolation = 'bilinear'
  # Store images on disk as pixels, already resized. Must equal `resize`; 0
  # decodes the originals in every epoch.
  config.dataset.cache_size = 0
  # Let random_resized crop from stored images that are already resized (by
  # `cache_size` or image_folder) instead of the originals; pixels differ.
  config.dataset.allow_resized_source = False
  config.dataset.image_size = 32  # Side in pixels of the network's input.
  # Training crop: random, or random_resized (of the original image).
  config.dataset.crop = 'random'
  # random: pad each side with this many black pixels before the crop.
  config.dataset.padding = 0
  # random_resized: range of the crop's area, as a fraction of the image's.
  config.dataset.crop_scale = (0.08, 1.0)
  # random_resized: range of the crop's aspect ratio, width / height.
  config.dataset.crop_ratio = (3 / 4, 4 / 3)
  config.dataset.flip = True  # Mirror each training image with probability 1/2.
  # Strengths of brightness, contrast, saturation and hue jitter, as in
  # torchvision's ColorJitter; 0 disables each.
  config.dataset.color_jitter = (0.0, 0.0, 0.0, 0.0)
  # Probability of erasing a random rectangle of a training image.
  config.dataset.erasing = 0.0

  config.model = ml_collections.ConfigDict()
  config.model.name = 'small_cnn'
  # Pretrained weights: a file, a Hugging Face name, published, those that
  # `proxy-nca models` lists for the network, or bundled, those of
  # efficientnet_lite0 that are installed with this package; '' is random.
  config.model.init_from = ''
  config.model.width = 64  # small_cnn: channels of the first stage.
  # average, max, average_max or gem of positions; or what a transformer makes
  # of them itself: its class token (cls), or its attention pool (attention).
  # published is what the network was published with.
  config.model.pooling = 'average'
  # Apply LayerNorm without parameters to the pooled features.
  config.model.layer_norm = False
  config.model.embedding_dim = 64  # The paper's.
  config.model.normalize = True  # Project embeddings to the unit sphere.
  config.model.head_hidden = 0  # Hidden units of the head; 0 is a linear head.
  # How a linear head starts: random; pca, the principal components of the
  # features of the train images; lda, the same after whitening within classes;
  # or identity, the features themselves.
  config.model.head_init = 'random'
  # Standard deviation of the head's random weights; 0 is LeCun's.
  config.model.embedding_stddev = 0.0
  # Fraction of the running statistics that each step keeps.
  config.model.batch_norm_momentum = 0.9
  # Freeze batch norm for the first steps; -1 freezes it for all.
  config.model.freeze_batch_norm_steps = 0
  # Freeze the first layers of the backbone: 1 is its stem or patch embedding, 2
  # also its first stage or block, and so on.
  config.model.freeze_layers = 0
  # Freeze the backbone and add products of matrices of this rank to the kernels
  # of dense layers of a transformer or ConvNeXt (LoRA); 0 trains the backbone
  # itself.
  config.model.lora_rank = 0
  # Which: attn.qkv, attn.proj, mlp.fc1 and mlp.fc2 in most; a wrong name lists
  # those of the network.
  config.model.lora_layers = ('attn.qkv', 'attn.proj')
  # Compute dtype of the backbone: float32 or bfloat16.
  config.model.dtype = 'float32'
  # Recompute each block in the backward pass, to save memory.
  config.model.remat = False

  config.loss = ml_collections.ConfigDict()
  config.loss.name = 'proxy_nca'
  # Precision of the loss's products on accelerators: highest is float32; high
  # and default are faster and round more (docs/performance.md).
  config.loss.precision = 'highest'
  # Centers per class of soft_triple, subcenter_arcface and magnet.
  config.loss.num_centers = 3
  # Number of proxies of dynamic_proxy_nca and fractional_proxy_nca; 0 is the
  # number of classes.
  config.loss.num_proxies = 0
  # Corrections for imbalanced classes. An example of a class with n images has
  # its loss weighted by n^-class_weighting: 0 disables, 1 weights all classes
  # equally.
  config.loss.class_weighting = 0.0
  # proxy_nca and proxy_nca_pp: add this times the log frequency of each class
  # to its logit; 0 disables.
  config.loss.logit_adjustment = 0.0
  # Losses between examples: pairs to compare: all, or those that a miner of
  # proxy_nca_jax/losses/pairs.py selects: batch_hard, semi_hard or
  # multi_similarity.
  config.loss.pairs = 'all'
  # Losses between examples: number of embeddings of earlier batches to compare
  # each batch with as well (cross-batch memory); 0 disables.
  config.loss.memory_size = 0
  # Steps before the first embeddings are remembered; the paper's is 1000.
  config.loss.memory_start = 0
  # Arguments of every loss; only those of `loss.name` are used. The docstrings
  # in proxy_nca_jax/losses explain them.
  for name, arguments in _loss_arguments().items():
    config.loss[name] = ml_collections.ConfigDict(arguments)

  config.proxies = ml_collections.ConfigDict()
  # How proxies start: random; kaiming or xavier, random with the norm that a
  # layer would have; or class_means, the mean embeddings of classes, and with
  # several centers per class those of k-means within the class.
  config.proxies.init = 'random'
  # random and class_means: expected norm of the initial proxies.
  config.proxies.init_norm = 1.0
  # fractional_proxy_nca: give larger classes more proxies.
  config.proxies.by_size = False
  # Divide the proxies among the devices instead of replicating them.
  config.proxies.sharded = False

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = 'adam'  # adam, adamw, rmsprop or sgd.
  config.optimizer.eps = 1e-8  # adam, adamw and rmsprop: epsilon.
  config.optimizer.momentum = 0.9  # b1 of adam and adamw; else the momentum.
  config.optimizer.rms_decay = 0.9  # rmsprop: decay of the squared gradients.
  # Clip gradients to this global norm; 0 disables clipping.
  config.optimizer.clip_norm = 0.0
  # Also apply weight decay to vectors: biases and parameters of norms.
  config.optimizer.decay_vectors = False
  # At a non-finite loss or gradient: stop ends the run; skip leaves the
  # parameters unchanged and continues with the next step.
  config.optimizer.on_nonfinite = 'stop'
  # skip: stop after this many consecutive skipped steps.
  config.optimizer.max_skipped_steps = 10
  # Multiply all learning rates by this factor when more than `plateau_patience`
  # consecutive validation scores fail to improve on the best; 1 disables.
  config.optimizer.plateau_factor = 1.0
  config.optimizer.plateau_patience = 4  # ProxyNCA++'s, with a factor of 0.1.
  # Multiply the learning rate of each layer of the backbone by this factor once
  # for each layer that follows it; 1 gives all layers the same.
  config.optimizer.layer_decay = 1.0
  # Evaluate an exponential moving average of the weights, of which each step
  # keeps this fraction; 0 evaluates the weights themselves.
  config.optimizer.ema_decay = 0.0
  for group in ('backbone', 'head', 'proxies'):
    config.optimizer[group] = ml_collections.ConfigDict(
      dict(
        learning_rate=1e-3,
        # The group is frozen for freeze_steps, then its learning rate rises
        # linearly from 0 for warmup_steps, then the schedule begins.
        freeze_steps=0,
        warmup_steps=0,
        schedule='constant',  # constant, cosine (to 0), exponential or step.
        decay_rate=0.94,  # Factor of exponential and step; 0.94 is the paper's.
        decay_every=1000,  # exponential: steps between decays.
        decay_at=(),  # step: steps at which to decay.
        weight_decay=0.0,  # L2, in the gradient; adamw: decoupled from it.
        clip_value=0.0,  # Clip gradient entries to [-value, value]; 0 disables.
      )
    )

  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.batch_size = 256  # Global, as `config.batch_size`.
  # Score raw pixels, the network before training and, of pretrained weights,
  # the features without a head.
  config.evaluation.baselines = True
  # Values of K for Recall@K, or for CMC@K in re-identification.
  config.evaluation.recall_at = (1, 2, 4, 8)
  # Values of K for Precision@K and mAP@K.
  config.evaluation.precision_at = ()
  # Validation score that selects a checkpoint; harmonic_mean is that of nmi
  # and recall@1.
  config.evaluation.select_by = 'recall@1'
  # Compute only Recall@K, which is faster than ranking all positives.
  config.evaluation.nearest_only = False
  # Compare all pairs of test images at the end of a run: error rates of
  # verification, and distance thresholds.
  config.evaluation.verification = False
  # Iterations of k-means for NMI; 0 disables clustering. 20 is FAISS's.
  config.evaluation.kmeans_iterations = 20
  config.evaluation.kmeans_start = 'random'  # random or k-means++.
  # Number of k-means runs; the one with the lowest inertia is scored.
  config.evaluation.kmeans_num_starts = 1

  # Number of steps to run in one call to the device, for short steps. Must
  # divide all periods and numbers of steps below and above.
  config.steps_per_dispatch = 1

  config.report = True  # Write WORKDIR/report.html at the end.
  # Print the data, the parameters and the memory of a step, then exit.
  config.dry_run = False
  config.log_every = 50  # Steps between rows of metrics.jsonl.
  # Steps between evaluations on the validation classes, or on the test classes
  # without any; 0 evaluates only at the end.
  config.eval_every = 0
  # Steps between checkpoints; one is also saved at the end and on a stop.
  config.save_every = 500
  # Number of recent checkpoints to keep; if the newest is damaged, the run
  # resumes from an older one.
  config.keep_checkpoints = 2
  # Log when a step waits longer than this many seconds for input or the device;
  # 0 disables. The default exceeds the compile time of a large network.
  config.stall_seconds = 300.0
  # First and last step to trace to WORKDIR/profile, such as (100, 110); ()
  # disables tracing.
  config.profile_steps = ()
  return config.lock()
