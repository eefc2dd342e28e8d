"""CUB-200-2011: train on 100 bird species, test on 100 others.

python main.py --config=configs/cub200.py:RECIPE --workdir=/tmp/cub200 \
  --config.dataset.manual_dir=DIR --config.model.init_from=WEIGHTS

RECIPE names a function of configs/recipes.py; the default is paper. Download
the weights of BN-Inception and pass the file; those of the other networks have
a name on Hugging Face, which is the default.

Published Recall@1, in percent:

  paper            49.21  BN-Inception, 64 dimensions
  dichotomies      52.63  BN-Inception, 64 dimensions
  proxynca_pp      72.2   ResNet-50, 2048 dimensions
  proxynca_pp_512  69.0   ResNet-50, 512 dimensions
  proxy_anchor     69.1   BN-Inception, 512 dimensions
  vit              80.9   DINO ViT-S/16, 384 dimensions

dichotomies and proxy_anchor report the best epoch on the test classes; the last
epoch of dichotomies reaches 50.95. No result is published for vit: its number
is that of Hyp (htdt/hyp_metric) with the same network. Nothing was measured
here, for lack of the data.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'paper') -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'cub200'
  return recipes.apply(recipe, config, num_images=5_864)
