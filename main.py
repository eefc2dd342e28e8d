"""Trains an embedding network and scores it on unseen classes.

  python main.py --config=glyphs --workdir=/tmp/run
  python main.py --config=image_folder --config.dataset.root=DIR --workdir=RUN
  python main.py --config=cub200:proxynca_pp --workdir=/tmp/cub

--config.FIELD=VALUE overrides a field of the config; configs/default.py
documents all fields. --config.dry_run=True prints the plan and exits. The
workdir receives checkpoints, metrics, results.json and report.html. Repeat the
same command to resume a run that was stopped.
"""

from absl import flags

from proxy_nca_jax import train
from proxy_nca_jax.runtime import command_line

flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'eval'],
  'train trains and scores; eval only scores the newest checkpoint.',
)


def main(config, workdir):
  train.train_and_evaluate(config, workdir, mode=flags.FLAGS.mode)


def run():
  command_line.run(main)


if __name__ == '__main__':
  run()
