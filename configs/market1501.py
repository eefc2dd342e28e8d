"""Market-1501: re-identify people across cameras.

python main.py --config=configs/market1501.py --workdir=/tmp/market1501 \
  --config.dataset.manual_dir=DIR

As in the Proxy-NCA paper, images are resized to 256 x 256, cropped to 227 x 227
and mirrored, in batches of 32. Trains for 20 epochs; 12,936 images make 404
steps. The proxies' learning rate is that of configs/glyphs.py. The network is
small and trained from scratch, so its scores are not comparable to published
ones. configs/market1501.py:foundation trains a pretrained network instead, by
configs/recipes.py, with images resized to squares.
Nothing was measured here, for lack of the data.
"""

import ml_collections

from proxy_nca_jax.configs import default, recipes


def get_config(recipe: str = 'scratch') -> ml_collections.ConfigDict:
  if recipe not in ('scratch', 'foundation'):
    raise ValueError(
      f'Unknown recipe {recipe!r} (--config=market1501:RECIPE): choose one of '
      'scratch, foundation.'
    )
  config = default.get_config()
  config.dataset.name = 'market1501'
  config.evaluation.recall_at = (1, 5, 10)
  config.evaluation.select_by = 'cmc@1'
  if recipe == 'foundation':
    recipes.apply(recipe, config, num_images=12_936)
    # A central square of a person has neither head nor feet.
    config.dataset.resize_mode = 'square'
    return config
  config.dataset.resize = 256
  config.dataset.image_size = 227
  config.batch_size = 32
  config.num_steps = 8080
  config.eval_every = 808
  config.optimizer.proxies.learning_rate = 1e-2
  return config
