import contextlib
import csv
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import types

import jax
import numpy as np
import oracles
import whole_runs
from absl.testing import absltest, parameterized

from proxy_nca_jax import datasets, evaluate
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.configs import default
from proxy_nca_jax.evaluate import __main__ as evaluate_main
from proxy_nca_jax.evaluate import embed as embed_lib
from proxy_nca_jax.evaluate import scores as scores_lib
from proxy_nca_jax.runtime import signals


def _evaluate(embeddings, labels, **kwargs):
  return evaluate.score(
    np.asarray(embeddings, np.float32),
    np.asarray(labels),
    **{'recall_at': (1, 4), 'kmeans_iterations': 0, **kwargs},
  )


class ScoreTest(parameterized.TestCase):
  def test_equals_the_oracle_on_the_same_similarities(self):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(60, 5)).astype(np.float32)
    labels = rng.integers(0, 9, 60)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = oracles.retrieval_scores(unit @ unit.T, labels, (1, 4))
    actual = _evaluate(embeddings, labels, kmeans_iterations=5)
    for name in ('recall@1', 'recall@4', 'map@r', 'r_precision', 'map'):
      self.assertAlmostEqual(actual[name], expected[name], 12, name)
    for name in ('nmi', 'f1', 'purity'):
      self.assertBetween(actual[name], 0, 1)
    nearest = _evaluate(embeddings, labels, nearest_only=True)
    for name in ('recall@1', 'recall@4', 'mrr'):
      self.assertEqual(nearest[name], actual[name])
    for name in ('map@r', 'r_precision', 'map', 'nmi'):
      self.assertNotIn(name, nearest)

  def test_devices_change_nothing(self):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 30, 300)
    centers = rng.normal(size=(30, 16))
    embeddings = centers[labels] + rng.normal(size=(300, 16))
    kwargs = {'num_resamples': 10, 'kmeans_iterations': 5}
    expected = _evaluate(embeddings, labels, **kwargs)
    mesh = mesh_lib.make_mesh()
    actual = _evaluate(embeddings, labels, mesh=mesh, **kwargs)
    self.assertEqual(actual, expected)

  def test_queries_search_a_gallery_and_cameras_are_left_out(self):
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(80, 5)).astype(np.float32)
    labels, cameras = rng.integers(0, 9, 80), rng.integers(1, 4, 80)
    is_query = rng.random(80) < 0.3
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = oracles.retrieval_scores(unit @ unit.T, labels, (1, 4), is_query)
    actual = _evaluate(embeddings, labels, is_query=is_query)
    for name in ('recall@1', 'recall@4', 'map@r', 'r_precision'):
      self.assertAlmostEqual(actual[name], expected[name], 12, name)
    self.assertEqual(actual['num_queries'], is_query.sum())
    expected = oracles.retrieval_scores(
      unit @ unit.T, labels, (1, 4), is_query, cameras
    )
    actual = _evaluate(embeddings, labels, is_query=is_query, cameras=cameras)
    self.assertAlmostEqual(actual['cmc@1'], expected['recall@1'], 12)
    self.assertAlmostEqual(actual['cmc@4'], expected['recall@4'], 12)
    self.assertAlmostEqual(actual['map'], expected['map'], 12)
    self.assertNotIn('nmi', actual)

  def test_a_query_without_match_in_the_gallery_is_in_no_mean(self):
    embeddings = [[1, 0], [0, 1], [1, 0.1], [0.1, 1], [1, 1]]
    scores = _evaluate(
      embeddings,
      [0, 7, 0, 1, 1],
      is_query=np.array([True, True, False, False, False]),
    )
    self.assertEqual(scores['num_queries'], 1)
    self.assertEqual(scores['queries_without_match'], 1)
    self.assertEqual(scores['recall@1'], 1.0)

  def test_the_length_of_an_embedding_does_not_matter(self):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(40, 5))
    lengths = 2.0 ** rng.integers(-60, 60, (40, 1))
    labels = rng.integers(0, 5, 40)
    self.assertEqual(
      _evaluate(embeddings, labels, kmeans_iterations=5),
      _evaluate(embeddings * lengths, labels, kmeans_iterations=5),
    )

  def test_the_order_of_rows_changes_no_rank_metric_by_a_bit(self):
    rng = np.random.default_rng(0)
    embeddings = np.eye(4)[rng.integers(0, 4, 50)]
    labels = rng.integers(0, 9, 50)
    order = rng.permutation(50)
    expected = _evaluate(embeddings, labels)
    actual = _evaluate(embeddings[order], labels[order])
    for name in ('recall@1', 'recall@4', 'map@r', 'r_precision'):
      self.assertEqual(actual[name], expected[name])

  def test_items_alone_in_their_class_are_counted_and_in_no_mean(self):
    # The lone item is nearest to the first: it stays in the gallery.
    embeddings = [[1, 0], [0.9, 0.5], [1, 0.1], [0, 1], [0.1, 1]]
    scores = _evaluate(embeddings, [0, 0, 7, 1, 1])
    self.assertEqual(scores['queries_without_match'], 1)
    self.assertEqual(scores['num_queries'], 4)
    self.assertEqual(scores['recall@1'], 2 / 4)
    self.assertEqual(scores['num_classes'], 3)

  def test_recall_of_frequent_and_rare_classes(self):
    # Two classes of 2, two of 3, two of 5, far apart; one of 5 is split.
    sizes = np.array([2, 2, 3, 3, 5, 5])
    labels = np.repeat(np.arange(6), sizes)
    embeddings = np.eye(7)[labels]
    embeddings[-1] = np.eye(7)[6]
    scores = _evaluate(embeddings, labels)
    self.assertEqual(scores['recall@1_tail'], 1)
    self.assertEqual(scores['recall@1_middle'], 1)
    self.assertEqual(scores['recall@1_head'], 9 / 10)
    # By what is searched, the split class is the rarest.
    is_query = np.zeros(20, bool)
    is_query[-4:] = True
    scores = _evaluate(embeddings, labels, is_query=is_query)
    self.assertEqual(scores['recall@1_tail'], 3 / 4)
    self.assertNotIn('recall@1_head', scores)
    even = _evaluate(embeddings[:4], labels[:4])
    self.assertNotIn('recall@1_tail', even)

  def test_no_match_at_all_is_an_error(self):
    with self.assertRaisesRegex(ValueError, 'None of the 3 queries'):
      _evaluate(np.eye(3), [0, 1, 2])

  def test_no_query_at_all_is_an_error(self):
    for num_queries in (0, 3):
      with self.assertRaisesRegex(ValueError, f'{num_queries} queries'):
        _evaluate(np.eye(3), [0, 0, 1], is_query=np.arange(3) < num_queries)

  @parameterized.parameters(np.nan, np.inf)
  def test_embeddings_must_be_finite(self, value):
    with self.assertRaisesRegex(ValueError, 'not finite'):
      _evaluate([[value, 1], [1, 1]], [0, 0])

  @parameterized.parameters(
    ({'labels': [0, 0, 1]}, r'4 embeddings, so labels .*\(4,\); got \(3,\)'),
    ({'cameras': np.zeros(5)}, r'cameras must have shape \(4,\)'),
    ({'is_query': np.zeros((4, 1), bool)}, r'is_query must have shape'),
    ({'embeddings': np.zeros(4)}, 'must be a matrix'),
    ({'embeddings': np.zeros((0, 4)), 'labels': []}, 'at least one row'),
  )
  def test_what_does_not_fit_is_refused(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      _evaluate(**{'embeddings': np.eye(4), 'labels': [0, 0, 1, 1], **given})

  def test_zeros_are_counted_and_tie_with_what_is_at_right_angles(self):
    embeddings = [[0, 0], [1, 0], [0, 1], [0, 1]]
    scores = _evaluate(embeddings, [0, 0, 1, 1])
    self.assertEqual(scores['zero_embeddings'], 1)
    # The zeros tie with all others, and the query beside them with all too.
    self.assertEqual(scores['recall@1'], 2 / 4)

  def test_intervals_are_of_draws_of_whole_classes(self):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 40)
    scores = {'a': rng.random(40), 'b': np.ones(40)}
    actual = scores_lib._intervals(scores, labels, 50, seed=3)
    rng = np.random.default_rng(3)
    means = []
    for _ in range(50):
      drawn = [scores['a'][labels == c] for c in rng.integers(7, size=7)]
      means.append(np.mean(np.concatenate(drawn)))
    np.testing.assert_allclose(
      actual['a'], np.quantile(means, (0.025, 0.975)), rtol=1e-12
    )
    self.assertEqual(actual['b'], (1, 1))

  def test_intervals_are_of_each_score_of_retrieval(self):
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(60, 3)), rng.integers(0, 9, 60)
    scores = _evaluate(embeddings, labels, num_resamples=100)
    names = [*scores][: [*scores].index('recall@1_head')]
    self.assertEqual([*scores['intervals']], names)
    for name, (low, high) in scores['intervals'].items():
      self.assertLess(low, scores[name])
      self.assertGreater(high, scores[name])


