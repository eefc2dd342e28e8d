"""CUB-200-2011: 100 species of birds train, 100 others test.

python main.py --config=configs/cub200.py:RECIPE --workdir=/tmp/cub200 \
  --config.dataset.manual_dir=DIR --config.model.init_from=WEIGHTS

RECIPE is one of those in configs/recipes.py, by default paper. Weights of
BN-Inception are a file that you fetch; the others have a name on Hugging Face.
Published Recall@1, in percent:

  paper            49.21  BN-Inception, 64 dimensions
  dichotomies      52.63  BN-Inception, 64 dimensions
  proxynca_pp      72.2   ResNet-50, 2048 dimensions
  proxynca_pp_512  69.0   ResNet-50, 512 dimensions
  proxy_anchor     69.1   BN-Inception, 512 dimensions
  vit              80.9   DINO ViT-S/16, 384 dimensions

Of dichotomies and proxy_anchor it is the best epoch's on the test classes; the
last epoch of dichotomies has 50.95. Of vit no result is published: the number
is of Hyp (htdt/hyp_metric) with the same network. Not measured here: no copy of
the data was at hand.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'paper') -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'cub200'
  return recipes.apply(recipe, config, num_images=5_864, num_classes=100)
