"""An HTTP server for an index: an API, and a page to search with images.

The index, the network and its compiled programs stay in memory. Images are
decoded in threads; one thread embeds and searches the images of all requests
that wait, as one batch where a batch is faster.

  GET  /                                  the page
  GET  /api/index                         folders and number of images
  POST /api/search?k=&folder=&distance=   neighbors of the image in the body
  GET  /api/similar?name=&...             neighbors of an image of the index
  GET  /image?name=[&side=]               an image of the index, as JPEG
"""

import asyncio
import contextlib
import dataclasses
import functools
import io
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from urllib import parse

import numpy as np
import uvicorn
from PIL import Image
from starlette import applications, requests, responses, routing
from starlette import exceptions as http
from starlette.middleware import Middleware, trustedhost

from proxy_nca_jax import images as images_lib
from proxy_nca_jax import inference
from proxy_nca_jax.runtime import errors, folders
from proxy_nca_jax.search import find, page
from proxy_nca_jax.search import index as index_lib

MAX_NEIGHBORS = 100
_MAX_BATCH = 16
_MAX_SIDE = 2048
_DECODING_SECONDS = 20.0
# At the end, clients that send or receive too slowly are cut off.
_CLOSING_SECONDS = 5
_LOOPBACK = ('127.0.0.1', 'localhost', '::1')
# Host headers of requests to them. Starlette cuts [::1]:8000 at its first
# colon. Only IPv6 addresses begin with a bracket, and they need no resolving.
_LOOPBACK_HEADERS = ('127.0.0.1', 'localhost', '[::1]', '[')
# Scripts and styles only from this server, and no page may embed it.
_HEADERS = {
  'Content-Security-Policy': "default-src 'self'; img-src 'self' blob: data:; "
  "frame-ancestors 'none'",
  'X-Content-Type-Options': 'nosniff',
}


class Engine:
  """Embeds and searches the images of concurrent requests in batches."""

  def __init__(
    self,
    path: str,
    content: index_lib.Content,
    embedder: inference.Embedder,
  ):
    """Compiles the network.

    Args:
      path: the index file.
      content: its content.
      embedder: the network that made it.
    """
    self.content = content
    self.read = embedder.read
    self.rows = {name: row for row, name in enumerate(content.names)}
    self.folders = _with_parents(content.labels)
    self._labels = np.array(content.labels)
    self._finder = find.Finder(path, content)
    # A padded batch takes as long as a full one.
    self._embedders = [
      dataclasses.replace(embedder, batch_size=size) for size in (1, _MAX_BATCH)
    ]
    size = embedder.config.dataset.image_size
    self.max_batch = _fastest_batch(
      self._embedders, np.zeros((1, size, size, 3), np.uint8)
    )
    self._waiting = queue.SimpleQueue()
    threading.Thread(target=self._work, daemon=True).start()

  def submit(self, image: np.ndarray, **search) -> futures.Future:
    """Requests the neighbors of an image; see `find`.

    Args:
      image: uint8 [image_size, image_size, 3], as `read` returns it.
      **search: the other arguments of `find`.
    """
    future = futures.Future()
    self._waiting.put((future, image, search))
    return future

  def _work(self) -> None:
    while True:
      requests = [self._waiting.get()]
      with contextlib.suppress(queue.Empty):
        while len(requests) < self.max_batch:
          requests.append(self._waiting.get_nowait())
      try:
        embeddings = self._embed(np.stack([image for _, image, _ in requests]))
        for (future, _, search), embedding in zip(requests, embeddings):
          future.set_result(self.find(embedding, **search))
      except Exception as error:  # Of the device; the server lives on.
        for future, *_ in requests:
          if not future.done():
            future.set_exception(error)

  def _embed(self, images: np.ndarray) -> np.ndarray:
    return self._embedders[len(images) > 1].embed(images)

  def find(
    self,
    embedding: np.ndarray,
    *,
    k: int,
    folder: str | None,
    max_distance: float,
    excluded: int | None = None,
  ) -> list[dict]:
    """Finds the nearest images.

    Args:
      embedding: float32 [dim].
      k: number of neighbors.
      folder: the folder to search, with all folders below it; None searches
        all.
      max_distance: neighbors are at most at this distance.
      excluded: the index of an image that is not to be found.

    Returns:
      The rows of the answer, nearest first.
    """
    searched = None
    if folder is not None:
      is_in = (self._labels == folder) | np.char.startswith(
        self._labels, folder + os.sep
      )
      searched = np.flatnonzero(is_in)
    found = self._finder.find(
      embedding[None], k + (excluded is not None), rows=searched
    )
    rows = [
      {
        'distance': float(distance),
        'name': self.content.names[index],
        'folder': self.content.labels[index],
        'image': f'/image?name={parse.quote(self.content.names[index])}',
      }
      for distance, index in zip(*(part[0] for part in found))
      if index != excluded and distance <= max_distance
    ]
    return rows[:k]


