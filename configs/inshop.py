"""In-Shop Clothes Retrieval: queries of unseen items search a gallery.

python main.py --config=configs/inshop.py:RECIPE --workdir=/tmp/inshop \
  --config.dataset.manual_dir=DIR --config.model.init_from=WEIGHTS

RECIPE names a function of configs/recipes.py; the default is paper. Download
the weights of BN-Inception and pass the file; those of the other networks have
a name on Hugging Face, which is the default.

Published Recall@1, in percent:

  proxynca_pp      90.9   ResNet-50, 2048 dimensions
  proxynca_pp_512  90.4   ResNet-50, 512 dimensions
  proxy_anchor     91.9   BN-Inception, 512 dimensions
  vit              92.4   DINO ViT-S/16, 384 dimensions

No In-Shop result is published for paper and dichotomies, which train
BN-Inception with 64 dimensions. proxy_anchor reports the best epoch on the test
classes. No result is published for vit: its number is that of Hyp
(htdt/hyp_metric) with the same network. Nothing was measured here, for lack of
the data.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'paper') -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'inshop'
  config.evaluation.recall_at = (1, 10, 20, 30, 40, 50)
  return recipes.apply(recipe, config, num_images=25_882)
