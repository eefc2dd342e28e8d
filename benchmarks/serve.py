"""Measures the search server under load.

python benchmarks/serve.py --index=FILE --image=FILE [--clients=1,8,64]
  [--requests=200] [--port=8765]

Starts `search serve` on an index and sends it the same image from several
clients at once, each of which waits for its answer before it sends the next
request. Columns:

  requests/s  answered requests over the whole time
  median, p99 milliseconds from request to answer
"""

import argparse
import http.client
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np

_ROOT = pathlib.Path(__file__).parent.parent


def send(port: int, body: bytes) -> float:
  """Sends one request; returns its milliseconds."""
  start = time.perf_counter()
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=600)
  connection.request('POST', '/api/search?k=10', body)
  response = connection.getresponse()
  answer = response.read()
  connection.close()
  if response.status != 200:
    raise RuntimeError(answer.decode())
  return 1e3 * (time.perf_counter() - start)


def measure(port: int, body: bytes, clients: int, requests: int):
  """Returns requests per second, and the milliseconds of each request."""
  times, remaining = [], iter(range(requests))
  lock = threading.Lock()

  def work():
    while True:
      with lock:
        if next(remaining, None) is None:
          return
      elapsed = send(port, body)
      with lock:
        times.append(elapsed)

  threads = [threading.Thread(target=work) for _ in range(clients)]
  start = time.perf_counter()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return len(times) / (time.perf_counter() - start), times


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--index', required=True, help='an index')
  parser.add_argument('--image', required=True, help='the image to send')
  parser.add_argument('--clients', default='1,8,64', help='numbers of clients')
  parser.add_argument('--requests', type=int, default=200)
  parser.add_argument('--port', type=int, default=8765)
  arguments = parser.parse_args()
  body = pathlib.Path(arguments.image).read_bytes()
  server = subprocess.Popen(
    [
      *(sys.executable, '-m', 'proxy_nca_jax.search', 'serve'),
      f'--index={arguments.index}',
      f'--port={arguments.port}',
    ],
    stdout=subprocess.PIPE,
    text=True,
    cwd=_ROOT,
  )
  try:
    print(server.stdout.readline().strip())
    # The line is printed before the port is open.
    time.sleep(2)
    send(arguments.port, body)
    print(f'{"clients":>8}{"requests/s":>12}{"median ms":>11}{"p99 ms":>9}')
    for clients in map(int, arguments.clients.split(',')):
      rate, times = measure(arguments.port, body, clients, arguments.requests)
      print(
        f'{clients:8}{rate:12.1f}{np.median(times):11.0f}'
        f'{np.percentile(times, 99):9.0f}'
      )
  finally:
    server.terminate()
    server.wait()


if __name__ == '__main__':
  main()
