"""Cars196: train on 98 car models, test on 98 others.

python main.py --config=configs/cars196.py:RECIPE --workdir=/tmp/cars196 \
  --config.dataset.manual_dir=DIR --config.model.init_from=WEIGHTS

RECIPE names a function of configs/recipes.py; the default is paper. Download
the weights of BN-Inception and pass the file; those of the other networks have
a name on Hugging Face, which is the default.

Published Recall@1, in percent:

  paper            73.22  BN-Inception, 64 dimensions
  dichotomies      72.19  BN-Inception, 64 dimensions
  proxynca_pp      90.1   ResNet-50, 2048 dimensions
  proxynca_pp_512  86.5   ResNet-50, 512 dimensions
  proxy_anchor     86.4   BN-Inception, 512 dimensions
  vit              89.2   DINO ViT-S/16, 384 dimensions

dichotomies and proxy_anchor report the best epoch on the test classes; the last
epoch of dichotomies reaches 70.51. No result is published for vit: its number
is that of Hyp (htdt/hyp_metric) with the same network. Nothing was measured
here, for lack of the data.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'paper') -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'cars196'
  return recipes.apply(recipe, config, num_images=8_054)
