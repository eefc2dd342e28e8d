import contextlib
import errno
import hashlib
import os
import pathlib
import re
import socket
import socketserver
import struct
import threading
from http import server
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax.datasets import downloads

_CONTENT = np.random.default_rng(0).bytes(300_000)
_OTHER = np.random.default_rng(1).bytes(300_000)


class _Handler(server.BaseHTTPRequestHandler):
  def do_GET(self):
    self.server.seen.append((self.path, self.headers['Range']))
    answers = self.server.answers[self.path]
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    answer(self)

  def reply(self, status, body=b'', **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), str(value))
    self.end_headers()
    with contextlib.suppress(ConnectionError):
      self.wfile.write(body)

  def log_message(self, *_):
    pass


def _whole(body=_CONTENT, *, upto=None, **headers):
  """Ignores ranges; drops the connection after `upto` bytes."""
  headers = {'Content_Length': len(body)} | headers
  return lambda handler: handler.reply(200, body[:upto], **headers)


def _unannounced(body):
  return lambda handler: handler.reply(200, body)


def _status(status):
  return lambda handler: handler.reply(status, b'words', Content_Length=5)


def _ranged(body=_CONTENT, *, upto=None, content_range=None, length=None):
  """Supports ranges; drops each connection after `upto` bytes."""

  def answer(handler):
    asked = handler.headers['Range']
    if asked is None:
      return _whole(body, upto=upto)(handler)
    start = int(re.fullmatch(r'bytes=(\d+)-', asked)[1])
    if start >= len(body):
      return handler.reply(416, Content_Range=f'bytes */{len(body)}')
    span = content_range or f'bytes {start}-{len(body) - 1}/{len(body)}'
    rest = body[start:]
    handler.reply(
      206,
      rest[:upto],
      Content_Range=span,
      Content_Length=length or len(rest),
    )

  return answer


def _chunked(handler):
  handler.protocol_version = 'HTTP/1.1'
  # A chunk of 0x4000 bytes that ends early.
  handler.reply(200, b'4000\r\n' + _CONTENT[:999], Transfer_Encoding='chunked')
  handler.close_connection = True


def _reset(handler):
  handler.reply(200, _CONTENT[:1000], Content_Length=len(_CONTENT))
  handler.wfile.flush()
  linger = struct.pack('ii', 1, 0)
  handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
  handler.connection.close()


class FetchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.object(downloads, '_PAUSE_SECONDS', 0.0))
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.part = self.folder / 'data.tgz.part'
    self.http = server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
    self.http.seen, self.http.answers = [], {}
    thread = threading.Thread(target=self.http.serve_forever, args=[0.01])
    thread.start()
    self.addCleanup(thread.join)
    self.addCleanup(self.http.server_close)
    self.addCleanup(self.http.shutdown)
    self.root = f'http://127.0.0.1:{self.http.server_port}'

  def _fetch(self, *urls, timeout=5.0, **changes):
    """Each URL is a list of answers, the last one repeated, or a string."""
    names = []
    for number, answers in enumerate(urls):
      if isinstance(answers, str):
        names.append(answers)
      else:
        self.http.answers[f'/{number}'] = answers
        names.append(f'{self.root}/{number}')
    arguments = dict(
      size=len(_CONTENT),
      checksum='sha256:' + hashlib.sha256(_CONTENT).hexdigest(),
    )
    file = downloads.RemoteFile(
      'data.tgz', urls=tuple(names), **(arguments | changes)
    )
    return downloads.fetch(file, str(self.folder), timeout=timeout)

  def _check(self, path):
    self.assertEqual(path, str(self.folder / 'data.tgz'))
    self.assertEqual(pathlib.Path(path).read_bytes(), _CONTENT)
    self.assertEqual(os.listdir(self.folder), ['data.tgz'])

  def _check_fails(self, message, *urls, **options):
    with self.assertRaisesRegex(ValueError, message):
      self._fetch(*urls, **options)
    self.assertFalse((self.folder / 'data.tgz').exists())

  def _ranges(self):
    return [asked for _, asked in self.http.seen]

  @parameterized.parameters(
    {},
    {'checksum': 'md5:' + hashlib.md5(_CONTENT).hexdigest().upper()},
    {'checksum': ''},
    {'size': None},
    {'size': None, 'checksum': ''},
  )
  def test_a_file_is_downloaded_completely(self, **changes):
    self._check(self._fetch([_whole()], **changes))
    self.assertLen(self.http.seen, 1)

  def test_the_folder_is_created(self):
    self.folder = self.folder / 'a' / 'b'
    self._check(self._fetch([_whole()]))

  def test_an_existing_file_is_not_requested(self):
    (self.folder / 'data.tgz').write_bytes(_CONTENT)
    self._check(self._fetch([_status(500)]))
    self.assertEmpty(self.http.seen)

  def test_a_file_without_url_is_left_to_the_user(self):
    self._check_fails(r'data\.tgz: has no URL; put it into')

  def test_a_body_without_announced_size_is_verified_at_its_end(self):
    self._check(self._fetch([_unannounced(_CONTENT)], size=None))

  def test_only_the_rest_of_a_partial_file_is_requested(self):
    self.part.write_bytes(_CONTENT[:1234])
    self._check(self._fetch([_ranged()]))
    self.assertEqual(self._ranges(), ['bytes=1234-'])

  @parameterized.parameters(True, False)
  def test_dropped_connections_are_resumed(self, size_is_known):
    changes = {} if size_is_known else {'size': None}
    self._check(self._fetch([_ranged(upto=70_000)], **changes))
    starts = range(70_000, len(_CONTENT), 70_000)
    self.assertEqual(self._ranges(), [None, *(f'bytes={n}-' for n in starts)])

  @parameterized.parameters((_chunked, 999), (_reset, 1000))
  def test_bytes_before_a_broken_connection_are_kept(self, broken, count):
    self._check(self._fetch([broken, _ranged()]))
    self.assertEqual(self._ranges(), [None, f'bytes={count}-'])

  def test_a_silent_server_times_out_and_its_bytes_are_kept(self):
    wake, late = threading.Event(), []
    self.addCleanup(wake.set)

    def stall(handler):
      handler.reply(200, _CONTENT[:500], Content_Length=len(_CONTENT))
      late.append(wake.wait(10))

    self._check(self._fetch([stall, _ranged()], timeout=0.2))
    self.assertEmpty(late)
    self.assertEqual(self._ranges(), [None, 'bytes=500-'])

  def test_a_server_that_ignores_ranges_starts_over(self):
    self.part.write_bytes(_OTHER[:1234])
    self._check(self._fetch([_whole()]))
    self.assertEqual(self._ranges(), ['bytes=1234-'])

  def test_attempts_without_progress_end(self):
    self._check_fails(
      '/0: stops after 70000 of 300000 bytes$', [_whole(upto=70_000)]
    )
    # The first connection adds bytes; three more add none.
    self.assertLen(self.http.seen, 4)

  def test_progress_means_more_bytes_than_ever_before(self):
    self.part.write_bytes(_OTHER[:80_000])
    counts = (70_000, 50_000, 60_000)
    answers = [_whole(upto=count) for count in counts]
    self._check_fails('stops after 60000', [*answers, _whole()])
    self.assertLen(self.http.seen, 3)

  def test_pauses_between_attempts_grow(self):
    with mock.patch.object(downloads.time, 'sleep') as sleep:
      with mock.patch.object(downloads, '_PAUSE_SECONDS', 1.0):
        self._check_fails('stops after 0 of', [_whole(upto=0)])
    self.assertEqual([call.args[0] for call in sleep.call_args_list], [2, 3])

  def test_the_second_server_resumes_where_the_first_dropped(self):
    self._check(self._fetch([_whole(upto=70_000)], [_ranged()]))
    self.assertEqual(self.http.seen[-1], ('/1', 'bytes=70000-'))

  @parameterized.parameters(
    ([_status(404)], '404 Not Found'),
    ([_status(500)], '500 Internal Server Error'),
    ([_status(416)], '416 '),
    ([_status(599)], r'599 \?'),
    ([_whole(_CONTENT[:17])], 'sends 17 bytes, expected 300000'),
    ([_whole(_CONTENT * 2)], 'sends 600000 bytes, expected 300000'),
    ([_unannounced(_CONTENT * 2)], 'more than the expected 300000 bytes'),
    ([_whole(Content_Length='a few')], "the Content-Length 'a few'"),
    ([_whole(Content_Length=-1)], "the Content-Length '-1'"),
    ([_whole(Content_Length='9' * 5000)], 'digits'),
    ([_whole(_OTHER)], 'sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}'),
    ('http://127.0.0.1:1/', 'refused'),
    ('http://127.0.0.1:x/', 'nonnumeric port'),
    ('http://[', 'Invalid IPv6'),
    ('nowhere', 'unknown url type'),
    ('nowhere://x', 'unknown url type'),
  )
  def test_a_failing_url_is_explained_and_the_next_is_tried(self, url, reason):
    self._check_fails(f'^[^ ]*: .*{reason}.*$', url)
    self._check(self._fetch(url, [_whole()]))

  def test_a_wrong_size_is_known_before_the_body(self):
    stop = threading.Event()

    def endless(handler):
      handler.reply(200, Content_Length=10**15)
      with contextlib.suppress(ConnectionError):
        while not stop.wait(0.001):
          handler.wfile.write(bytes(2**16))

    self.addCleanup(stop.set)
    self.part.write_bytes(_CONTENT[:1234])
    self._check_fails('sends 10{15} bytes', [endless])
    self.assertEqual(self.part.read_bytes(), _CONTENT[:1234])

  def test_an_announced_size_that_is_too_small_is_an_error(self):
    short = _whole(Content_Length=1000)
    self._check_fails('sends 1000 bytes', [short])
    self._check_fails('sha256 is', [short], size=None)

  def test_each_url_has_its_line(self):
    gone = 'http://127.0.0.1:1/'
    with self.assertRaises(ValueError) as caught:
      self._fetch([_status(404)], gone, [_whole(b'')])
    self.assertEqual(
      str(caught.exception).split('\n'),
      [
        f'{self.root}/0: 404 Not Found',
        f'{gone}: Connection refused',
        f'{self.root}/2: sends 0 bytes, expected 300000',
      ],
    )

  def test_control_characters_of_a_server_are_not_printed(self):

    def garbage(handler):
      handler.wfile.write(b'\x1b[2J' + b'x' * 1000 + b'\r\n\r\n')

    with self.assertRaises(ValueError) as caught:
      self._fetch([garbage])
    self.assertTrue(str(caught.exception).isprintable())
    self.assertLess(len(str(caught.exception)), 300)

  @parameterized.parameters(
    'bytes 0-299999/300000',
    'bytes 1235-299999/300000',
    'bytes some-299999/300000',
    'bytes */300000',
    ' ',
  )
  def test_a_range_other_than_the_requested_one_is_not_appended(self, span):
    self.part.write_bytes(_CONTENT[:1234])
    answer = _ranged(content_range=span)
    self._check_fails('sends the range .* expected bytes 1234-', [answer])
    self.assertEqual(self.part.read_bytes(), _CONTENT[:1234])
    self._check(self._fetch([answer], [_ranged()]))

  def test_a_range_of_a_file_of_another_size_is_not_appended(self):
    self.part.write_bytes(_CONTENT[:1234])
    answer = _ranged(content_range='bytes 1234-299999/300001')
    self._check_fails('sends 300001 bytes', [answer])
    answer = _ranged(content_range='bytes 1234-299999/*', length=5)
    self._check_fails('sends 1239 bytes', [answer])
    self.assertEqual(self.part.read_bytes(), _CONTENT[:1234])
    answer = _ranged(content_range='bytes 1234-299999/*')
    self._check(self._fetch([answer]))

  def test_the_rest_of_a_short_range_is_requested_again(self):
    self.part.write_bytes(_CONTENT[:1000])

    def some(handler):
      handler.reply(
        206,
        _CONTENT[1000:1500],
        Content_Range='bytes 1000-1499/300000',
        Content_Length=500,
      )

    self._check(self._fetch([some, _ranged()], size=None))
    self.assertEqual(self._ranges(), ['bytes=1000-', 'bytes=1500-'])

  def test_a_partial_file_that_is_too_long_is_restarted(self):
    self.part.write_bytes(_OTHER + b'more')
    self._check(self._fetch([_ranged()]))
    self.assertEqual(self._ranges(), [None])

  def test_a_partial_file_beyond_an_unknown_size_is_restarted(self):
    self.part.write_bytes(_OTHER + b'more')
    self._check(self._fetch([_ranged()], size=None))
    self.assertEqual(self._ranges(), ['bytes=300004-', None])

  def test_a_complete_partial_file_is_verified_without_a_request(self):
    self.part.write_bytes(_CONTENT)
    self._check(self._fetch([_status(500)]))
    self.assertEmpty(self.http.seen)

  @parameterized.parameters(1234, 300_000)
  def test_a_partial_file_of_another_file_is_restarted_once(self, length):
    self.part.write_bytes(_OTHER[:length])
    self._check(self._fetch([_ranged()]))
    self.assertEqual(self._ranges()[-1], None)

  def test_bytes_of_a_wrong_server_do_not_spoil_the_next_download(self):
    self._check(self._fetch([_whole(_OTHER, upto=9000)], [_ranged()]))
    self.assertEqual(self.http.seen[-2:], [('/1', 'bytes=9000-'), ('/1', None)])

  def test_a_wrong_file_is_not_kept(self):
    self.part.write_bytes(_OTHER[:1234])
    self._check_fails('sha256 is', [_ranged(_OTHER)])
    self.assertEmpty(os.listdir(self.folder))
    self.assertEqual(self._ranges(), ['bytes=1234-', None])

  def test_a_full_disk_is_not_blamed_on_the_server(self):
    # /dev/full fails on writing, like a full disk.
    self.part.symlink_to('/dev/full')
    with self.assertRaises(OSError) as caught:
      self._fetch([_whole()], [_whole()])
    self.assertEqual(caught.exception.errno, errno.ENOSPC)
    self.assertLen(self.http.seen, 1)
    self.assertEqual(os.listdir(self.folder), ['data.tgz.part'])

  def test_the_bytes_are_on_disk_before_they_are_renamed(self):
    calls = mock.Mock()
    calls.replace.side_effect = os.replace
    with mock.patch.object(os, 'fsync', calls.fsync):
      with mock.patch.object(os, 'replace', calls.replace):
        self._check(self._fetch([_whole()]))
    names = [name for name, _, _ in calls.method_calls]
    self.assertEqual(names, ['fsync', 'replace'])

  def test_an_unencoded_body_is_requested(self):
    heard = {}

    def answer(handler):
      heard.update(handler.headers)
      _whole()(handler)

    self._check(self._fetch([answer]))
    self.assertEqual(heard['Accept-Encoding'], 'identity')
    self.assertNotIn('urllib', heard['User-Agent'])

  def test_ftp_restarts_a_partial_file(self):
    self.part.write_bytes(_OTHER[:1234])
    with socketserver.ThreadingTCPServer(('127.0.0.1', 0), _Ftp) as ftp:
      thread = threading.Thread(target=ftp.serve_forever, args=[0.01])
      thread.start()
      try:
        self._check(
          self._fetch(f'ftp://127.0.0.1:{ftp.server_address[1]}/data.tgz')
        )
      finally:
        ftp.shutdown()
        thread.join()


class _Ftp(socketserver.StreamRequestHandler):
  """The part of FTP that a download needs."""

  def handle(self):
    self._say('220 hello')
    with socket.create_server(('127.0.0.1', 0)) as data:
      port = data.getsockname()[1]
      for line in self.rfile:
        command = line.split()[0].upper()
        if command == b'PASV':
          self._say(f'227 (127,0,0,1,{port // 256},{port % 256})')
        elif command == b'RETR':
          connection, _ = data.accept()
          self._say(f'150 opening ({len(_CONTENT)} bytes)')
          with connection:
            connection.sendall(_CONTENT)
          self._say('226 done')
        else:
          self._say('230 fine' if command == b'USER' else '200 fine')

  def _say(self, line):
    with contextlib.suppress(ConnectionError):
      self.wfile.write(f'{line}\r\n'.encode())


if __name__ == '__main__':
  absltest.main()
