"""The search server: over HTTP, in a browser, with hostile requests."""

import asyncio
import concurrent.futures
import contextlib
import functools
import http.client
import io
import json
import pathlib
import shutil
import socket
import tempfile
import threading
import time
from unittest import mock
from urllib import parse

import browser
import jax
import jax.numpy as jnp
import numpy as np
import one_convolution
import uvicorn
from absl.testing import absltest, parameterized
from PIL import Image

from proxy_nca_jax import inference, models
from proxy_nca_jax.configs import image_folder
from proxy_nca_jax.search import __main__ as search_main
from proxy_nca_jax.search import find, serve
from proxy_nca_jax.search import index as index_lib

_FOLDERS = ('birds/red', 'birds/blue', 'a&b <i>')


def _make_embedder() -> inference.Embedder:
  """Returns an untrained network."""
  config = image_folder.get_config('scratch')
  config.update_from_flattened_dict(
    {
      'dataset.resize': 16,
      'dataset.image_size': 16,
      'model.width': 8,
      'model.embedding_dim': 8,
      'loss.name': 'contrastive',
    }
  )
  model = models.create_model(config)
  images = jnp.zeros((1, 16, 16, 3), jnp.uint8)
  variables = jax.tree.map(
    np.asarray, model.init(jax.random.key(0), images, train=False)
  )
  params = dict(variables['params']) | {'proxies': {}}
  rest = {name: tree for name, tree in variables.items() if name != 'params'}
  return inference.Embedder(
    config=config, params=params, model_state=rest, class_names=()
  )


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


class _Server:
  """The server in a thread, on a free port."""

  def __init__(self, app):
    self.port = _free_port()
    self._server = uvicorn.Server(
      uvicorn.Config(app, port=self.port, log_level='error')
    )
    self._thread = threading.Thread(target=self._server.run)
    self._thread.start()
    while not self._server.started:
      time.sleep(0.01)

  def close(self):
    self._server.should_exit = True
    self._thread.join()

  def request(self, method, path, body=None, **headers):
    """Returns the status and the decoded answer."""
    with contextlib.closing(
      http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
    ) as connection:
      connection.request(method, path, body, headers)
      response = connection.getresponse()
      content = response.read()
    if response.headers.get_content_type() == 'application/json':
      content = json.loads(content)
    return response.status, content


class _Case(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(one_convolution.replaced())
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.root)
    rng = np.random.default_rng(0)
    for folder in _FOLDERS:
      (cls.root / 'images' / folder).mkdir(parents=True)
      for number in range(4):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        path = cls.root / 'images' / folder / f'{number}.png'
        Image.fromarray(pixels).save(path)
    cls.embedder = _make_embedder()
    cls.embedder.save(cls.root / 'network')
    cls.index = str(cls.root / 'index')
    index_lib.update(
      cls.index,
      cls.embedder,
      str(cls.root / 'images'),
      workdir=str(cls.root / 'network'),
    )
    cls.engine = serve.Engine(
      cls.index, index_lib.read(cls.index), cls.embedder
    )
    app = serve.make_app(cls.engine, host='127.0.0.1', max_megabytes=0.05)
    cls.server = _Server(app)
    cls.addClassCleanup(cls.server.close)

  def _image(self, name='birds/red/0.png'):
    return (self.root / 'images' / name).read_bytes()


