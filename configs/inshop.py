"""In-Shop Clothes Retrieval: queries of unseen items search a gallery.

python main.py --config=configs/inshop.py --workdir=/tmp/inshop \
  --config.dataset.manual_dir=DIR

Resized to 256 x 256, cropped to 227 x 227, mirrored, in batches of 32 as in the
paper; 20 epochs. The network is small and starts from scratch, so its scores
cannot be compared with published ones. Not measured here: no copy of the data
was at hand.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'inshop'
  config.dataset.resize = 256
  config.dataset.image_size = 227
  config.evaluation.recall_at = (1, 10, 20, 30, 40, 50)
  config.batch_size = 32
  config.num_steps = 16180
  config.eval_every = 1618
  config.optimizer.proxies.learning_rate = 1e-2
  return config
