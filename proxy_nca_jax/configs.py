"""Config files: `configs/` of a checkout, or a folder of the installed package.

`from proxy_nca_jax.configs import default` finds either. The top-level name
`configs` is left to whoever installs this package.
"""

import pathlib

_HERE = pathlib.Path(__file__).parent
FOLDER = next(
  folder
  for folder in (_HERE / 'configs', _HERE.parent / 'configs')
  if (folder / 'default.py').is_file()
)

__path__ = [str(FOLDER)]
