import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import one_convolution
from absl.testing import absltest, parameterized

from proxy_nca_jax import losses, models, warm_start
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import default
from proxy_nca_jax.evaluate import scores

_NUM_CLASSES, _PER_CLASS = 8, 12


def _make_features(seed=0, num_classes=_NUM_CLASSES, width=24):
  """Classes that differ in four directions; images differ in four others."""
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(num_classes), _PER_CLASS)
  features = 0.1 * rng.normal(size=(len(labels), width))
  features[:, :4] += rng.normal(size=(num_classes, 4))[labels]
  features[:, 4:8] += 3 * rng.normal(size=(len(labels), 4))
  return features.astype(np.float32) + 5, labels.astype(np.int32)


def _apply(head, features):
  return features @ head['embedding']['kernel'] + head['embedding']['bias']


class HeadTest(parameterized.TestCase):
  def test_pca_gives_the_principal_components(self):
    features, labels = _make_features()
    head = warm_start.make_head(features, labels, 5, init='pca', seed=0)
    covariance = np.cov(_apply(head, features).T, bias=True)
    expected = np.linalg.eigvalsh(np.cov(features.T, bias=True))[::-1][:5]
    np.testing.assert_allclose(
      covariance, np.diag(expected), rtol=1e-3, atol=1e-3
    )

  @parameterized.parameters('pca', 'lda')
  def test_embeddings_of_the_train_images_have_mean_zero(self, init):
    features, labels = _make_features()
    head = warm_start.make_head(features, labels, 5, init=init, seed=0)
    np.testing.assert_allclose(
      _apply(head, features).mean(axis=0), 0, atol=1e-5
    )

  def test_lda_finds_unseen_classes_where_pca_follows_the_noise(self):
    features, labels = _make_features()
    unseen, unseen_labels = _make_features(seed=1)
    recall = {}
    for init in ('pca', 'lda'):
      head = warm_start.make_head(features, labels, 4, init=init, seed=0)
      embeddings = _apply(head, unseen)
      recall[init] = scores.score(
        embeddings, unseen_labels, kmeans_iterations=0
      )['recall@1']
    self.assertLess(recall['pca'], 0.4)
    self.assertGreater(recall['lda'], 0.55)

  def test_few_images_leave_the_other_directions_in_place(self):
    # Three images span two dimensions; distances in the others must survive.
    features, _ = _make_features()
    head = warm_start.make_head(
      features[:3], np.array([0, 0, 1]), 24, init='pca', seed=0
    )
    kernel = head['embedding']['kernel']
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(24), atol=1e-5)

  @parameterized.parameters('pca', 'lda')
  def test_few_images_leave_room_for_the_directions_of_a_classifier(self, init):
    features, _ = _make_features()
    # Its classes differ in the last two features.
    classifier = np.random.default_rng(0).normal(size=(10, 24))
    classifier[:, :22] = 1
    head = warm_start.make_head(
      features[:3],
      np.array([0, 0, 1]),
      4,
      init=init,
      classifier=classifier,
      seed=0,
    )
    kernel = head['embedding']['kernel']
    distances = np.linalg.norm(kernel[-2:], axis=1)
    self.assertGreater(np.min(distances), 0.9)

  @parameterized.parameters('pca', 'lda')
  def test_head_may_be_wider_than_the_features(self, init):
    features, labels = _make_features()
    head = warm_start.make_head(features, labels, 30, init=init, seed=0)
    self.assertEqual(head['embedding']['kernel'].shape, (24, 30))
    self.assertTrue(np.all(head['embedding']['kernel'][:, 24:] == 0))

  @parameterized.parameters('pca', 'lda')
  def test_equal_images_give_finite_heads(self, init):
    features = np.ones((6, 8), np.float32)
    labels = np.repeat([0, 1], 3)
    head = warm_start.make_head(features, labels, 4, init=init, seed=0)
    self.assertTrue(np.all(np.isfinite(head['embedding']['kernel'])))

  @parameterized.parameters('pca', 'lda')
  def test_blocks_of_features_give_the_same_head(self, init):
    features, labels = _make_features()
    features = features[np.argsort(labels % 3)]  # Blocks share classes.
    labels = labels[np.argsort(labels % 3)]
    whole, blocks = (
      self._head_of_blocks(size, features, labels, init) for size in (999, 7)
    )
    np.testing.assert_allclose(blocks @ blocks.T, whole @ whole.T, atol=1e-6)

  def _head_of_blocks(self, size, features, labels, init):
    with mock.patch.object(warm_start, '_BLOCK', size):
      head = warm_start.make_head(features, labels, 5, init=init, seed=0)
    return head['embedding']['kernel']

  def test_identity_gives_the_features(self):
    features, labels = _make_features()
    head = warm_start.make_head(features, labels, 24, init='identity', seed=0)
    np.testing.assert_array_equal(_apply(head, features), features)

  def test_identity_needs_as_many_dimensions(self):
    features, labels = _make_features()
    with self.assertRaisesRegex(ValueError, r'keeps the 24 .* is 5: set it to'):
      warm_start.make_head(features, labels, 5, init='identity', seed=0)


