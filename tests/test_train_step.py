"""The training step on a network of two layers, and on a small one."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import one_convolution
import optax
from absl.testing import absltest, parameterized
from jax.extend import core as jax_core

from proxy_nca_jax import (
  losses,
  models,
  proxies,
  train_step,
)
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax import optimizer as optimizer_lib
from proxy_nca_jax import state as state_lib
from proxy_nca_jax.configs import default
from proxy_nca_jax.evaluate import embed as embed_lib

_NUM_CLASSES = 6


# pytest does not call the cleanups of unittest.enterModuleContext.
_replaced = one_convolution.replaced()


def setUpModule():
  _replaced.start()


def tearDownModule():
  _replaced.stop()


def _config(**fields):
  config = default.get_config()
  config.batch_size = 16
  config.model.width = 8
  config.dataset.image_size = 16
  config.optimizer.proxies.learning_rate = 1e-2
  config.update_from_flattened_dict(fields)
  return config


def _batches(config, num_batches):
  """Images of a class share a pattern, under noise."""
  rng = np.random.default_rng(0)
  patterns = rng.integers(0, 200, (_NUM_CLASSES, 16, 16, 3))
  for _ in range(num_batches):
    labels = rng.integers(0, _NUM_CLASSES, config.batch_size)
    noise = rng.integers(0, 56, (config.batch_size, 16, 16, 3))
    yield {
      'image': (patterns[labels] + noise).astype(np.uint8),
      'label': labels.astype(np.int32),
      'id': np.arange(config.batch_size, dtype=np.int32),
    }


class _Layers:
  """Two layers, named as the groups: they compile in no time."""

  def example(self, batch_size):
    return jax.ShapeDtypeStruct((batch_size, 16, 16, 3), jnp.uint8)

  def init(self, key, images, *, train):
    del train
    keys = jax.random.split(key)
    size = images[0].size
    return {
      'params': {
        'backbone': jax.random.normal(keys[0], (size, 32)) * size**-0.5,
        'head': jax.random.normal(keys[1], (32, 64)) * 32**-0.5,
      }
    }

  def apply(self, variables, images, *, train, mutable=None):
    del train
    params = variables['params']
    images = (images.reshape(len(images), -1) - 127.5) / 127.5
    features = images @ params['backbone']
    embeddings = jnp.tanh(features) @ params['head']
    return embeddings if mutable is None else (embeddings, {})


def _run(
  config,
  *,
  num_steps,
  devices=None,
  change=lambda batch: batch,
  loss=None,
  lr_scale=1.0,
  states=None,
  model=None,
  is_logged=None,
):
  mesh = mesh_lib.make_mesh(devices)
  model = model or _Layers()
  optimizer = optimizer_lib.make_optimizer(config)
  step = train_step.make_train_step(
    model,
    optimizer,
    loss or train_step.make_loss(config),
    learning_rates=optimizer_lib.make_learning_rates(config),
    reshard=train_step.make_reshard(config, _NUM_CLASSES, mesh),
    is_logged=is_logged,
    skip_nonfinite=config.optimizer.on_nonfinite == 'skip',
    update_memory=train_step.make_update_memory(config, mesh),
  )
  state = state_lib.create(
    config,
    model,
    optimizer,
    class_sizes=np.ones(_NUM_CLASSES, int),
    mesh=mesh,
  )
  history = []
  # A step takes the state before it away.
  states = [] if states is None else states
  states.append(jax.device_get(state))
  for batch in _batches(config, num_steps):
    batch = mesh_lib.shard_batch(change(batch), mesh)
    state, metrics = step(state, batch, lr_scale)
    history.append(jax.device_get(metrics))
    states.append(jax.device_get(state))
  embed_fn = embed_lib.make_embed_fn(model, mesh)
  return state, history, lambda *args: embed_fn(*args)['embedding']


class TrainStepTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_training_brings_examples_to_their_proxies(self, softmax):
    config = _config(**{'loss.proxy_nca.positive_in_denominator': softmax})
    state, history, embed = _run(
      config, num_steps=60, model=models.create_model(config)
    )
    self.assertLess(history[-1]['loss'], history[0]['loss'] - 1)
    self.assertGreater(history[-1]['proxy_accuracy'], 0.9)
    # Not only by the metric of the step: by the proxies themselves.
    batch = next(_batches(config, 1))
    nearest = proxies.nearest_proxies(
      embed(state, batch), state.params['proxies']
    )
    self.assertGreater(np.mean(nearest == batch['label']), 0.9)

  def test_every_group_is_trained(self):
    config = _config()
    before, _, _ = _run(config, num_steps=0)
    after, _, _ = _run(config, num_steps=1)
    for group in optimizer_lib.GROUPS:
      changed = jax.tree.map(
        lambda a, b: np.any(a != b), after.params[group], before.params[group]
      )
      self.assertTrue(all(jax.tree.leaves(changed)), group)
    self.assertEqual(after.step, 1)

  def test_the_step_scales_all_learning_rates(self):
    def apply(variables, images, **_):
      rows = images.reshape(len(images), -1) / 255
      params = variables['params']
      return rows @ params['backbone'] @ params['head'], {}

    config = _config(**{'optimizer.name': 'sgd'})
    optimizer = optimizer_lib.make_optimizer(config)
    step = train_step.make_train_step(
      types.SimpleNamespace(apply=apply),
      optimizer,
      train_step.make_loss(config),
    )
    rng = np.random.default_rng(0)
    shapes = {
      'backbone': (16 * 16 * 3, 5),
      'head': (5, 4),
      'proxies': (_NUM_CLASSES, 4),
    }
    params = {
      group: rng.normal(size=shape).astype(np.float32)
      for group, shape in shapes.items()
    }
    (batch,) = _batches(config, 1)

    def moved(*lr_scale):
      state = state_lib.TrainState(
        step=jnp.int32(0),
        params=jax.tree.map(jnp.array, params),
        loss_state={},
        model_state={},
        averages={},
        skipped_steps=jnp.int32(0),
        skipped_in_row=jnp.int32(0),
        opt_state=optimizer.init(params),
      )
      state, _ = step(state, batch, *lr_scale)
      return jax.tree.map(np.subtract, state.params, params)

    whole, half = moved(), moved(0.5)
    for group in optimizer_lib.GROUPS:
      self.assertTrue(np.any(whole[group]), group)
      np.testing.assert_allclose(
        2 * half[group], whole[group], rtol=1e-2, atol=1e-6
      )

  @parameterized.parameters(
    (
      'triplet',
      {'loss.triplet.mining': 'batch_hard', 'loss.triplet.margin': 99.0},
      (),
    ),
    ('magnet', {'loss.magnet.alpha': 4.0}, ()),
    ('center_softmax', {}, ('proxy_accuracy', 'proxy_error', 'ranking_bound')),
    ('soft_triple', {}, ('proxy_accuracy',)),
    ('fractional_proxy_nca', {}, ()),
  )
  def test_losses_are_given_what_they_need(self, name, arguments, metrics):
    config = _config(**{'loss.name': name, 'loss.num_proxies': 4, **arguments})
    loss = losses.LOSSES[name]
    before, _, _ = _run(config, num_steps=0)
    after, history, _ = _run(config, num_steps=10)
    self.assertLess(history[-1]['loss'], history[0]['loss'])
    groups = ('backbone', 'head') + (('proxies',) if loss.proxies else ())
    names = [
      f'{name}.{group}'
      for name in ('gradient_norm', 'learning_rate')
      for group in groups
    ] + (['proxy_norm'] if loss.proxies else [])
    self.assertSameElements(
      history[0], ('loss', 'gradient_norm', *names, *metrics)
    )
    forms = {
      losses.PER_CLASS: (_NUM_CLASSES, 64),
      losses.MULTI_CENTER: (_NUM_CLASSES, 3, 64),
      losses.UNASSIGNED: (4, 64),
    }
    if loss.proxies:
      self.assertEqual(after.params['proxies'].shape, forms[loss.proxies])
    else:
      self.assertEqual(after.params['proxies'], {})
    if loss.centers:
      centers = after.loss_state['centers']
      self.assertEqual(centers.shape, forms[loss.centers])
      self.assertTrue(np.any(centers != before.loss_state['centers']))
    if loss.has_assignment:
      np.testing.assert_array_equal(
        after.loss_state['assignment'], before.loss_state['assignment']
      )
      self.assertEqual(after.loss_state['assignment'].shape, (_NUM_CLASSES, 1))

  def test_eight_devices_remember_the_batches_that_one_does(self):
    config = _config(
      **{
        'loss.name': 'multi_similarity',
        'loss.pairs': 'semi_hard',
        'loss.memory_size': 40,
        'loss.memory_start': 1,
        'optimizer.name': 'sgd',
        'optimizer.head.learning_rate': 0.1,
      }
    )
    states = []
    one, one_history, _ = _run(
      config, num_steps=5, devices=jax.devices()[:1], states=states
    )
    eight, eight_history, _ = _run(config, num_steps=5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      (one_history, jax.device_get(one.loss_state)),
      (eight_history, jax.device_get(eight.loss_state)),
    )
    for array in jax.tree.leaves(eight.loss_state):
      self.assertTrue(array.is_fully_replicated)
    counts = [np.sum(x.loss_state['memory']['where']) for x in states]
    self.assertEqual(counts, [0, 0, 16, 32, 40, 40])
    labels = [batch['label'] for batch in _batches(config, 5)]
    np.testing.assert_array_equal(
      eight.loss_state['memory']['labels'],
      np.concatenate(labels[:1:-1])[:40],
    )

  def test_several_steps_of_one_dispatch_are_those_one_by_one(self):
    config = _config()
    mesh, model = mesh_lib.make_mesh(), _Layers()
    optimizer = optimizer_lib.make_optimizer(config)
    step = train_step.make_train_step(
      model,
      optimizer,
      train_step.make_loss(config),
    )
    batches = [
      mesh_lib.shard_batch(batch, mesh) for batch in _batches(config, 6)
    ]
    ends = []
    for size in (1, 3):
      state = state_lib.create(
        config,
        model,
        optimizer,
        class_sizes=np.ones(_NUM_CLASSES, int),
        mesh=mesh,
      )
      steps, losses_so_far = train_step.make_train_steps(step), []
      for first in range(0, 6, size):
        state, metrics = steps(state, batches[first : first + size], 0.5)
        losses_so_far.extend(np.atleast_1d(metrics['loss']))
      ends.append((losses_so_far, jax.device_get(state)))
    self.assertEqual(ends[1][1].step, 6)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      *ends,
    )

  def test_one_device_equals_eight(self):
    config = _config(**{'optimizer.name': 'sgd'})
    model = models.create_model(config)
    one, one_history, embed = _run(
      config, num_steps=50, devices=jax.devices()[:1], model=model
    )
    eight, eight_history, embed_by_eight = _run(
      config, num_steps=50, model=model
    )
    for a, b in zip(one_history, eight_history):
      np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params)):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    for a, b in zip(
      jax.tree.leaves(one.model_state), jax.tree.leaves(eight.model_state)
    ):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    batch = next(_batches(config, 1))
    np.testing.assert_allclose(
      embed(one, batch), embed_by_eight(eight, batch), atol=1e-4
    )


class PaddedBatchTest(parameterized.TestCase):
  @parameterized.parameters(
    # Whose statistics, centers and metrics have a row for each example, and a
    # loss of the batch as a whole.
    {'loss.name': 'center_softmax'},
    {'loss.name': 'proxy_anchor', 'proxies.sharded': True},
  )
  def test_a_batch_of_thirteen_on_eight_devices_equals_one(self, **fields):
    fields |= {'batch_size': 13, 'optimizer.name': 'sgd'}
    one_config = _config(**fields | {'proxies.sharded': False})
    model = models.create_model(one_config)
    one, one_history, _ = _run(
      one_config, num_steps=2, devices=jax.devices()[:1], model=model
    )

    def pad(batch):
      # Other pixels and another label would change all results.
      rows = {
        name: np.concatenate([x, x[:1], x[:1], x[:1]])
        for name, x in batch.items()
      }
      rows['image'][13:] = 255 - rows['image'][13:]
      return rows | {'mask': np.arange(16) < 13}

    eight, eight_history, _ = _run(
      _config(**fields), num_steps=2, model=model, change=pad
    )
    for a, b in zip(one_history, eight_history):
      self.assertSameElements(a, b)
      for metric in a:
        np.testing.assert_allclose(
          a[metric], b[metric], rtol=1e-4, atol=1e-5, err_msg=metric
        )
    eight.params['proxies'] = eight.params['proxies'][:_NUM_CLASSES]
    for name in ('params', 'model_state', 'loss_state'):
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        getattr(one, name),
        getattr(eight, name),
      )

  def test_masked_statistics_and_gradients_are_those_of_the_rows(self):
    config = _config()
    model = models.create_model(config)
    batch = next(_batches(config, 1))['image']
    where = np.arange(16) < 13
    variables = model.init(jax.random.key(0), batch, train=True)
    params, stats = variables['params'], variables['batch_stats']

    @functools.partial(jax.jit, static_argnames='num_rows')
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params, batch, mask, num_rows):
      with models.masked_statistics(mask):
        y, state = model.apply(
          {'params': params, 'batch_stats': stats},
          batch,
          train=True,
          mutable=['batch_stats'],
        )
      return jnp.sum(jnp.sin(9 * y[:num_rows])), state

    expected = gradients(params, batch[:13], None, 13)
    actual = gradients(params, batch, where, 13)
    without = gradients(params, batch, None, 13)
    compare = functools.partial(
      np.testing.assert_allclose, rtol=1e-3, atol=1e-4
    )
    jax.tree.map(compare, actual, expected)
    with self.assertRaises(AssertionError):
      jax.tree.map(compare, without, expected)


def _products(jaxpr):
  """Yields the products of a step that logs nothing."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield equation
    elif equation.primitive.name != 'cond':
      for inner in jax_core.jaxprs_in_params(equation.params):
        yield from _products(inner)


