"""Stanford Online Products: 11,318 products train, 11,316 others test.

python main.py --config=configs/sop.py:RECIPE --workdir=/tmp/sop \
  --config.dataset.manual_dir=DIR --config.model.init_from=WEIGHTS

RECIPE is one of those in configs/recipes.py, by default paper. Weights of
BN-Inception are a file that you fetch; the others have a name on Hugging Face.
Published Recall@1, in percent:

  paper            73.73  BN-Inception, 64 dimensions
  dichotomies      74.07  BN-Inception, 64 dimensions
  proxynca_pp      81.4   ResNet-50, 2048 dimensions
  proxynca_pp_512  80.7   ResNet-50, 512 dimensions
  proxy_anchor     79.2   BN-Inception, 512 dimensions
  vit              85.1   DINO ViT-S/16, 384 dimensions

Of dichotomies and proxy_anchor it is the best epoch's on the test classes; the
last epoch of dichotomies has 73.38. Of vit no result is published: the number
is of Hyp (htdt/hyp_metric) with the same network. Not measured here: no copy of
the data was at hand.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'paper') -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'sop'
  config.evaluation.recall_at = (1, 10, 100, 1000)
  return recipes.apply(recipe, config, num_images=59_551, num_classes=11_318)
