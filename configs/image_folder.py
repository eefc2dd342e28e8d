"""Your own images: a folder with one sub-folder per class.

python main.py --config=configs/image_folder.py --config.dataset.root=DIR \
  --workdir=/tmp/run

fine-tunes an EfficientNet-Lite0 that was trained on ImageNet and is installed
with this package. Head and proxies start from the features of the train images
and the whole network is trained at low learning rates. docs/photographs.md has
the reasons for each number, and the scores.

A colon and a name after the config's name choose another recipe:

  image_folder:frozen   only head and proxies, in about a minute
  image_folder:scratch  a small network from random weights, 64 x 64 pixels

or a published recipe, such as image_folder:proxy_anchor, with the numbers of
CUB-200-2011 for the learning rates and epochs: see configs/recipes.py.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'finetune') -> ml_collections.ConfigDict:
  if recipe not in _RECIPES | recipes.RECIPES:
    raise ValueError(
      f'Unknown recipe {recipe!r} (--config=image_folder:RECIPE): choose one '
      f'of {", ".join(_RECIPES | recipes.RECIPES)}.'
    )
  config = default.get_config()
  config.dataset.name = 'image_folder'
  if recipe in recipes.RECIPES:
    # Crops are taken from the stored images, which are resized.
    config.dataset.allow_resized_source = True
    return recipes.apply(recipe, config, num_images=None)
  with config.unlocked():
    _RECIPES[recipe](config)
  return config


def _pretrained(config):
  config.model.name = 'efficientnet_lite0'
  config.model.init_from = 'bundled'
  config.model.embedding_dim = 512
  config.model.head_init = 'lda'
  config.proxies.init = 'class_means'
  config.loss.proxy_nca.positive_in_denominator = True
  config.dataset.resize = 256
  config.dataset.resize_mode = 'shorter'
  config.dataset.interpolation = 'bicubic'
  config.dataset.image_size = 224
  config.evaluation.batch_size = 64


def _frozen(config):
  _pretrained(config)
  config.num_steps = 0


def _finetune(config):
  _pretrained(config)
  config.num_steps = 0
  config.num_epochs = 4.0
  config.batch_size = 32
  config.log_every = 10
  config.dataset.crop = 'random_resized'
  config.dataset.crop_scale = (0.3, 1.0)
  config.dataset.allow_resized_source = True
  config.model.freeze_batch_norm_steps = -1
  config.optimizer.name = 'adamw'
  for group, learning_rate in (
    ('backbone', 1e-4),
    ('head', 3e-4),
    ('proxies', 3e-3),
  ):
    config.optimizer[group].learning_rate = learning_rate
    config.optimizer[group].warmup_steps = 40
    config.optimizer[group].schedule = 'cosine'
  config.optimizer.backbone.weight_decay = 1e-4
  config.optimizer.head.weight_decay = 1e-4


def _scratch(config):
  config.dataset.resize = 72
  config.dataset.image_size = 64


_RECIPES = {'finetune': _finetune, 'frozen': _frozen, 'scratch': _scratch}