class InputsTest(parameterized.TestCase):
  _EMBEDDINGS = np.eye(4, dtype=np.float32)[[0, 1, 0, 1]]

  @parameterized.parameters(bool, np.int64, np.uint8)
  def test_a_mask_of_zeros_and_ones_is_that_mask(self, dtype):
    # The queries are equal to each other and differ from their gallery.
    embeddings = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    is_query = np.array([1, 1, 0, 0]).astype(dtype)
    scores = evaluate.score(
      embeddings, [0, 0, 1, 0], is_query=is_query, recall_at=(1,)
    )
    self.assertEqual(scores['recall@1'], 0)
    self.assertEqual(scores['num_queries'], 2)

  def test_any_other_mask_is_refused(self):
    for is_query in (
      [0, 1, 2, 0],
      [0.0, 1.0, 1.0, 0.0],
      [0, 1, np.nan, 0],
      list('abcd'),
    ):
      with self.assertRaisesRegex(ValueError, 'is_query must be bool, or'):
        evaluate.score(self._EMBEDDINGS, [0, 0, 1, 1], is_query=is_query)

  @parameterized.parameters(
    (['a', 'b', 'a', 'b'],),
    (np.array([7, -3, 7, -3], np.int8),),
    (np.array([2**64 - 1, 2**64 - 2, 2**64 - 1, 2**64 - 2], np.uint64),),
    ([1.0, 2.0, 1.0, 2.0],),
    ([True, False, True, False],),
  )
  def test_equal_labels_are_one_class(self, labels):
    scores = evaluate.score(self._EMBEDDINGS, labels, recall_at=(1,))
    self.assertEqual(scores['recall@1'], 1)
    self.assertEqual(scores['num_classes'], 2)

  @parameterized.parameters(
    ([1.0, np.nan, 1.0, np.nan], 'float64 and some are not finite'),
    # NumPy joins these to floats that are all equal.
    (
      np.concatenate(
        [np.full(2, 2**63, np.uint64), np.array([2**62, 1], np.int64)]
      ),
      'give integers of one type',
    ),
    ([1j, 2, 1j, 2], 'Labels must be integers or texts; got complex'),
  )
  def test_labels_that_may_have_merged_are_refused(self, labels, message):
    with self.assertRaisesRegex(ValueError, message):
      evaluate.score(self._EMBEDDINGS, labels)

  def test_complex_embeddings_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'real numbers'):
      evaluate.score(self._EMBEDDINGS * 1j, [0, 1, 0, 1])


