"""Your own embeddings: vectors from any network, with their labels.

python main.py --config=embeddings --config.dataset.root=FILE --workdir=/tmp/run

trains a head and proxies on the vectors of an .npz, .npy or Parquet file, on
half of the classes, and tests on the others. docs/data.md describes the files.
Head and proxies start from the vectors, as those of configs/image_folder.py
start from features. The fields of images (`resize` to `erasing`, `on_device`,
`model.pooling` and the like) must keep their defaults.

The learning rates and epochs were compared on four folds of the train classes
of the groceries of README.md: 656 vectors of 1,280 dimensions, the features of
EfficientNet-Lite0 at 160 pixels (seed 0, 2026-11-28). Recall@1 and MAP@R on the
classes held out, percent:

  the vectors as given                      88.3  52.7
  before training                           89.6  56.4
  10 epochs, 1e-4 head, 1e-3 proxies        89.2  56.6
  10 epochs, 3e-4 head, 3e-3 proxies        89.7  56.8
  10 epochs, 1e-3 head, 1e-2 proxies        90.6  56.4
  30 epochs, 3e-4 head, 3e-3 proxies        90.1  56.6
  100 epochs, 3e-4 head, 3e-3 proxies       90.0  56.2

A point is two vectors: these rates differ little, and the gentle ones are the
default.
"""

import ml_collections

from proxy_nca_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'embeddings'
  config.num_steps = 0
  config.num_epochs = 10.0
  config.batch_size = 128
  config.model.name = 'vectors'
  config.model.embedding_dim = 512
  config.model.head_init = 'lda'
  config.proxies.init = 'class_means'
  config.loss.proxy_nca.positive_in_denominator = True
  config.optimizer.name = 'adamw'
  for group, learning_rate in (('head', 3e-4), ('proxies', 3e-3)):
    config.optimizer[group].learning_rate = learning_rate
    config.optimizer[group].schedule = 'cosine'
  config.optimizer.head.weight_decay = 1e-4
  return config
