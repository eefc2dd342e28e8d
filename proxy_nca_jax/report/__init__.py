"""Reports of runs: self-contained HTML pages that open offline."""

from proxy_nca_jax.report.run import Embedded, write

__all__ = ['Embedded', 'write']