class EmbedTest(absltest.TestCase):
  def test_masked_rows_are_dropped_and_ids_give_the_order(self):
    batches = [
      {
        'embedding': np.array([[2.0], [0.0]]),
        'id': np.array([2, 0]),
        'mask': np.array([True, True]),
      },
      {
        'embedding': np.array([[1.0], [9.0]]),
        'id': np.array([1, 3]),
        'mask': np.array([True, False]),
      },
    ]
    embeddings = embed_lib.embed_batches(jax.device_put, batches)
    np.testing.assert_array_equal(embeddings, [[0], [1], [2]])
    self.assertEqual(embeddings.dtype, np.float32)

  def test_a_batch_size_that_eight_devices_do_not_divide_is_padded(self):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(23, 3)).astype(np.float32)
    split = datasets.Split(
      source=datasets.Vectors(vectors),
      images=None,
      rows=np.arange(23),
      labels=np.zeros(23, np.int32),
      class_names=('a',),
    )
    model = types.SimpleNamespace(apply=lambda variables, x, train: x)
    params = {name: np.zeros(1) for name in ('backbone', 'head')}
    state = types.SimpleNamespace(
      evaluated={'params': params, 'model_state': {}}
    )
    config = default.get_config()
    config.evaluation.batch_size = 10
    embed_fn = embed_lib.make_embed_fn(model, mesh_lib.make_mesh())
    embeddings = embed_lib.embed_split(embed_fn, config, state, split)
    np.testing.assert_array_equal(embeddings, vectors)

  def test_a_signal_ends_it_after_the_batch(self):
    num_batches = 0

    def embed_fn(batch):
      nonlocal num_batches
      num_batches += 1
      if num_batches == 2:
        signal.raise_signal(signal.SIGINT)
      return jax.device_put(batch)

    batches = 4 * [
      {
        'embedding': np.ones((1, 1)),
        'id': np.array([0]),
        'mask': np.array([True]),
      }
    ]
    with signals.StopSignals():
      with self.assertRaises(signals.Stopped):
        embed_lib.embed_batches(embed_fn, batches)
    self.assertEqual(num_batches, 2)

  def test_two_processes_on_an_interleaved_mesh_equal_one(self):
    results = _of_two_processes()
    self.assertEqual(results[0], results[1])
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(300, 16)), rng.integers(0, 40, 300)
    expected = _evaluate(embeddings, labels, kmeans_iterations=5)
    self.assertEqual(json.loads(results[0]), expected)


