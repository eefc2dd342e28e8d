"""Cars196: 98 models of cars train, 98 others test.

python main.py --config=configs/cars196.py:RECIPE --workdir=/tmp/cars196 \
  --config.dataset.manual_dir=DIR --config.model.init_from=WEIGHTS

RECIPE is one of those in configs/recipes.py, by default paper. Weights of
BN-Inception are a file that you fetch; the others have a name on Hugging Face.
Published Recall@1, in percent:

  paper            73.22  BN-Inception, 64 dimensions
  dichotomies      72.19  BN-Inception, 64 dimensions
  proxynca_pp      90.1   ResNet-50, 2048 dimensions
  proxynca_pp_512  86.5   ResNet-50, 512 dimensions
  proxy_anchor     86.4   BN-Inception, 512 dimensions
  vit              89.2   DINO ViT-S/16, 384 dimensions

Of dichotomies and proxy_anchor it is the best epoch's on the test classes; the
last epoch of dichotomies has 70.51. Of vit no result is published: the number
is of Hyp (htdt/hyp_metric) with the same network. Not measured here: no copy of
the data was at hand.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'paper') -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'cars196'
  return recipes.apply(recipe, config, num_images=8_054, num_classes=98)
