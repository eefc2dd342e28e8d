"""Nearest neighbors in an index of images; `python -m proxy_nca_jax.search`."""
