"""The report, as a file and in a real browser."""

import json
import pathlib
import re
import shutil
import tempfile
import time

import browser
import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax import datasets, evaluate, report
from proxy_nca_jax.report import __main__ as comparison
from proxy_nca_jax.report import charts
from proxy_nca_jax.report import results as results_lib
from proxy_nca_jax.report import run as report_of_run

_SCORES = {
  'recall@1': 0.5,
  'recall@2': 0.75,
  'map@r': 0.25,
  'nmi': 0.6,
  'num_queries': 40,
}
_RESULTS = {
  'trained': _SCORES,
  'untrained': _SCORES | {'recall@1': 0.1},
  'raw_pixels': _SCORES | {'recall@1': 0.2},
  'step': 20,
  'dataset': {
    'test': {'images': 60, 'classes': 6},
    'shared_classes': 0,
    'digest': '0',
  },
  'devices': '1 x cpu',
  'versions': {'jax': '0.0'},
}
_CONFIG = {
  'seed': 0,
  'num_steps': 20,
  'dataset': {'name': 'cub200'},
  'loss': {'name': 'proxy_nca'},
  'model': {'name': 'resnet50', 'embedding_dim': 128},
}
_ROWS = [
  {'step': 0, 'untrained.recall@1': 0.1},
  {'step': 10, 'loss': 2.0},
  {'step': 10, 'test.recall@1': 0.3},
  {'step': 20, 'loss': 1.0},
  {'step': 20, 'test.recall@1': 0.5},
]


def _embedded(num_classes=10, each=4, **fields):
  """Makes classes with distinct colors and directions, and names with <&>."""
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(num_classes), each).astype(np.int32)
  colors = rng.integers(0, 256, (num_classes, 3))
  centers = rng.normal(size=(num_classes, 6))
  embeddings = centers[labels] + rng.normal(size=(len(labels), 6)) * 0.6
  return report.Embedded(
    datasets.Split(
      source=(),
      images=lambda row: np.broadcast_to(
        colors[labels[row]], (12, 16, 3)
      ).astype(np.uint8),
      rows=np.arange(len(labels)),
      labels=labels,
      class_names=tuple(f'<class & {i}>' for i in range(num_classes)),
      **fields,
    ),
    embeddings.astype(np.float32),
  )


def _write(path, test, **fields):
  arguments = dict(
    results=_RESULTS,
    config=_CONFIG,
    overrides={'num_steps': 20},
    facts={'wall time': '0:00:01'},
    rows=_ROWS,
    test=test,
    train=test,
    proxies=np.random.default_rng(1).normal(size=(10, 6)),
  )
  report.write(str(path), **(arguments | fields))
  return pathlib.Path(path).read_text()


class ReportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.root)

  def test_it_is_one_file_with_every_section(self):
    page = _write(self.root / 'report.html', _embedded())
    for heading in (
      'Scores',
      'Training',
      'Queries and their nearest neighbors',
      'The embedding space',
      'Distances',
      'Most confused classes',
      'Proxies and their nearest images',
      'The run',
    ):
      self.assertIn(f'<h2>{heading}</h2>', page)
    # Published results, with their source, next to ours.
    self.assertIn('49.21', page)
    self.assertIn('github.com/dichotomies/proxy-nca', page)
    self.assertIn('50.00', page)
    self.assertIn('<td>resnet50, 128</td>', page)
    # Nothing is fetched, and class names are escaped.
    self.assertEmpty(re.findall(r'(?:src|href|url\()="?(?!data:)\w', page))
    self.assertNotIn('<class & ', page)
    self.assertIn('&lt;class &amp; 3&gt;', page)

  def test_error_rates_of_verification_are_shown(self):
    test = _embedded()
    result = evaluate.verify(test.embeddings, test.split.labels)
    page = _write(
      self.root / 'report.html',
      test,
      results=_RESULTS | {'verification': result},
    )
    self.assertIn('<h2>Verification</h2>', page)
    self.assertIn('Error rates by distance threshold', page)
    eer = f'{result["eer"]:.2%}'
    self.assertIn(f'<td>{eer}</td><td>{eer}</td>', page)
    self.assertIn(f'{result["operating_points"][1]["distance"]:.3f}', page)
    self.assertIn(f'the {result["num_impostor"]:,} of two classes', page)

  @parameterized.parameters(
    ({},),
    ({'eer': 'x'},),
    ({'curve': [[1, 2]]},),
    ({'operating_points': [{'fmr': 0.1}]},),
    ({'num_genuine': -1},),
  )
  def test_damaged_error_rates_are_one_line(self, fields):
    test = _embedded()
    result = evaluate.verify(test.embeddings, test.split.labels)
    results = _RESULTS | {'verification': fields and result | fields}
    (self.root / 'results.json').write_text(json.dumps(results))
    with self.assertRaisesRegex(ValueError, 'verification'):
      results_lib.read(str(self.root))

  def test_curves_show_every_recall_evaluated_during_training(self):
    rows = [
      {'step': 0, 'untrained.recall@1': 0.1, 'untrained.recall@8': 0.2},
      {'step': 9, 'test.recall@1': 0.3, 'test.recall@8': 0.4, 'test.map': 0.1},
    ]
    curves = report_of_run._curves(rows)
    self.assertIn('recall@8: 40 at 9', curves)
    self.assertIn('recall@1: 10 at 0', curves)
    self.assertNotIn('map', curves)
    curves = report_of_run._curves(
      [*rows, {'step': 4, 'validation.recall@1': 0.5}]
    )
    self.assertIn('recall@1: 50 at 4', curves)
    self.assertNotIn('recall@8', curves)

  def test_neighbors_equal_a_full_sort_without_the_query(self):
    test = _embedded()
    neighbors = report_of_run._find_neighbors(test)
    unit = test.embeddings / np.linalg.norm(
      test.embeddings, axis=1, keepdims=True
    )
    distances = np.linalg.norm(unit[:, None] - unit, axis=2)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_allclose(
      neighbors.distances, np.sort(distances, axis=1)[:, :8], atol=1e-5
    )
    np.testing.assert_array_equal(
      neighbors.is_correct,
      test.split.labels[neighbors.items] == test.split.labels[:, None],
    )

  def test_queries_search_only_the_gallery(self):
    is_query = np.arange(40) % 4 == 0
    test = _embedded(is_query=is_query)
    neighbors = report_of_run._find_neighbors(test)
    np.testing.assert_array_equal(neighbors.queries, np.flatnonzero(is_query))
    self.assertFalse(is_query[neighbors.items].any())

  def test_matches_by_the_same_camera_are_ignored(self):
    cameras = np.tile([0, 0, 1, 1], 10).astype(np.int32)
    test = _embedded(is_query=np.arange(40) % 4 == 0, cameras=cameras)
    neighbors = report_of_run._find_neighbors(test)
    self.assertFalse(
      np.any(
        neighbors.is_correct
        & (cameras[neighbors.items] == cameras[neighbors.queries][:, None])
      )
    )

  def test_the_smallest_dataset_has_a_report(self):
    test = _embedded(num_classes=2, each=2)
    page = _write(self.root / 'report.html', test, proxies=None)
    self.assertNotIn('Proxies and their nearest images', page)

  def test_several_proxies_of_a_class(self):
    proxies = np.random.default_rng(1).normal(size=(10, 3, 6))
    page = _write(self.root / 'report.html', _embedded(), proxies=proxies)
    self.assertIn('Proxies and their nearest images', page)

  def test_scores_of_classes_that_training_saw_are_not_called_unseen(self):
    results = _RESULTS | {'dataset': {'shared_classes': 3}}
    path = self.create_tempfile().full_path
    page = _write(path, _embedded(), results=results)
    self.assertIn('test classes, of which training saw 3', page)
    self.assertNotIn('not seen in training', page)

  def test_pretrained_features_have_no_head(self):
    weights = {'from': 'published', 'license': 'CC-BY-NC-4.0'}
    results = _RESULTS | {'pretrained': _SCORES, 'weights': weights}
    path = self.create_tempfile().full_path
    page = _write(path, _embedded(), results=results)
    self.assertRegex(page, 'this run, pretrained<.*>resnet50, without a head<')
    self.assertRegex(page, 'license of these</td><td>CC-BY-NC-4.0<')


