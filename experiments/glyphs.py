"""Small version of configs/glyphs.py, the default of the experiments.

It uses 600 of the characters, half of the steps and a quarter of the network's
channels, so that a run takes about half a minute on two CPU cores. With even
fewer characters, raw pixels would already distinguish most of them.
"""

import ml_collections

from proxy_nca_jax.configs import glyphs


def get_config() -> ml_collections.ConfigDict:
  config = glyphs.get_config()
  config.dataset.num_classes = 600
  config.model.width = 16
  config.num_steps = 300
  config.log_every = 20
  config.report = False
  config.evaluation.nearest_only = True
  config.evaluation.kmeans_iterations = 0
  return config