class HttpTest(_Case):
  def _search(self, body, **arguments):
    query = parse.urlencode(arguments)
    return self.server.request('POST', f'/api/search?{query}', body)

  def test_neighbors_are_those_of_the_command(self):
    status, rows = self._search(self._image(), k=5)
    self.assertEqual(status, 200)
    content = index_lib.read(self.index)
    image = self.root / 'images' / 'birds/red/0.png'
    distances, indices = find.find(
      self.embedder([image]), content.embeddings, 5
    )
    self.assertEqual(
      [row['name'] for row in rows], [content.names[i] for i in indices[0]]
    )
    np.testing.assert_allclose(
      [row['distance'] for row in rows], distances[0], atol=1e-4
    )
    self.assertEqual(rows[0]['folder'], 'birds/red')

  def test_a_folder_is_searched_with_those_below(self):
    for folder, number in (('birds', 8), ('a&b <i>', 4), ('birds/blue', 4)):
      status, rows = self._search(self._image(), k=50, folder=folder)
      self.assertEqual(status, 200)
      self.assertLen(rows, number)
      for row in rows:
        self.assertStartsWith(row['name'], f'{folder}/')
      distances = [row['distance'] for row in rows]
      self.assertEqual(distances, sorted(distances))

  def test_neighbors_beyond_the_distance_are_left_out(self):
    _, rows = self._search(self._image(), k=12)
    limit = rows[6]['distance']
    _, near = self._search(self._image(), k=12, distance=limit + 1e-6)
    self.assertEqual(near, rows[:7])

  def test_an_image_of_the_index_is_not_its_own_neighbor(self):
    name = 'birds/blue/1.png'
    status, rows = self.server.request(
      'GET', f'/api/similar?k=11&name={parse.quote(name)}'
    )
    self.assertEqual(status, 200)
    self.assertLen(rows, 11)
    self.assertNotIn(name, [row['name'] for row in rows])

  def test_images_are_sent_as_small_as_asked(self):
    _, rows = self._search(self._image(), k=12)
    for row in rows:
      status, content = self.server.request('GET', row['image'] + '&side=8')
      self.assertEqual(status, 200)
      self.assertEqual(Image.open(io.BytesIO(content)).size, (8, 8))

  def test_a_file_that_was_removed_is_not_found(self):
    with mock.patch.object(serve.os.path, 'exists', return_value=False):
      status, answer = self.server.request('GET', '/image?name=birds/red/0.png')
    self.assertEqual(status, 404)
    self.assertEqual(answer['error'], 'The file has been removed since.')

  def test_only_images_of_the_index_are_sent(self):
    secret = self.root / 'images' / 'secret.png'
    shutil.copy(self.root / 'images' / 'birds/red/0.png', secret)
    for name in (
      'secret.png',
      '../index',
      '/etc/passwd',
      str(secret),
      'birds/red/../../secret.png',
      'birds/red/0.png\0',
      '',
    ):
      for path in ('/image', '/api/similar'):
        status, answer = self.server.request(
          'GET', f'{path}?{parse.urlencode({"name": name})}'
        )
        self.assertEqual(status, 404, name)
        self.assertIn('no image', answer['error'])

  @parameterized.parameters(
    (b'', {}, 400, 'empty'),
    (b'text', {}, 400, 'cannot be read'),
    (b'\0' * 50_001, {}, 413, 'more than 0.05 MB'),
    (None, {'k': 0}, 400, 'from 1 to 100'),
    (None, {'k': 101}, 400, 'from 1 to 100'),
    (None, {'k': '1e9'}, 400, 'from 1 to 100'),
    (None, {'distance': 'nan'}, 400, 'from 0 to 2'),
    (None, {'folder': 'fish'}, 404, "no folder 'fish'"),
    (None, {'folder': ''}, 404, 'no folder'),
  )
  def test_wrong_requests(self, body, arguments, status, message):
    body = self._image() if body is None else body
    actual, answer = self._search(body, **arguments)
    self.assertEqual(actual, status)
    self.assertIn(message, answer['error'])
    self.assertEqual(self._search(self._image())[0], 200)

  def test_a_truncated_image_is_an_error(self):
    status, answer = self._search(self._image()[:-30])
    self.assertEqual(status, 400)
    self.assertIn('cannot be read', answer['error'])

  def test_requests_for_another_host_are_rejected(self):
    status, _ = self.server.request('GET', '/api/index', Host='evil.example')
    self.assertEqual(status, 400)
    status, index = self.server.request('GET', '/api/index', Host='localhost')
    self.assertEqual(status, 200)
    self.assertEqual(
      index['folders'], ['a&b <i>', 'birds', 'birds/blue', 'birds/red']
    )

  def test_requests_to_the_ipv6_address_of_this_machine_are_answered(self):
    for host in ('[::1]', f'[::1]:{self.server.port}'):
      status, _ = self.server.request('GET', '/api/index', Host=host)
      self.assertEqual(status, 200, host)

  def test_a_client_that_leaves_during_its_upload_is_no_error(self):
    app = serve.make_app(self.engine, host='127.0.0.1', max_megabytes=1)
    scope = {
      'type': 'http',
      'method': 'POST',
      'path': '/api/search',
      'query_string': b'',
      'headers': [(b'host', b'localhost')],
    }
    answers = []

    async def receive():
      return {'type': 'http.disconnect'}

    async def send(message):
      answers.append(message)

    asyncio.run(app(scope, receive, send))
    self.assertEqual(answers[0]['status'], 400)

  def test_a_stalled_upload_does_not_keep_the_server_from_stopping(self):
    servers, make_server, port = [], uvicorn.Server, _free_port()
    thread = threading.Thread(
      target=serve.serve,
      args=(self.index, self.engine.content, self.embedder),
      kwargs=dict(host='127.0.0.1', port=port, max_megabytes=1),
    )

    def keep(config):
      servers.append(make_server(config))
      return servers[-1]

    with (
      mock.patch.object(serve.uvicorn, 'Server', keep),
      mock.patch.object(serve, 'Engine', lambda *_: self.engine),
      mock.patch.object(serve, '_CLOSING_SECONDS', 1),
    ):
      thread.start()
      while not (servers and servers[0].started):
        self.assertTrue(thread.is_alive())
        time.sleep(0.01)
    (server,) = servers
    with socket.create_connection(('127.0.0.1', port)) as client:
      client.sendall(
        b'POST /api/search HTTP/1.1\r\nHost: localhost\r\n'
        b'Content-Length: 100\r\n\r\nabc'
      )
      while not server.server_state.tasks:
        time.sleep(0.01)
      server.should_exit = True
      thread.join(timeout=20)
      is_alive = thread.is_alive()
    thread.join()
    self.assertFalse(is_alive)

  def test_a_slow_decoder_is_an_error(self):
    with (
      mock.patch.object(serve, '_DECODING_SECONDS', 0.05),
      mock.patch.object(self.engine, 'read', lambda body: time.sleep(0.5)),
    ):
      status, answer = self._search(self._image())
    self.assertEqual(status, 503)
    self.assertIn('not decoded within', answer['error'])

  def test_concurrent_requests_are_answered_in_batches(self):
    sizes, embed = [], self.engine._embed

    def slow_embed(images):
      sizes.append(len(images))
      time.sleep(0.05)
      return embed(images)

    names = [f'{folder}/{i}.png' for folder in _FOLDERS for i in range(4)]
    with (
      mock.patch.object(self.engine, 'max_batch', 16),
      mock.patch.object(self.engine, '_embed', slow_embed),
      concurrent.futures.ThreadPoolExecutor(12) as pool,
    ):
      answers = list(
        pool.map(lambda name: self._search(self._image(name), k=1), names)
      )
    self.assertEqual([rows[0]['name'] for _, rows in answers], names)
    self.assertEqual(sum(sizes), 12)
    self.assertGreater(max(sizes), 1)

  def test_the_server_survives_an_error_of_the_device(self):
    with mock.patch.object(
      self.engine, '_embed', side_effect=RuntimeError('out of memory')
    ):
      self.assertEqual(self._search(self._image())[0], 500)
    self.assertEqual(self._search(self._image())[0], 200)