class TableTest(absltest.TestCase):
  def _log(self, **scores):
    with self.assertLogs('proxy_nca_jax', 'INFO') as logs:
      results_lib.log_table(_RESULTS | scores)
    return '\n'.join(logs.output)

  def test_a_baseline_above_the_trained_network_is_named(self):
    better = _SCORES | {'recall@1': 0.625}
    log = self._log(pretrained=better)
    self.assertIn('recall@1 is 50.00% after it, but 62.50% from the pre', log)
    self.assertNotIn('raw pixels.', log)

    folder = tempfile.mkdtemp(dir=absltest.get_default_test_tmpdir())
    page = _write(
      pathlib.Path(folder, 'report.html'),
      _embedded(),
      results=_RESULTS | {'pretrained': better},
    )
    first = re.search('<h2>(.*?)</h2><p>(.*?)</p>', page)
    self.assertEqual(first[1], 'Training did not pay')
    self.assertIn('62.50% from the pretrained features', first[2])

  def test_no_baseline_above_it_is_no_warning(self):
    self.assertNotIn('did not pay', self._log(pretrained=_SCORES))
    self.assertNotIn('did not pay', self._log(pretrained=None))

  def test_the_selected_network_is_the_one_compared(self):
    log = self._log(selected=_SCORES | {'recall@1': 0.15})
    self.assertIn('15.00% after it, but 20.00% from raw pixels', log)


class CompareTest(absltest.TestCase):
  def _run(self, name, recall, **fields):
    folder = self.root / name
    folder.mkdir()
    (folder / 'run.json').write_text(json.dumps({'config': _CONFIG | fields}))
    scores = _SCORES | {'recall@1': recall}
    (folder / 'results.json').write_text(
      json.dumps(_RESULTS | {'trained': scores})
    )
    (folder / 'metrics.jsonl').write_text(
      ''.join(json.dumps(row) + '\n' for row in _ROWS)
    )
    return str(folder)

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.root)

  def test_seeds_share_a_row_and_other_fields_are_listed(self):
    page = comparison.compare(
      [
        self._run('a', 0.5),
        self._run('b', 0.7, seed=1),
        self._run('c', 0.4, loss={'name': 'triplet'}),
      ]
    )
    self.assertIn('a and 1 more', page)
    self.assertIn('60.00 [50.00, 70.00]', page)
    self.assertIn('40.00', page)
    self.assertIn('<td>loss.name</td><td>&quot;proxy_nca&quot;</td>', page)

  def test_runs_of_one_name_are_told_apart(self):
    for folder in ('a', 'b'):
      (self.root / folder).mkdir()
    page = comparison.compare(
      [self._run('a/run', 0.5), self._run('b/run', 0.7, batch_size=9)]
    )
    for name in ('a/run', 'b/run'):
      # In the table, in the differences, and as curves.
      self.assertGreaterEqual(page.count(name), 3, name)

  def test_a_run_given_twice_is_an_error(self):
    run = self._run('a', 0.5)
    with self.assertRaisesRegex(ValueError, 'is given twice'):
      comparison.compare([run, f'{run}/'])

  def test_the_columns_are_the_scores_of_all_runs(self):
    first, second = self._run('a', 0.5), self._run('b', 0.7, batch_size=9)
    file = pathlib.Path(second, 'results.json')
    results = json.loads(file.read_text())
    results['trained'] |= {'cmc@5': 0.125}
    file.write_text(json.dumps(results))
    for runs in ([first, second], [second, first]):
      page = comparison.compare(runs)
      self.assertIn('cmc@5', page)
      self.assertIn('12.50', page)

  def test_runs_on_different_data_are_marked(self):
    first, second = self._run('a', 0.5), self._run('b', 0.7, batch_size=9)
    self.assertNotIn('not comparable', comparison.compare([first, second]))
    file = pathlib.Path(second, 'results.json')
    results = json.loads(file.read_text())
    results['dataset'] = results['dataset'] | {'digest': 'other'}
    file.write_text(json.dumps(results))
    self.assertIn('not comparable', comparison.compare([first, second]))

  def test_an_unfinished_run_is_named(self):
    (self.root / 'x').mkdir()
    with self.assertRaisesRegex(
      ValueError, 'not the workdir of a finished run'
    ):
      comparison.compare([str(self.root / 'x')])


