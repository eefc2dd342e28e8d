"""Search in an index of images; the command is `proxy_nca_jax.search`."""
