"""Stanford Online Products: 11,318 products train, 11,316 others test.

python main.py --config=configs/sop.py --workdir=/tmp/sop \
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
  config.dataset.name = 'sop'
  config.dataset.resize = 256
  config.dataset.image_size = 227
  config.evaluation.recall_at = (1, 10, 100, 1000)
  config.batch_size = 32
  config.num_steps = 37220
  config.eval_every = 3722
  config.optimizer.proxies.learning_rate = 1e-2
  return config