class ChartsTest(absltest.TestCase):
  def test_points_are_drawn_at_their_values(self):
    svg = charts.lines(
      {'a': ([0, 10], [1.0, 3.0])}, title='t', x_label='x', y_label='y'
    )
    (points,) = re.findall('points="([^"]*)"', svg)
    self.assertEqual(points, '52.0,220.0 468.0,12.0')

  def test_a_single_value_is_drawn(self):
    charts.lines({'a': ([5], [1.0])}, title='t', x_label='x', y_label='y')
    charts.histograms({'a': [1.0]}, title='t', x_label='x')


@browser.needed
class BrowserTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    cls.page = cls.root / 'report.html'
    _write(cls.page, _embedded())
    cls.driver = browser.start(cls)

  def setUp(self):
    super().setUp()
    self.driver.get(self.page.as_uri())

  def _all(self, selector):
    return self.driver.find_elements('css selector', selector)

  def test_it_opens_without_errors_or_requests(self):
    self.driver.get_log(
      'performance'
    )  # Discards the log of the browser's first page.
    self.driver.get(self.page.as_uri())
    time.sleep(0.2)
    self.assertEqual(self.driver.get_log('browser'), [])
    messages = [
      json.loads(entry['message'])['message']
      for entry in self.driver.get_log('performance')
    ]
    urls = {
      message['params']['request']['url']
      for message in messages
      if message['method'] == 'Network.requestWillBeSent'
    }
    self.assertEqual(
      {url for url in urls if not url.startswith('data:')},
      {self.page.as_uri()},
    )

  def test_hovering_over_a_point_shows_its_image(self):
    from selenium.webdriver import ActionChains

    (tip,) = self._all('#tip')
    self.assertFalse(tip.is_displayed())
    point = self._all('.map circle')[-1]
    self.driver.execute_script(
      'arguments[0].scrollIntoView({block: "center"})', point
    )
    ActionChains(self.driver).move_to_element(point).perform()
    self.assertTrue(tip.is_displayed())
    self.assertEqual(tip.text, '<class & 9>')

  def test_a_click_on_a_header_sorts_the_table(self):
    (button,) = [
      button for button in self._all('th button') if button.text == 'recall@1'
    ]
    table = button.find_element('xpath', 'ancestor::table')

    def column():
      return [
        float(cell.text)
        for cell in table.find_elements('css selector', 'tbody td:nth-child(3)')
      ]

    self.driver.execute_script('arguments[0].click()', button)
    self.assertEqual(column(), sorted(column()))
    self.driver.execute_script('arguments[0].click()', button)
    self.assertEqual(column(), sorted(column(), reverse=True))
    self.assertEqual(
      button.find_element('xpath', '..').get_attribute('aria-sort'),
      'descending',
    )

  def test_phones_need_no_horizontal_scrolling(self):
    self.driver.execute_cdp_cmd(
      'Emulation.setDeviceMetricsOverride',
      {'width': 375, 'height': 700, 'deviceScaleFactor': 2, 'mobile': True},
    )
    self.addCleanup(
      self.driver.execute_cdp_cmd, 'Emulation.clearDeviceMetricsOverride', {}
    )
    self.driver.get(self.page.as_uri())
    width = self.driver.execute_script(
      'return document.documentElement.scrollWidth'
    )
    self.assertLessEqual(width, 375)

  def test_screen_readers_get_a_text_for_every_image_and_chart(self):
    for image in self._all('img'):
      self.assertTrue(image.get_attribute('alt'))
    for svg in self._all('svg'):
      self.assertTrue(svg.get_attribute('aria-label'))
    self.assertEqual(
      self.driver.execute_script('return document.documentElement.lang'), 'en'
    )

  @parameterized.parameters('light', 'dark')
  def test_text_contrasts_with_its_background(self, scheme):
    self.driver.execute_cdp_cmd(
      'Emulation.setEmulatedMedia',
      {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]},
    )
    color, background = self.driver.execute_script(
      'const canvas = document.createElement("div");'
      'canvas.style.background = "Canvas"; document.body.append(canvas);'
      'return [getComputedStyle(document.body).color,'
      ' getComputedStyle(canvas).backgroundColor]'
    )
    levels = [
      np.mean([int(x) for x in re.findall(r'\d+', text)[:3]])
      for text in (color, background)
    ]
    self.assertGreater(abs(levels[0] - levels[1]), 180)
    self.assertEqual(levels[0] > levels[1], scheme == 'dark')


if __name__ == '__main__':
  absltest.main()
