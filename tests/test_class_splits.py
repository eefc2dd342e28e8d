import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax.datasets import class_splits


class SplitTest(parameterized.TestCase):
  def _split(self, total=20, **changes):
    arguments = dict(
      num_train_classes=None, num_classes=0, test_fraction=0.5, seed=0
    )
    return class_splits.split_classes(total, **(arguments | changes))

  def test_train_and_test_classes_do_not_overlap(self):
    train, test = self._split(21, test_fraction=0.25)
    self.assertLen(train, 16)
    np.testing.assert_array_equal(
      np.sort(np.concatenate([train, test])), np.arange(21)
    )

  def test_the_seed_decides(self):
    np.testing.assert_array_equal(self._split()[0], self._split()[0])
    self.assertTrue(np.any(self._split()[0] != self._split(seed=1)[0]))

  def test_a_given_number_of_train_classes_comes_first(self):
    train, test = self._split(num_train_classes=15)
    np.testing.assert_array_equal(train, np.arange(15))
    np.testing.assert_array_equal(test, np.arange(15, 20))

  @parameterized.parameters(
    ({'num_classes': 21}, '.21. must be in .1, 20.'),
    ({'num_classes': -1}, '.-1. must be in .1, 20.'),
    ({'num_classes': 3}, '1 train and 2 test|2 train and 1 test'),
    ({'test_fraction': 0.0}, 'test_fraction'),
    ({'test_fraction': 1.0}, 'test_fraction'),
    ({'num_train_classes': 19}, 'at least 2'),
  )
  def test_impossible_requests_are_errors(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      self._split(**changes)


class ValidationTest(parameterized.TestCase):
  # ProxyNCA++'s second halves of CUB, Cars, SOP and In-Shop.
  @parameterized.parameters((100, 50), (98, 49), (11318, 5659), (3997, 1998))
  def test_the_second_half_is_for_validation(self, total, half):
    train, validation = class_splits.split_validation(np.arange(total), '2/2')
    np.testing.assert_array_equal(train, np.arange(half))
    np.testing.assert_array_equal(validation, np.arange(half, total))

  def test_folds_cover_the_train_classes_once(self):
    classes = np.array([3, 5, 8, 9, 11, 20, 21, 22, 30])
    parts = []
    for fold in ('1/4', '2/4', '3/4', '4/4'):
      train, validation = class_splits.split_validation(classes, fold)
      np.testing.assert_array_equal(
        np.sort(np.concatenate([train, validation])), classes
      )
      parts.append(validation)
    np.testing.assert_array_equal(np.concatenate(parts), classes)

  def test_without_validation_all_classes_are_for_training(self):
    train, validation = class_splits.split_validation(np.arange(9), '')
    self.assertLen(train, 9)
    self.assertEmpty(validation)

  @parameterized.parameters('half', '0/2', '3/2', '1/1', '1/9', '1/2/3')
  def test_malformed_parts_are_errors(self, part):
    with self.assertRaisesRegex(ValueError, 'config.dataset.validation'):
      class_splits.split_validation(np.arange(9), part)


class MakeLongTailedTest(parameterized.TestCase):
  def test_classes_become_long_tailed(self):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(50), 80))
    learned, held_out = class_splits.make_long_tailed(labels, 20.0, seed=0)
    self.assertEmpty(np.intersect1d(learned, held_out))
    np.testing.assert_array_equal(np.bincount(labels[held_out]), 20)
    sizes = np.sort(np.bincount(labels[learned]))
    # 60 of 80 are not held out, and 3 is a twentieth of them.
    self.assertEqual((sizes[0], sizes[-1]), (3, 60))
    np.testing.assert_allclose(
      sizes, 60 * 20 ** -np.linspace(1, 0, 50), atol=0.5
    )

  def test_the_seed_decides(self):
    labels = np.repeat(np.arange(5), 40)
    first, again, other = (
      class_splits.make_long_tailed(labels, 10.0, seed=seed)[0]
      for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    self.assertNotEqual(
      np.bincount(labels[first]).tolist(), np.bincount(labels[other]).tolist()
    )

  def test_two_images_per_class_suffice(self):
    learned, held_out = class_splits.make_long_tailed(
      np.array([0, 0, 1, 1]), 9.0, seed=0
    )
    self.assertEqual((len(learned), len(held_out)), (2, 2))

  @parameterized.parameters(
    ([0, 0, 1, 1], 1.0, 'long_tail .1.0., .* must be above 1'),
    ([0, 1, 1], 9.0, '1 classes have a single image'),
  )
  def test_invalid_arguments_are_errors(self, labels, ratio, message):
    with self.assertRaisesRegex(ValueError, message):
      class_splits.make_long_tailed(np.array(labels), ratio, seed=0)


class ChooseClassesTest(absltest.TestCase):
  def test_subsets_are_nested(self):
    classes = np.arange(10, 40)
    few, more = (
      class_splits.choose_classes(classes, number, seed=3) for number in (5, 20)
    )
    self.assertLen(few, 5)
    self.assertContainsSubset(few, more)
    self.assertContainsSubset(more, classes)
    np.testing.assert_array_equal(more, np.sort(more))
    np.testing.assert_array_equal(
      class_splits.choose_classes(classes, 0, seed=3), classes
    )

  def test_numbers_out_of_range_are_errors(self):
    with self.assertRaisesRegex(ValueError, 'num_train_classes .31. must be'):
      class_splits.choose_classes(np.arange(30), 31, seed=0)


if __name__ == '__main__':
  absltest.main()
