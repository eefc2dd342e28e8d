"""Market-1501: people of a gallery are found again by other cameras.

python main.py --config=configs/market1501.py --workdir=/tmp/market1501 \
  --config.dataset.manual_dir=DIR

Resized to 256 x 256, cropped to 227 x 227, mirrored, in batches of 32 as in the
paper; 20 epochs. The network is small and starts from scratch, so its scores
cannot be compared with published ones. Not measured here: no copy of the data
was at hand.
"""

import ml_collections

from proxy_nca_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'market1501'
  config.dataset.resize = 256
  config.dataset.image_size = 227
  config.evaluation.recall_at = (1, 5, 10)
  config.evaluation.select_by = 'cmc@1'
  config.batch_size = 32
  config.num_steps = 8080
  config.eval_every = 808
  config.optimizer.proxies.learning_rate = 1e-2
  return config
