"""Cars196: 98 models of cars train, 98 others test.

python main.py --config=configs/cars196.py --workdir=/tmp/cars196 \
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
  config.dataset.name = 'cars196'
  config.dataset.resize = 256
  config.dataset.image_size = 227
  config.batch_size = 32
  config.num_steps = 5020
  config.eval_every = 502
  config.optimizer.proxies.learning_rate = 1e-2
  return config
