import json
import os

from absl.testing import absltest, parameterized

from configs import default
from proxy_nca_jax import optimizer, workdir


def _config(**fields):
  config = default.get_config()
  config.update_from_flattened_dict(fields)
  return config


class WorkdirTest(absltest.TestCase):

  def test_json_comes_back(self):
    path = os.path.join(self.create_tempdir(), 'a.json')
    self.assertIsNone(workdir.read_json(path))
    workdir.write_json(path, {'a': [1, 2]})
    self.assertEqual(workdir.read_json(path), {'a': [1, 2]})

  def test_json_is_written_whole_or_not_at_all(self):
    path = os.path.join(self.create_tempdir(), 'results.json')
    workdir.write_json(path, {'a': 1})
    with self.assertRaises(TypeError):
      workdir.write_json(path, {'a': object()})
    with open(path) as file:
      self.assertEqual(json.load(file), {'a': 1})


class SameRunTest(parameterized.TestCase):

  def _check(self, saved, **fields):
    config = _config(**fields)
    workdir.check_same_run(
      config,
      workdir.as_json(saved),
      may_add_steps=not optimizer.depends_on_num_steps(config),
    )

  def test_the_same_configuration_passes(self):
    self._check(_config())

  @parameterized.parameters(
    {'log_every': 1}, {'save_every': 3}, {'keep_checkpoints': 9},
    {'dataset.root': '/elsewhere'}, {'dataset.data_dir': '/elsewhere'},
    {'dataset.num_workers': 2}, {'profile_steps': (1, 2)},
    {'stall_seconds': 1.0}, {'optimizer.max_skipped_steps': 1},
  )
  def test_fields_beside_the_mathematics_may_differ(self, **fields):
    self._check(_config(), **fields)

  @parameterized.parameters(
    {'seed': 1}, {'batch_size': 32}, {'loss.proxy_nca.temperature': 0.5},
    {'optimizer.proxies.learning_rate': 2.0}, {'eval_every': 7},
    {'dataset.split_seed': 1}, {'num_steps': 10},
    {'optimizer.on_nonfinite': 'skip'},
  )
  def test_any_other_field_is_named(self, **fields):
    (name,) = fields
    with self.assertRaisesRegex(ValueError, name):
      self._check(_config(), **fields)

  def test_all_differing_fields_are_named_at_once(self):
    with self.assertRaisesRegex(ValueError, 'batch_size.*seed'):
      self._check(_config(), seed=1, batch_size=32)

  def test_steps_may_be_added_unless_the_schedule_knows_their_number(self):
    self._check(_config(), num_steps=2000)
    cosine = {'optimizer.head.schedule': 'cosine'}
    with self.assertRaisesRegex(ValueError, 'num_steps'):
      self._check(_config(**cosine), num_steps=2000, **cosine)

  def test_a_field_that_one_side_lacks_is_named(self):
    saved = workdir.as_json(_config())
    del saved['model']['width']
    with self.assertRaisesRegex(ValueError, 'model.width was .absent'):
      workdir.check_same_run(_config(), saved, may_add_steps=True)


if __name__ == '__main__':
  absltest.main()
