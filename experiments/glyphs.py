"""Glyphs for many short runs: what the experiments train by default.

A seventh of the characters and a quarter of the network's channels of
configs/glyphs.py, so that a run takes well under a minute on two CPU cores.
"""

import ml_collections

from configs import glyphs


def get_config() -> ml_collections.ConfigDict:
  config = glyphs.get_config()
  config.dataset.num_classes = 300
  config.model.width = 16
  config.num_steps = 300
  config.log_every = 20
  config.evaluation.kmeans_iterations = 0
  return config