def _fastest_batch(
  embedders: Sequence[inference.Embedder], image: np.ndarray
) -> int:
  """Compiles the networks; returns the batch size of least time per image.

  On CPUs a batch is often no faster than its images one by one.
  """
  seconds = {}
  for embedder in embedders:
    embedder.embed(image)
    start = time.perf_counter()
    embedder.embed(image)
    size = embedder.batch_size
    seconds[size] = (time.perf_counter() - start) / size
  return min(seconds, key=seconds.get)


def _with_parents(labels: Sequence[str]) -> list[str]:
  """Returns the folders of images and the folders that contain these."""
  found = set()
  for label in set(labels):
    while label and label not in found:
      found.add(label)
      label = os.path.dirname(label)
  return sorted(found)


def make_app(
  engine: Engine, *, host: str, max_megabytes: float
) -> applications.Starlette:
  """Returns the ASGI application.

  Args:
    engine: answers the requests.
    host: the address that it is bound to. On a loopback address, requests that
      name another host are rejected: a page elsewhere could otherwise reach the
      server by a name that resolves to this machine.
    max_megabytes: larger uploads are rejected.
  """
  decoding = futures.ThreadPoolExecutor(thread_name_prefix='decode')

  async def decode(work: Callable[[], object]):
    """Runs `work` in a thread; its errors are those of the image."""
    running = asyncio.get_running_loop().run_in_executor(decoding, work)
    try:
      return await asyncio.wait_for(running, _DECODING_SECONDS)
    except TimeoutError as error:
      raise http.HTTPException(
        503, f'The image was not decoded within {_DECODING_SECONDS:g} s.'
      ) from error
    except (ValueError, OSError, MemoryError) as error:
      raise http.HTTPException(
        400, f'The image cannot be read: {errors.one_line(error)}'
      ) from error

  async def get_index(request):
    del request
    return responses.JSONResponse(
      {
        'images': len(engine.content.names),
        'root': folders.escape(engine.content.root),
        'folders': engine.folders,
      }
    )

  async def search(request):
    arguments = _search_arguments(request.query_params, engine)
    body = await _read_body(request, int(max_megabytes * 1e6))
    image = await decode(functools.partial(engine.read, body))
    return responses.JSONResponse(
      await asyncio.wrap_future(engine.submit(image, **arguments))
    )

  async def similar(request):
    arguments = _search_arguments(request.query_params, engine)
    row = _find_row(request.query_params, engine)
    rows = await asyncio.to_thread(
      engine.find,
      engine.content.embeddings[row],
      excluded=row,
      **arguments,
    )
    return responses.JSONResponse(rows)

  async def image(request):
    side = _number(request.query_params, 'side', 320, 1, _MAX_SIDE, kind=int)
    path = engine.content.paths[_find_row(request.query_params, engine)]
    if not os.path.exists(path):
      raise http.HTTPException(404, 'The file has been removed since.')
    return responses.Response(
      await decode(functools.partial(_as_jpeg, path, side)),
      media_type='image/jpeg',
    )

  def file(content: str, media_type: str):
    async def get(request):
      del request
      return responses.Response(content, media_type=media_type)

    return get

  async def fail(request, error):
    del request
    return responses.JSONResponse(
      {'error': error.detail}, status_code=error.status_code
    )

  hosts = list(_LOOPBACK_HEADERS) if host in _LOOPBACK else ['*']
  return applications.Starlette(
    routes=[
      routing.Route('/', file(page.HTML, 'text/html')),
      routing.Route('/page.css', file(page.STYLE, 'text/css')),
      routing.Route('/page.js', file(page.SCRIPT, 'text/javascript')),
      routing.Route('/api/index', get_index),
      routing.Route('/api/search', search, methods=['POST']),
      routing.Route('/api/similar', similar),
      routing.Route('/image', image),
    ],
    middleware=[
      Middleware(trustedhost.TrustedHostMiddleware, allowed_hosts=hosts),
      Middleware(_AddHeaders),
    ],
    exception_handlers={http.HTTPException: fail},
  )