_PROCESS = """
import json
import sys
import types

import jax
import numpy as np

jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))

from proxy_nca_jax import evaluate
from proxy_nca_jax import mesh as mesh_lib
from proxy_nca_jax.evaluate import embed as embed_lib

# The order of a TPU slice's devices need not be that of its processes.
mesh = mesh_lib.make_mesh([jax.devices()[i] for i in (0, 2, 1, 3)])
assert [d.process_index for d in mesh.devices] == [0, 1, 0, 1]
rng = np.random.default_rng(0)
embeddings, labels = rng.normal(size=(300, 16)), rng.integers(0, 40, 300)
# Each process has every second piece of 50 rows, the last ones in no batch.
batches = []
for first in range(50 * jax.process_index(), 400, 100):
  ids = np.arange(first, first + 50)
  rows = np.minimum(ids, 299)
  batches.append({
    'image': embeddings[rows].astype(np.float32),
    'mask': ids < 300,
    'id': ids,
  })
model = types.SimpleNamespace(apply=lambda variables, x, train: x)
params = {name: np.zeros(1, np.float32) for name in ('backbone', 'head')}
state = types.SimpleNamespace(
  evaluated={'params': params, 'model_state': {}}
)
embed_fn = embed_lib.make_embed_fn(model, mesh)
embedded = embed_lib.embed_batches(
  lambda batch: embed_fn(state, batch), batches
)
np.testing.assert_array_equal(embedded, embeddings.astype(np.float32))
scores = evaluate.score(
  embedded,
  labels,
  recall_at=(1, 4),
  kmeans_iterations=5,
  mesh=mesh,
)
print(json.dumps(scores))
"""


