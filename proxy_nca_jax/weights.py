"""The initial weights of a run: found, checksummed, and put into its state."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping

import ml_collections
import numpy as np

from proxy_nca_jax import models
from proxy_nca_jax import state as state_lib

_logger = logging.getLogger(__name__)


def digest(
  config: ml_collections.ConfigDict, saved: Mapping | None
) -> str | None:
  """Returns the SHA-256 of the initial weights, or None if they are random.

  Args:
    config: the run's config.
    saved: the content of run.json, if the run began before; it has the digest.

  Raises:
    ValueError: if the file is missing.
  """
  if saved:
    return saved.get('weights_digest')
  if not config.model.init_from:
    return None
  path = models.find_weights(config.model.init_from, config.model.name)
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def license_(config: ml_collections.ConfigDict) -> str | None:
  """Returns the license of the initial weights; None if they are random."""
  return models.find_license(config.model.init_from, config.model.name)


def load(
  config: ml_collections.ConfigDict,
  state: state_lib.TrainState,
  expected_digest: str,
) -> state_lib.TrainState:
  """Returns the state with the weights of `config.model.init_from`.

  Args:
    config: the run's config.
    state: the state as initialized, or its shapes and shardings.
    expected_digest: the digest that the run began with.

  Raises:
    ValueError: if the weights are missing, do not fit, or have changed.
  """
  if digest(config, None) != expected_digest:
    raise ValueError(
      f'{config.model.init_from!r} (config.model.init_from) has changed since '
      'this run began. Restore it, or use another workdir.'
    )
  path = models.find_weights(config.model.init_from, config.model.name)
  params, model_state = models.load_weights(
    path, config.model.name, state.params, state.model_state
  )
  _logger.info('Starting from the weights of %s', path)
  _logger.info('License of the weights: %s', license_(config))
  return dataclasses.replace(state, params=params, model_state=model_state)


def classifier(config: ml_collections.ConfigDict) -> np.ndarray | None:
  """Returns the classifier of the pretrained weights, if they have one.

  Args:
    config: the run's config.

  Returns:
    float32 [num_classes, width of the features].
  """
  if not config.model.init_from:
    return None
  path = models.find_weights(config.model.init_from, config.model.name)
  return models.read_classifier(path, config.model.name)
