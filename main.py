"""Trains a network: `python main.py --config=glyphs --workdir=/tmp/run`."""

from proxy_nca_jax import commands

if __name__ == '__main__':
  commands.train(prog='python main.py')
