"""Trains a network: `python main.py --config=glyphs --workdir=/tmp/run`."""

from proxy_nca_jax import commands
from proxy_nca_jax.runtime import huge_pages

if __name__ == '__main__':
  huge_pages.restart()
  commands.train(prog='python main.py')
