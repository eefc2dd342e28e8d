"""Stanford Online Products: train on 11,318 products, test on 11,316.

python main.py --config=configs/sop.py:RECIPE --workdir=/tmp/sop \
  --config.dataset.manual_dir=DIR --config.model.init_from=WEIGHTS

RECIPE names a function of configs/recipes.py; the default is paper. Download
the weights of BN-Inception and pass the file; those of the other networks have
a name on Hugging Face, which is the default.

Published Recall@1, in percent:

  paper            73.73  BN-Inception, 64 dimensions
  dichotomies      74.07  BN-Inception, 64 dimensions
  proxynca_pp      81.4   ResNet-50, 2048 dimensions
  proxynca_pp_512  80.7   ResNet-50, 512 dimensions
  proxy_anchor     79.2   BN-Inception, 512 dimensions
  vit              85.1   DINO ViT-S/16, 384 dimensions

dichotomies and proxy_anchor report the best epoch on the test classes; the last
epoch of dichotomies reaches 73.38. No result is published for vit: its number
is that of Hyp (htdt/hyp_metric) with the same network. Nothing was measured
here, for lack of the data.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'paper') -> ml_collections.ConfigDict:
  config = default.get_config()
  config.dataset.name = 'sop'
  config.evaluation.recall_at = (1, 10, 100, 1000)
  return recipes.apply(recipe, config, num_images=59_551)
