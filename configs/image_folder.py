"""Your own images: a folder with one sub-folder per class.

python main.py --config=configs/image_folder.py --config.dataset.root=DIR \
  --workdir=/tmp/run

Trains a small network from scratch on crops of 64 x 64 pixels.
"""

import ml_collections

from proxy_nca_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'image_folder'
  config.dataset.resize = 72
  config.dataset.image_size = 64
  return config
