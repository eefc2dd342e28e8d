"""In-Shop Clothes Retrieval: queries of unseen items search a gallery.

python main.py --config=configs/inshop.py:RECIPE --workdir=/tmp/inshop \
  --config.dataset.manual_dir=DIR --config.model.init_from=WEIGHTS

RECIPE is one of those in configs/recipes.py, by default paper. Weights of
BN-Inception are a file that you fetch; the others have a name on Hugging Face.
Published Recall@1, in percent:

  proxynca_pp      90.9   ResNet-50, 2048 dimensions
  proxynca_pp_512  90.4   ResNet-50, 512 dimensions
  proxy_anchor     91.9   BN-Inception, 512 dimensions
  vit              92.4   DINO ViT-S/16, 384 dimensions

paper and dichotomies train BN-Inception to 64 dimensions; neither was published
on In-Shop. Of proxy_anchor it is the best epoch's on the test classes. Of vit
no result is published: the number is of Hyp (htdt/hyp_metric) with the same
network. Not measured here: no copy of the data was at hand.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'paper') -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'inshop'
  config.evaluation.recall_at = (1, 10, 20, 30, 40, 50)
  return recipes.apply(recipe, config, num_images=25_882, num_classes=3_997)
