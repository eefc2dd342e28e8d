"""Your own embeddings: vectors from any network, with their labels.

python main.py --config=embeddings --config.dataset.root=FILE --workdir=/tmp/run

trains a head and proxies on the vectors of FILE. docs/data.md describes the
formats.
"""

import ml_collections

from proxy_nca_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'embeddings'
  config.model.name = 'vectors'
  config.model.embedding_dim = 512
  config.model.head_init = 'lda'
  config.proxies.init = 'class_means'
  config.loss.proxy_nca.positive_in_denominator = True
  config.num_epochs = 10.0
  config.batch_size = 128
  config.optimizer.name = 'adamw'
  for group, learning_rate in (('head', 1e-4), ('proxies', 1e-3)):
    config.optimizer[group].learning_rate = learning_rate
    config.optimizer[group].schedule = 'cosine'
    config.optimizer[group].weight_decay = 1e-4
  return config
