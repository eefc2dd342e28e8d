"""Networks from images to embeddings, chosen by name from `BACKBONES`."""

from proxy_nca_jax.models.embedding import BACKBONES, create_model

__all__ = ['BACKBONES', 'create_model']