class _AddHeaders:
  """Adds the headers to every response."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    async def send_with_headers(message):
      if message['type'] == 'http.response.start':
        message['headers'] = [
          *message.get('headers', ()),
          *((k.lower().encode(), v.encode()) for k, v in _HEADERS.items()),
        ]
      await send(message)

    await self._app(scope, receive, send_with_headers)


async def _read_body(request, max_bytes: int) -> bytes:
  """Reads an upload; raises an error of HTTP if it is too large or empty."""
  body = bytearray()
  try:
    async for part in request.stream():
      body += part
      if len(body) > max_bytes:
        raise http.HTTPException(
          413, f'The image has more than {max_bytes / 1e6:g} MB.'
        )
  except requests.ClientDisconnect as error:  # Nobody reads the answer.
    raise http.HTTPException(400, 'The upload ended early.') from error
  if not body:
    raise http.HTTPException(400, 'The body is empty: send an image file.')
  return bytes(body)


def _search_arguments(params, engine: Engine) -> dict:
  """Returns the arguments of `Engine.find` from those of a request."""
  folder = params.get('folder')
  if folder is not None and folder not in engine.folders:
    raise http.HTTPException(
      404, f'The index has no folder {folder!r}: /api/index lists them.'
    )
  return {
    'k': _number(params, 'k', 24, 1, MAX_NEIGHBORS, kind=int),
    'folder': folder,
    'max_distance': _number(params, 'distance', 2.0, 0, 2, kind=float),
  }


def _number(params, name: str, default, low, high, *, kind):
  text = params.get(name, default)
  try:
    value = kind(text)
    if low <= value <= high:
      return value
  except ValueError:
    pass
  raise http.HTTPException(
    400, f'{name} ({text!r:.40}) must be a number from {low} to {high}.'
  )


def _find_row(params, engine: Engine) -> int:
  name = params.get('name', '')
  if name not in engine.rows:
    raise http.HTTPException(404, f'The index has no image {name!r:.200}.')
  return engine.rows[name]


def _as_jpeg(path: str, side: int) -> bytes:
  """Decodes a file of the index, at most `side` pixels long, as JPEG."""
  image = images_lib.decode(folders.read_file(path))
  image.thumbnail((side, side), Image.Resampling.BICUBIC)
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=88)
  return buffer.getvalue()


def serve(
  path: str,
  content: index_lib.Content,
  embedder: inference.Embedder,
  *,
  host: str,
  port: int,
  max_megabytes: float,
) -> None:
  """Serves an index until the process is stopped.

  Args:
    path: the index file.
    content: its content.
    embedder: the network that made it.
    host: address to bind to.
    port: port to bind to.
    max_megabytes: larger uploads are rejected.

  Raises:
    OSError: if the address is in use, or not one of this machine.
  """
  # Before the network is compiled.
  with _listen(host, port) as listening:
    engine = Engine(path, content, embedder)
    app = make_app(engine, host=host, max_megabytes=max_megabytes)
    address = f'[{host}]' if ':' in host else host
    print(
      f'{len(content.names):,} images: http://{address}:{port}/ (Ctrl-C stops)',
      flush=True,
    )
    uvicorn.Server(
      uvicorn.Config(
        app,
        log_level='warning',
        timeout_graceful_shutdown=_CLOSING_SECONDS,
      )
    ).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
  """Returns a socket that listens; raises OSError if there can be none."""
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  # UnicodeError: a host name with an empty or overlong part.
  except (OSError, UnicodeError) as error:
    raise OSError(
      f'Cannot listen on {host!r} (--host), port {port} (--port): '
      f'{errors.one_line(error)}.'
    ) from error
