"""Glyphs: characters drawn in matplotlib's fonts. Needs no download.

python main.py --config=configs/glyphs.py --workdir=/tmp/run

Trains in a few minutes on two CPU cores. README.md has the measured scores.
"""

import ml_collections

from proxy_nca_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'glyphs'
  config.dataset.image_size = 32
  config.dataset.resize = 32  # The size at which they are drawn.
  config.dataset.cache_size = 32  # Read pixels instead of decoding PNGs.
  config.dataset.padding = 2
  config.num_steps = 600
  # Ten times the network's learning rate. At the same rate the proxies lag
  # behind: Recall@1 after 400 steps was 70%.
  config.optimizer.proxies.learning_rate = 1e-2
  config.dataset.flip = False  # A mirrored character is another character.
  return config
