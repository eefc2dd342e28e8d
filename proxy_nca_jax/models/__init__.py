"""Networks from images to embeddings, chosen by name from `BACKBONES`."""

from proxy_nca_jax.models.backbones import BACKBONES
from proxy_nca_jax.models.batch_norm import masked_statistics
from proxy_nca_jax.models.embedding import POOLINGS, create_model, normalize
from proxy_nca_jax.models.pretrained import (
  BUNDLED,
  find_license,
  find_weights,
  load_weights,
  read_classifier,
)
from proxy_nca_jax.models.timm_files import make_file

__all__ = [
  'BACKBONES',
  'BUNDLED',
  'POOLINGS',
  'create_model',
  'find_license',
  'find_weights',
  'load_weights',
  'masked_statistics',
  'make_file',
  'normalize',
  'read_classifier',
]