class StatisticsTest(absltest.TestCase):
  @one_convolution.replaced()
  def test_measured_statistics_give_the_features_of_training(self):
    config = default.get_config()
    config.evaluation.batch_size, config.dataset.image_size = 24, 8
    config.model.width = 4
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    batches = mock.Mock(
      return_value=[
        {'image': images[:24], 'mask': np.ones(24, bool)},
      ]
    )
    model, mesh = models.create_model(config), mesh_lib.make_mesh()
    state = state_lib.create(
      config,
      model,
      optimizer_lib.make_optimizer(config),
      class_sizes=np.ones(2, int),
      mesh=mesh,
    )
    split = mock.MagicMock()
    split.__len__.return_value = 30
    with mock.patch.object(
      warm_start.input_pipeline, 'evaluation_batches', batches
    ):
      measured = warm_start.measure_statistics(
        config, model, state, split, mesh
      )
    rows = split.subset.call_args[0][0]
    self.assertLen(set(rows.tolist()), 24)
    params = {name: state.params[name] for name in ('backbone', 'head')}
    expected, _ = model.apply(
      {'params': params, **state.model_state},
      images[:24],
      train=True,
      mutable=['batch_stats'],
    )
    actual = model.apply(
      {'params': params, **measured.model_state}, images[:24], train=False
    )
    # The running variance is unbiased: the last layer has 24 positions.
    np.testing.assert_allclose(actual, expected, atol=0.05)


class CentersTest(absltest.TestCase):
  def test_k_means_finds_the_groups_of_each_class(self):
    # Two classes with two groups of images each, in blocks that cut them.
    rng = np.random.default_rng(0)
    groups = np.eye(4)[rng.integers(0, 4, 60)]
    labels = np.argmax(groups, axis=1) % 2
    embeddings = groups + 0.01 * rng.normal(size=(60, 4))

    centers = warm_start.class_centers(
      lambda: np.split(embeddings, [7, 31]), labels, 2, seed=0
    )
    for label in range(2):
      found = np.sort(np.argmax(centers[label], axis=1))
      np.testing.assert_array_equal(found, [label, label + 2])
      self.assertGreater(centers[label].max(axis=1).min(), 0.99)

  def test_one_center_is_the_mean(self):
    embeddings = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    centers = warm_start.class_centers(
      lambda: [embeddings], np.array([0, 0, 1]), 1, seed=0
    )
    np.testing.assert_allclose(
      centers, [[[0.5**0.5, 0.5**0.5]], [[0, 1]]], atol=1e-6
    )

  def test_more_centers_than_images_differ(self):
    centers = warm_start.class_centers(
      lambda: [np.ones((1, 4))], np.zeros(1, int), 3, seed=0
    )
    np.testing.assert_allclose(centers, 0.5, atol=0.03)
    self.assertGreater(np.std(centers, axis=1).min(), 1e-5)


