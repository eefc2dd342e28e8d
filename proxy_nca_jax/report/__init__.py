"""What runs found, as pages of HTML that open anywhere, offline."""

from proxy_nca_jax.report.run import Embedded, write

__all__ = ['Embedded', 'write']
