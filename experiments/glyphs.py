"""Glyphs for many short runs: what the experiments train by default.

A few of the characters and half of the steps of configs/glyphs.py and a quarter
of its network's channels, so that a run takes half a minute on two CPU cores.
Of fewer characters, raw pixels tell most apart.
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