def _of_two_processes():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  root = str(pathlib.Path(__file__).parent.parent)
  environment = whole_runs.environment() | {'PYTHONPATH': root}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _PROCESS, str(index), address],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  return [output.splitlines()[-1] for output in outputs]


_EYE, _LABELS = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])
_NPY = io.BytesIO()
np.save(_NPY, _EYE)
_NPY = _NPY.getvalue()


class CommandTest(parameterized.TestCase):
  def _run(self, *more, **arrays):
    """Returns the exit status, the output and the scores of the command."""
    folder = tempfile.mkdtemp(dir=absltest.get_default_test_tmpdir())
    arguments = [f'--json={folder}/scores.json', '--num_resamples=20']
    for name, array in arrays.items():
      np.save(f'{folder}/{name}.npy', array)
      arguments.append(f'--{name}={folder}/{name}.npy')
    arguments += more
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
      try:
        evaluate_main.main(arguments)
      except SystemExit as error:
        code = error.code
    path = pathlib.Path(folder, 'scores.json')
    scores = json.loads(path.read_text()) if path.exists() else None
    return code, output.getvalue(), scores

  def test_embeddings_from_anywhere_are_scored(self):
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(60, 5)), rng.integers(0, 9, 60)
    code, output, scores = self._run(
      embeddings=embeddings, labels=np.array([f'bird {i}' for i in labels])
    )
    self.assertEqual(code, 0, output)
    expected = evaluate.score(
      embeddings, labels, num_resamples=20, mesh=mesh_lib.make_mesh()
    )
    self.assertEqual(scores, json.loads(json.dumps(expected)))
    low, high = expected['intervals']['recall@1']
    self.assertIn(
      f'{100 * expected["recall@1"]:.2f} [{100 * low:.2f}, {100 * high:.2f}]',
      output,
    )
    self.assertIn('queries without match: 0', output)

  def test_verification(self):
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(60, 5)), rng.integers(0, 9, 60)
    code, output, scores = self._run(
      '--verification',
      '--kmeans_iterations=0',
      embeddings=3 * embeddings,
      labels=labels,
    )
    self.assertEqual(code, 0, output)
    result = scores['verification']
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    i, j = np.triu_indices(60, 1)
    distances = np.linalg.norm(unit[i] - unit[j], axis=1)
    is_genuine = labels[i] == labels[j]
    self.assertEqual(result['num_genuine'], is_genuine.sum())
    # 1,580 impostor pairs cannot tell 1e-4 from 0.
    rates = [point['fmr'] for point in result['operating_points']]
    self.assertEqual(rates, [0.1, 0.01, 0.001])
    for point in result['operating_points']:
      # Thresholds lie at a pair; rounding decides about that one.
      accepted = distances <= point['distance'] + 1e-5
      self.assertAlmostEqual(
        np.mean(~accepted[is_genuine]), point['fnmr'], delta=0.01
      )
      self.assertAlmostEqual(
        np.mean(accepted[~is_genuine]), point['fmr'], delta=0.0011
      )
    self.assertIn('(equal error rate)', output)
    self.assertIn(f'{100 * result["eer"]:.2f}%', output)

  def test_scores_of_each_class(self):
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(60, 5)), rng.integers(0, 9, 60)
    # A class of one has no query with a match, and no row.
    names = np.array([f'bird, {i}' for i in labels] + ['alone'])
    embeddings = np.concatenate([embeddings, -embeddings[:1]])
    path = self.create_tempfile().full_path
    code, output, scores = self._run(
      '--kmeans_iterations=0',
      f'--per_class={path}',
      *('--precision_at', '3', '10'),
      embeddings=embeddings,
      labels=names,
    )
    self.assertEqual(code, 0, output)
    self.assertNotIn('per_class', scores)
    with open(path, newline='') as file:
      rows = list(csv.DictReader(file))
    self.assertEqual(
      [row['label'] for row in rows], sorted(set(names) - {'alone'})
    )
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit.T) + 9 * np.eye(61), axis=1)[:, :10]
    is_hit = names[order] == names[:, None]
    for row in rows:
      queries = np.flatnonzero(names == row['label'])
      self.assertEqual(int(row['num_queries']), len(queries))
      for k in (3, 10):
        self.assertAlmostEqual(
          float(row[f'precision@{k}']), is_hit[queries, :k].mean()
        )
      self.assertAlmostEqual(float(row['recall@1']), is_hit[queries, 0].mean())
    mean = np.average(
      [float(row['map@10']) for row in rows],
      weights=[int(row['num_queries']) for row in rows],
    )
    self.assertAlmostEqual(scores['map@10'], mean)

  @parameterized.parameters(
    ({'precision_at': (0,)}, 'precision_at .* at least 1'),
    ({'precision_at': (3,), 'nearest_only': True}, 'ranks of all positives'),
  )
  def test_precision_at_what_cannot_be_computed(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      evaluate.score(_EYE, _LABELS, **arguments)

  @parameterized.parameters(0.0, 1.0, -1.0, float('nan'))
  def test_rates_of_verification_are_between_0_and_1(self, rate):
    with self.assertRaisesRegex(ValueError, 'must be between 0 and 1'):
      evaluate.verify(_EYE, _LABELS, fmr=(0.1, rate))

  def test_queries_and_cameras(self):
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(60, 5)), rng.integers(0, 9, 60)
    cameras = rng.integers(0, 3, 60)
    code, output, scores = self._run(
      embeddings=embeddings[20:],
      labels=labels[20:],
      cameras=cameras[20:],
      query_embeddings=embeddings[:20],
      query_labels=labels[:20],
      query_cameras=cameras[:20],
    )
    self.assertEqual(code, 0, output)
    expected = _evaluate(
      embeddings, labels, is_query=np.arange(60) < 20, cameras=cameras
    )
    for name in ('cmc@1', 'cmc@4', 'map', 'mrr', 'num_queries'):
      self.assertAlmostEqual(scores[name], expected[name], 12, name)

  @parameterized.parameters(
    (np.asfortranarray(_EYE),),
    (_EYE.astype('>f8'),),
    (_EYE.astype(np.float16),),
    (_EYE > 0,),
    (_EYE.astype('>i4'),),
  )
  def test_arrays_of_any_numbers_and_order_score_alike(self, embeddings):
    flags = ('--kmeans_iterations=0',)
    _, _, expected = self._run(*flags, embeddings=_EYE, labels=_LABELS)
    code, output, scores = self._run(
      *flags, embeddings=embeddings, labels=_LABELS.astype('>i2')
    )
    self.assertEqual(code, 0, output)
    self.assertEqual(scores, expected)

  @parameterized.parameters(
    ({'embeddings': _EYE.astype(str)}, 'real numbers; got <U'),
    ({'embeddings': _EYE.astype('S3')}, r'real numbers; got .*S3'),
    ({'embeddings': _EYE.astype('M8[s]')}, 'real numbers; got datetime'),
    ({'embeddings': _EYE.view('V4')}, r'real numbers; got .*V4'),
    ({'embeddings': np.zeros(4, 'f4,f4')}, 'must be a matrix'),
    ({'embeddings': _EYE.astype(object)}, 'embeddings.npy. is not an array'),
    ({'labels': np.zeros(4, 'i4,i4')}, 'Labels must be integers or texts'),
    ({'cameras': np.zeros(4, 'i4,i4')}, 'Cameras must be integers or texts'),
    ({'cameras': _LABELS.astype('M8[s]')}, 'Cameras must be integers or'),
    ({'cameras': _LABELS * np.nan}, 'Cameras are float64 and some are not'),
    (
      {'query_embeddings': _EYE[:, :3], 'query_labels': _LABELS},
      '--query_embeddings must have rows of one shape',
    ),
    (
      {'query_embeddings': np.zeros((4, 4), 'f4,f4'), 'query_labels': _LABELS},
      '--query_embeddings must have types that fit',
    ),
  )
  def test_an_array_of_another_type_is_one_line(self, arrays, message):
    arrays = {'embeddings': _EYE, 'labels': _LABELS, **arrays}
    code, output, _ = self._run('--kmeans_iterations=0', **arrays)
    self.assertEqual(code, 2)
    self.assertRegex(output, f'^Error: .*{message}.*\n$')

  @parameterized.parameters(
    b'',
    b'text',
    _NPY[:-1],
    _NPY[:40],
    _NPY.replace(b'(4, 4)', b'(4, 4 '),
    _NPY.replace(b'(4, 4)', b'(-2,4)'),
    _NPY.replace(b'(4, 4), }   ', b'(9999, 4), }'),
    _NPY.replace(b"'<f4'", b"'<q4'"),
    _NPY.replace(b"'shape'", b"'shapx'"),
    b'PK\3\4' + _NPY,
    b'\x80\4' + _NPY,
  )
  def test_a_malformed_array_file_is_named(self, content):
    path = pathlib.Path(self.create_tempdir(), 'x.npy')
    path.write_bytes(content)
    with self.assertRaisesRegex(ValueError, r'x\.npy. is not an array file'):
      evaluate_main._load(str(path))

  def test_a_pipe_is_not_opened(self):
    path = pathlib.Path(self.create_tempdir(), 'x.npy')
    os.mkfifo(path)
    with self.assertRaisesRegex(ValueError, 'it is not a regular file'):
      evaluate_main._load(str(path))

  @parameterized.parameters(
    (np.array([0, 2**32, 0, 2**32]),), (np.array([0.25, 0.5, 0.25, 0.5]),)
  )
  def test_cameras_are_compared_exactly(self, cameras):
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(4, 3)), np.zeros(4, int)
    expected = _evaluate(embeddings, labels, cameras=np.array([0, 1, 0, 1]))
    actual = _evaluate(embeddings, labels, cameras=cameras)
    self.assertEqual(actual, expected)

  @parameterized.parameters(
    ({}, 'There are 3 embeddings, so labels'),
    ({'query_labels': np.zeros(2)}, 'labels and --query_labels must be given'),
    (
      {'query_embeddings': np.eye(3), 'query_labels': np.zeros(2)},
      'query_labels.npy. must have as many rows as .*got 2',
    ),
  )
  def test_what_does_not_fit_is_one_line(self, more, message):
    code, output, _ = self._run(
      embeddings=np.eye(3), labels=np.zeros(4), **more
    )
    self.assertEqual(code, 2)
    self.assertRegex(output, message)
    self.assertEqual(output.count('\n'), 1)

  @parameterized.parameters(
    (['--recall_at', '0'], 'recall_at .* at least 1'),
    (['--num_resamples=-3'], 'num_resamples .-3. must not be negative'),
    (['--kmeans_num_starts=0'], 'n_init .0. must be at least 1'),
    ([f'--embeddings={__file__}'], 'test_evaluate.py. is not an array file'),
  )
  def test_numbers_and_files_that_cannot_be_are_one_line(self, more, message):
    code, output, _ = self._run(
      *more, embeddings=np.eye(4), labels=np.arange(4) // 2
    )
    self.assertEqual(code, 2)
    self.assertRegex(output, message)
    self.assertEqual(output.count('\n'), 1)

  def test_the_table_is_in_percent(self):
    table = evaluate.format_table(
      {
        'trained': {
          'recall@1': 0.5,
          'nmi': 0.25,
          'count': 3,
          'intervals': {'recall@1': (0.25, 0.75)},
        },
        'raw_pixels': {'recall@1': 1.0},
      }
    )
    self.assertEqual(
      table.splitlines(),
      [
        '                       trained  raw pixels',
        'recall@1  50.00 [25.00, 75.00]      100.00',
        'nmi                      25.00            ',
      ],
    )


if __name__ == '__main__':
  absltest.main()
