"""Trains a network, and scores it on classes that it never saw.

  python main.py --config=glyphs --workdir=/tmp/run
  python main.py --config=image_folder --config.dataset.root=DIR --workdir=RUN
  python main.py --config=cub200:proxynca_pp --workdir=/tmp/cub

--config.FIELD=VALUE sets a field of the config; configs/default.py has all of
them, each with a word on it. --config.dry_run=True prints what would be done.
The workdir gets checkpoints, metrics, results.json and report.html. A run that
was stopped goes on when the same command is given again.
"""

from absl import flags

from proxy_nca_jax import train
from proxy_nca_jax.runtime import command_line

flags.DEFINE_enum(
  'mode', 'train', ['train', 'eval'], 'eval scores the newest checkpoint.'
)


def main(config, workdir):
  train.train_and_evaluate(config, workdir, mode=flags.FLAGS.mode)


def run():
  command_line.run(main)


if __name__ == '__main__':
  run()