class ListenTest(parameterized.TestCase):
  def test_a_port_in_use_is_an_error_before_the_network_is_compiled(self):
    with socket.create_server(('127.0.0.1', 0)) as other:
      port = other.getsockname()[1]
      with self.assertRaisesRegex(OSError, f'{port} .* in use'):
        serve.serve(
          'x', None, None, host='127.0.0.1', port=port, max_megabytes=1
        )

  @parameterized.parameters('192.0.2.1', '::ffff:ffff', '.a', 'a' * 70)
  def test_an_address_of_no_machine_here_is_an_error(self, host):
    with self.assertRaisesRegex(OSError, 'Cannot listen on .*--host'):
      serve._listen(host, _free_port())


class CommandTest(absltest.TestCase):
  @mock.patch.object(search_main.importlib.util, 'find_spec')
  def test_missing_packages_are_named(self, find_spec):
    find_spec.side_effect = lambda name: None
    error = io.StringIO()
    with (
      contextlib.redirect_stderr(error),
      self.assertRaises(SystemExit) as raised,
    ):
      search_main.main(['serve', '--index=x'])
    self.assertEqual(raised.exception.code, 2)
    self.assertIn('pip install starlette uvicorn', error.getvalue())


@browser.needed
class BrowserTest(_Case):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.driver = browser.start(cls)

  def _all(self, selector):
    return self.driver.find_elements('css selector', selector)

  def _wait(self, condition):
    from selenium.webdriver.support import wait

    wait.WebDriverWait(self.driver, 20).until(lambda _: condition())

  def test_a_file_is_searched_and_a_neighbor_searched_on(self):
    self.driver.get(f'http://localhost:{self.server.port}/')
    self._wait(lambda: len(self._all('#folder option')) == 5)
    self.assertIn('12 images', self._all('#about')[0].text)
    path = self.root / 'images' / 'birds/red/0.png'
    self._all('#file')[0].send_keys(str(path))
    count = functools.partial(self._all, '#results li')
    self._wait(lambda: len(count()) == 12)
    first = self._all('#results img')[0]
    self.assertStartsWith(first.get_attribute('alt'), 'birds/red, distance 0.')
    self._wait(lambda: first.get_property('naturalWidth') == 20)
    # The threshold hides neighbors.
    self.driver.execute_script(
      'const range = document.getElementById("distance"); range.value = 0;'
      'range.dispatchEvent(new Event("input"));'
    )
    self._wait(lambda: len(count()) == 1)
    self.driver.execute_script(
      'const range = document.getElementById("distance"); range.value = 2;'
      'range.dispatchEvent(new Event("input"));'
    )
    # The folder filters; its name is text.
    self._all('#folder option')[1].click()
    self._wait(lambda: len(count()) == 4)
    self.assertIn('a&b <i>', count()[0].text)
    self.assertEmpty(self._all('#results i'))
    # A click searches on with a neighbor.
    count()[0].find_element('css selector', 'button').click()
    self._wait(lambda: len(count()) == 3)
    errors = [
      entry
      for entry in self.driver.get_log('browser')
      if entry['level'] == 'SEVERE'
    ]
    self.assertEqual(errors, [])

  def test_an_unreadable_file_is_an_error_on_the_page(self):
    path = self.root / 'text.png'
    path.write_text('text')
    self.driver.get(f'http://localhost:{self.server.port}/')
    self._all('#file')[0].send_keys(str(path))
    self._wait(
      lambda: (
        'cannot be read' in self._all('#status.error')[0].text
        if self._all('#status.error')
        else False
      )
    )


if __name__ == '__main__':
  absltest.main()
