"""Trains and scores a run: main.py --config=configs/glyphs.py --workdir=DIR."""

from absl import flags

from proxy_nca_jax import command_line, train

flags.DEFINE_enum(
  'mode', 'train', ['train', 'eval'], 'eval scores the newest checkpoint.'
)


def main(config, workdir):
  train.train_and_evaluate(config, workdir, mode=flags.FLAGS.mode)


def run():
  command_line.run(main)


if __name__ == '__main__':
  run()
