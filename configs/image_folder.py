"""A folder of your own pictures, whose sub-folders are classes.

python main.py --config=configs/image_folder.py --config.dataset.root=DIR \
  --workdir=/tmp/run
"""

import ml_collections

from proxy_nca_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'image_folder'
  config.dataset.resize = 72
  config.dataset.image_size = 64
  return config