def _traced_products(config, num_classes):
  """Returns the products of a step with all proxies, if it logs nothing."""
  model, optimizer = _Layers(), optimizer_lib.make_optimizer(config)
  mesh = mesh_lib.make_mesh()
  step = train_step.make_train_step(
    model,
    optimizer,
    train_step.make_loss(config),
    reshard=train_step.make_reshard(config, num_classes, mesh),
    is_logged=lambda step: step % 10 == 0,
  )
  state = state_lib.abstract(
    config,
    model,
    optimizer,
    class_sizes=np.ones(num_classes, int),
    mesh=mesh,
  )
  (batch,) = _batches(config, 1)
  jaxpr = jax.make_jaxpr(step)(state, batch, 1.0).jaxpr
  return [
    equation
    for equation in _products(jaxpr)
    if any(
      size % num_classes == 0
      for x in (*equation.invars, *equation.outvars)
      for size in x.aval.shape
    )
  ]


class CostTest(parameterized.TestCase):
  @parameterized.parameters(
    *(name for name, loss in losses.LOSSES.items() if loss.has_class_proxies)
  )
  def test_a_step_multiplies_all_proxies_three_times(self, name):
    config = _config(**{'loss.name': name, 'loss.num_centers': 2})
    num_classes = 499  # No other array has a multiple of it.
    products = _traced_products(config, num_classes)
    flops = 0
    for equation in products:
      (axes, _), _ = equation.params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      flops += 2 * np.prod(equation.outvars[0].aval.shape) * shape[axes[0]]
    num_centers = 2 if losses.LOSSES[name].proxies == 'multi_center' else 1
    batch, dim = config.batch_size, config.model.embedding_dim
    self.assertEqual(flops, 6 * batch * num_classes * num_centers * dim)

  @parameterized.parameters('highest', 'high', 'default')
  def test_the_products_of_the_loss_have_the_configured_precision(self, name):
    for loss in ('proxy_nca', 'center_softmax'):
      config = _config(**{'loss.name': loss, 'loss.precision': name})
      products = _traced_products(config, 499)
      self.assertLen(products, 3)
      for equation in products:
        expected = (jax.lax.Precision[name.upper()],) * 2
        self.assertEqual(equation.params['precision'], expected)

  def test_metrics_of_proxies_are_those_of_steps_that_are_logged(self):
    config = _config(**{'proxies.sharded': True})
    _, every, _ = _run(config, num_steps=4)
    _, second, _ = _run(
      config, num_steps=4, is_logged=lambda step: step % 2 == 0
    )
    names = ('proxy_norm', 'proxy_accuracy', 'proxy_error', 'ranking_bound')
    for step, (expected, actual) in enumerate(zip(every, second), 1):
      self.assertSameElements(actual, expected)
      for name in expected:
        if name in names and step % 2:
          self.assertTrue(np.isnan(actual[name]), name)
        else:
          np.testing.assert_allclose(
            actual[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name
          )


class ShardedProxiesTest(parameterized.TestCase):
  @parameterized.parameters(
    'proxy_nca',
    'proxy_nca_pp',
    'normalized_softmax',
    'cosface',
    'arcface',
    'proxy_anchor',
    'proxy_triplet',
    'center_softmax',
    'soft_triple',
    'subcenter_arcface',
  )
  def test_eight_devices_that_share_them_equal_one(self, name):
    # Six classes: some of the devices have none.
    fields = {'loss.name': name, 'optimizer.name': 'sgd'}
    one, one_history, _ = _run(
      _config(**fields), num_steps=5, devices=jax.devices()[:1]
    )
    eight, eight_history, _ = _run(
      _config(**fields, **{'proxies.sharded': True}), num_steps=5
    )
    for a, b in zip(one_history, eight_history):
      for metric in a:
        np.testing.assert_allclose(a[metric], b[metric], rtol=2e-5, atol=1e-5)
    points, filling = np.split(eight.params['proxies'], [_NUM_CLASSES])
    np.testing.assert_allclose(
      points, one.params['proxies'], rtol=1e-3, atol=1e-5
    )
    np.testing.assert_array_equal(filling, np.zeros_like(filling))

  def test_no_device_holds_all_of_them(self):
    num_classes, batch_size, dim = 40_003, 32, 16
    mesh = mesh_lib.make_mesh()
    config = _config(**{'proxies.sharded': True, 'model.embedding_dim': dim})
    reshard = train_step.make_reshard(config, num_classes, mesh)
    loss = train_step.make_loss(config)

    def mean_loss(points, embeddings, labels):
      x, p, y = reshard(embeddings, points, labels)
      metrics = train_step._proxy_metrics(losses.PER_CLASS, x, p, y, None)
      value = loss.fn(embeddings=x, proxies=p, labels=y)
      return jnp.mean(value), metrics

    rows = mesh_lib.by_row(mesh)
    compiled = (
      jax.jit(
        jax.value_and_grad(mean_loss, (0, 1), has_aux=True),
        out_shardings=(mesh_lib.replicated(mesh), (rows, rows)),
      )
      .lower(
        *(
          jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
          for shape, dtype in (
            ((40_008, dim), jnp.float32),
            ((batch_size, dim), jnp.float32),
            ((batch_size,), jnp.int32),
          )
        )
      )
      .compile()
    )
    memory = compiled.memory_analysis()
    # Less than one [batch, proxies] matrix.
    self.assertLess(memory.temp_size_in_bytes, 4 * num_classes * batch_size)
    self.assertLess(memory.argument_size_in_bytes, num_classes * dim)
    self.assertNotRegex(compiled.as_text(), r'\[40008|\[40003|,40008|,40003')


class GroupMetricsTest(parameterized.TestCase):
  @parameterized.parameters('stop', 'skip')
  def test_what_moves_is_the_rate_times_the_gradient(self, on_nonfinite):
    config = _config(
      **{
        'optimizer.name': 'sgd',
        'optimizer.momentum': 0.0,
        'optimizer.on_nonfinite': on_nonfinite,
        'optimizer.backbone.freeze_steps': 2,
        'optimizer.backbone.warmup_steps': 2,
        'optimizer.head.schedule': 'exponential',
        'optimizer.head.decay_every': 1,
        'optimizer.head.decay_rate': 0.5,
      }
    )
    # The schedules wait while steps are skipped.
    bad = (2, 4) if on_nonfinite == 'skip' else ()
    loss = train_step.make_loss(config)
    if bad:
      loss = broken_loss(loss, 'gradient')
    states, seen = [], []
    _, history, _ = _run(
      config,
      num_steps=7,
      loss=loss,
      lr_scale=0.25,
      change=_change_of(bad),
      states=states,
    )
    for step, metrics in enumerate(history, 1):
      if step in bad:
        continue
      norms = [metrics[f'gradient_norm.{g}'] for g in optimizer_lib.GROUPS]
      np.testing.assert_allclose(
        metrics['gradient_norm'], np.linalg.norm(norms), rtol=1e-5
      )
      for group, norm in zip(optimizer_lib.GROUPS, norms):
        moved = optax.tree.norm(
          jax.tree.map(
            np.subtract,
            states[step].params[group],
            states[step - 1].params[group],
          )
        )
        # Rounded as the parameters are.
        np.testing.assert_allclose(
          moved,
          norm * metrics[f'learning_rate.{group}'],
          rtol=2e-2,
          atol=1e-6,
        )
      seen.append(metrics)
    backbone, head = (
      [metrics[f'learning_rate.{group}'] for metrics in seen[:5]]
      for group in ('backbone', 'head')
    )
    rate = 0.25 * 1e-3
    np.testing.assert_allclose(backbone, rate * np.array([0, 0, 0, 0.5, 1]))
    np.testing.assert_allclose(head, rate * 0.5 ** np.arange(5))

  @parameterized.parameters('proxy_nca', 'soft_triple')
  def test_the_norm_of_the_proxies_is_their_mean(self, name):
    config = _config(**{'loss.name': name, 'proxies.init_norm': 3.0})
    states = []
    _, history, _ = _run(config, num_steps=1, states=states)
    rows = np.reshape(states[0].params['proxies'], (-1, 64))
    np.testing.assert_allclose(
      history[0]['proxy_norm'], np.mean(np.linalg.norm(rows, axis=1)), rtol=1e-5
    )


def _change_of(bad):
  """Returns what gives the batches of some steps only labels of 0."""
  steps = itertools.count(1)

  def change(batch):
    is_bad = next(steps) in bad
    return batch | {'label': batch['label'] * (not is_bad)}

  return change


def broken_loss(loss, what):
  """A loss that is not finite where all labels are 0: it, or its gradient."""

  def fn(*, embeddings, labels, **arrays):
    value = loss.fn(embeddings=embeddings, labels=labels, **arrays)
    is_bad = jnp.all(labels == 0)
    if what == 'loss':
      return value + jnp.where(is_bad, jnp.inf, 0)
    # The root's slope at 0 is infinite, and 0 times that is not a number.
    return value + jnp.sqrt(jnp.where(is_bad, 0 * embeddings[:, 0], 1))

  return loss._replace(fn=fn)


class NonfiniteTest(parameterized.TestCase):
  @parameterized.parameters('loss', 'gradient')
  def test_a_skipped_step_changes_its_number_and_counts_alone(self, what):
    # With batch statistics, centres, moments, and a group that waits.
    config = _config(
      **{
        'loss.name': 'center_softmax',
        'optimizer.on_nonfinite': 'skip',
        'optimizer.backbone.freeze_steps': 2,
      }
    )
    states = []
    later, history, _ = _run(
      config,
      num_steps=20,
      model=models.create_model(config),
      loss=broken_loss(train_step.make_loss(config), what),
      change=_change_of((2, 3)),
      states=states,
    )
    _, before, _, after, *_ = states
    for name in ('params', 'model_state', 'loss_state', 'opt_state'):
      jax.tree.map(
        np.testing.assert_array_equal,
        getattr(after, name),
        getattr(before, name),
      )
    self.assertEqual(after.step, 3)
    counts = [
      (metrics['skipped_steps'], metrics['skipped_in_row'])
      for metrics in history[:4]
    ]
    self.assertEqual(counts, [(0, 0), (1, 1), (2, 2), (2, 0)])
    for metrics in history[1:3]:
      self.assertEqual(np.isfinite(metrics['loss']), what == 'gradient')
    # And it goes on.
    self.assertEqual(history[-1]['skipped_steps'], 2)
    self.assertLess(history[-1]['loss'], history[0]['loss'] - 0.1)
    for group in optimizer_lib.GROUPS:
      changed = jax.tree.map(
        lambda a, b: np.any(a != b), later.params[group], after.params[group]
      )
      self.assertTrue(all(jax.tree.leaves(changed)), group)


class FrequencyTest(parameterized.TestCase):
  def _loss(self, **fields):
    config = _config(**fields)
    return train_step.correct_for_frequency(
      train_step.make_loss(config), config, np.array([8, 4, 2])
    )

  def test_weights_and_priors_reach_the_loss(self):
    rng = np.random.default_rng(0)
    arrays = {
      'embeddings': jnp.array(rng.normal(size=(4, 5))),
      'proxies': jnp.array(rng.normal(size=(3, 5))),
    }
    labels, sizes = np.array([0, 1, 2, 2]), np.array([8, 4, 2])
    weights = losses.class_weights(sizes, power=0.5)
    np.testing.assert_allclose(
      self._loss(**{'loss.class_weighting': 0.5}).fn(labels=labels, **arrays),
      weights[labels] * losses.proxy_nca_loss(labels=labels, **arrays),
      rtol=1e-6,
    )
    np.testing.assert_allclose(
      self._loss(**{'loss.logit_adjustment': 2.0}).fn(labels=labels, **arrays),
      losses.proxy_nca_loss(
        labels=labels, log_priors=losses.log_priors(sizes, power=2.0), **arrays
      ),
      rtol=1e-6,
    )

  def test_large_classes_have_more_proxies(self):
    config = _config(
      **{
        'loss.name': 'fractional_proxy_nca',
        'loss.num_proxies': 4,
        'proxies.by_size': True,
      }
    )
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = state_lib.create_loss_arrays(
      config, keys, class_sizes=np.array([1, 9, 1])
    )
    np.testing.assert_array_equal(
      arrays['assignment'], [[0, 0], [1, 2], [3, 3]]
    )


if __name__ == '__main__':
  absltest.main()