class ApplyTest(parameterized.TestCase):
  def _apply(self, **fields):
    config = default.get_config()
    with config.unlocked():
      config.update_from_flattened_dict(
        {'model.width': 6, 'model.embedding_dim': 16, **fields}
      )
    mesh = mesh_lib.make_mesh()
    model = models.create_model(config)
    state = state_lib.create(
      config,
      model,
      optimizer_lib.make_optimizer(config),
      class_sizes=np.full(_NUM_CLASSES, _PER_CLASS),
      mesh=mesh,
    )
    features, labels = _make_features()  # 24 = 4 x width.
    loss = losses.LOSSES[config.loss.name]
    new = warm_start.apply(config, model, loss, state, features, labels, mesh)
    return model, loss, state, new, features, labels

  def _mean_loss(self, model, loss, state, features, labels):
    params = {'head': jax.tree.map(np.asarray, state.params['head'])}
    embeddings = model.apply({'params': params}, features, method='project')
    proxies = mesh_lib.fetch(state.params['proxies'])[:_NUM_CLASSES]
    return float(
      jnp.mean(loss.fn(embeddings, jnp.asarray(proxies), jnp.asarray(labels)))
    )

  @parameterized.parameters(False, True)
  def test_proxies_become_the_means_of_their_classes(self, sharded):
    model, _, _, new, features, labels = self._apply(
      **{
        'model.head_init': 'pca',
        'proxies.init': 'class_means',
        'proxies.sharded': sharded,
      }
    )
    params = {'head': jax.tree.map(np.asarray, new.params['head'])}
    embeddings = model.apply({'params': params}, features, method='project')
    means = np.stack(
      [
        np.mean(np.asarray(embeddings)[labels == label], axis=0)
        for label in range(_NUM_CLASSES)
      ]
    )
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    proxies = mesh_lib.fetch(new.params['proxies'])
    np.testing.assert_allclose(proxies[:_NUM_CLASSES], means, atol=1e-5)
    self.assertTrue(np.all(proxies[_NUM_CLASSES:] == 0))

  def test_a_random_head_is_centered_before_the_centers_are_found(self):
    model, _, _, new, features, labels = self._apply(
      **{
        'loss.name': 'soft_triple',
        'loss.num_centers': 2,
        'model.head_hidden': 5,
        'proxies.init': 'class_means',
        'proxies.init_norm': 3.0,
        'proxies.sharded': True,
      }
    )
    params = jax.tree.map(np.asarray, new.params['head'])
    hidden = features @ params['hidden']['kernel'] + params['hidden']['bias']
    outputs = _apply(params, np.maximum(hidden, 0))
    np.testing.assert_allclose(outputs.mean(axis=0), 0, atol=1e-4)
    embeddings = outputs / np.linalg.norm(outputs, axis=1, keepdims=True)
    expected = warm_start.class_centers(lambda: [embeddings], labels, 2, seed=0)
    proxies = mesh_lib.fetch(new.params['proxies'])
    np.testing.assert_allclose(proxies, 3 * expected, atol=1e-3)

  def test_head_steps_lower_the_loss_and_leave_the_backbone(self):
    fields = {'model.head_init': 'pca', 'proxies.init': 'class_means'}
    model, loss, old, start, features, labels = self._apply(**fields)
    _, _, _, new, _, _ = self._apply(**fields, head_steps=50)
    before, after = (
      self._mean_loss(model, loss, state, features, labels)
      for state in (start, new)
    )
    self.assertLess(after, before - 0.01)
    jax.tree.map(
      np.testing.assert_array_equal,
      dataclasses.asdict(old)['params']['backbone'],
      dataclasses.asdict(new)['params']['backbone'],
    )


if __name__ == '__main__':
  absltest.main()
