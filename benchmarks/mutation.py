"""Mutation testing: which small changes of the code do the tests not notice?

python benchmarks/mutation.py --files proxy_nca_jax/losses/*.py \
  --tests tests/test_losses*.py --num=40 --seed=0

Draws mutants from all that the files allow: a comparison, an arithmetic or a
logical operator exchanged for its counterpart, 0 and 1 or True and False
swapped, a negation or an argument `where=` dropped, minimum and maximum
exchanged. Each is written into a copy of the checkout, and pytest runs the
given test files there until the first failure. A mutant is killed if a test
fails, the import fails, or the tests exceed the time limit.

Prints a table by file of mutants, killed ones and survivors, then each
survivor's position and change. A survivor is either equivalent to the code or
shows behavior that no test checks.
"""

import argparse
import ast
import collections
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import sys
import tempfile
import time
from typing import NamedTuple

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# Each run of the tests is forked from a process that has imported the
# libraries, but no module of the checkout.
_PROCESSES = multiprocessing.get_context('forkserver')
_PRELOADED = ['pytest', 'jax.numpy', 'scipy.special', 'chex', 'absl.testing']

_OPERATORS = {
  ast.Lt: ('<', '<='),
  ast.LtE: ('<=', '<'),
  ast.Gt: ('>', '>='),
  ast.GtE: ('>=', '>'),
  ast.Eq: ('==', '!='),
  ast.NotEq: ('!=', '=='),
  ast.Add: ('+', '-'),
  ast.Sub: ('-', '+'),
  ast.Mult: ('*', '/'),
  ast.Div: ('/', '*'),
  ast.FloorDiv: ('//', '*'),
  ast.Mod: ('%', '*'),
  ast.Pow: ('**', '*'),
  ast.BitAnd: ('&', '|'),
  ast.BitOr: ('|', '&'),
  ast.LShift: ('<<', '>>'),
  ast.RShift: ('>>', '<<'),
  ast.And: ('and', 'or'),
  ast.Or: ('or', 'and'),
}
_NAMES = {
  'min': 'max',
  'minimum': 'maximum',
  'argmin': 'argmax',
  'any': 'all',
  'triu': 'tril',
}
_NAMES |= {new: old for old, new in _NAMES.items()}
# By their representations: 1 and True are equal.
_CONSTANTS = {
  '0': '1',
  '1': '0',
  '2': '3',
  '0.0': '1.0',
  '1.0': '0.0',
  'True': 'False',
  'False': 'True',
  "'left'": "'right'",
  "'right'": "'left'",
}


class Mutant(NamedTuple):
  """One change of one file.

  Attributes:
    file: path relative to the checkout.
    line: line number of the change, from 1.
    start, end: the range of bytes to replace.
    new: the replacement.
    change: a description, old -> new.
  """

  file: str
  line: int
  start: int
  end: int
  new: str
  change: str


def find_mutants(file: str) -> list[Mutant]:
  """Lists the mutants of a file; errors, types and decorators have none."""
  source = (_ROOT / file).read_bytes()
  starts = [0]
  for line in source.splitlines(keepends=True):
    starts.append(starts[-1] + len(line))
  mutants = []

  def begin(node):
    return starts[node.lineno - 1] + node.col_offset

  def end(node):
    return starts[node.end_lineno - 1] + node.end_col_offset

  def add(start, end, new):
    old = source[start:end].decode()
    line = source.count(b'\n', 0, start) + 1
    change = ' '.join(f'{old} -> {new or "(dropped)"}'.split())
    mutants.append(Mutant(file, line, start, end, new, change))

  def swap_operator(left, operator, right):
    if type(operator) not in _OPERATORS:
      return
    old, new = _OPERATORS[type(operator)]
    gap = source[end(left) : begin(right)].decode()
    place = end(left) + gap.index(old)
    add(place, place + len(old), new)

  def visit(node):
    if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
      return
    if isinstance(node, ast.BinOp):
      swap_operator(node.left, node.op, node.right)
    elif isinstance(node, ast.AugAssign):
      swap_operator(node.target, node.op, node.value)
    elif isinstance(node, ast.Compare):
      values = [node.left, *node.comparators]
      for left, operator, right in zip(values, node.ops, values[1:]):
        swap_operator(left, operator, right)
    elif isinstance(node, ast.BoolOp):
      for left, right in zip(node.values, node.values[1:]):
        swap_operator(left, node.op, right)
    elif isinstance(node, ast.UnaryOp):
      add(begin(node), begin(node.operand), '')
    elif isinstance(node, ast.Constant):
      if repr(node.value) in _CONSTANTS:
        add(begin(node), end(node), _CONSTANTS[repr(node.value)])
    elif isinstance(node, ast.Call):
      name = node.func
      if isinstance(name, ast.Attribute) and name.attr in _NAMES:
        add(end(name) - len(name.attr), end(name), _NAMES[name.attr])
      elif isinstance(name, ast.Name) and name.id in _NAMES:
        add(begin(name), end(name), _NAMES[name.id])
      for keyword in node.keywords:
        if keyword.arg == 'where':
          comma = re.match(rb'\s*,', source[end(keyword) :])
          stop = end(keyword) + (comma.end() if comma else 0)
          add(begin(keyword), stop, '')
    for name, value in ast.iter_fields(node):
      if name in ('annotation', 'returns', 'decorator_list'):
        continue
      for child in value if isinstance(value, list) else [value]:
        is_docstring = isinstance(child, ast.Expr) and isinstance(
          child.value, ast.Constant
        )
        if isinstance(child, ast.AST) and not is_docstring:
          visit(child)

  visit(ast.parse(source))
  return mutants


def run_tests(tree: pathlib.Path, tests: list[str], limit: float | None) -> int:
  """Runs pytest in a copy of the checkout.

  Args:
    tree: the copy.
    tests: test files, relative to it.
    limit: in seconds; None waits for the tests.

  Returns:
    The exit code, or -1 if the tests exceeded the limit.
  """
  process = _PROCESSES.Process(target=_run_pytest, args=(str(tree), tests))
  process.start()
  process.join(limit)
  if process.exitcode is None:
    process.kill()
    process.join()
    return -1
  return process.exitcode


def _run_pytest(tree: str, tests: list[str]) -> None:
  silence = os.open(os.devnull, os.O_WRONLY)
  for stream in (1, 2):
    os.dup2(silence, stream)
  os.chdir(tree)
  sys.dont_write_bytecode = True
  options = ['-x', '-q', '-o', 'addopts=', '-p', 'no:cacheprovider']
  # Without the interpreter's shutdown, which waits for threads of a mutant.
  os._exit(pytest.main([*options, *tests]))


def try_mutant(
  tree: pathlib.Path, mutant: Mutant, tests: list[str], limit: float
) -> bool:
  """Returns whether the tests kill the mutant."""
  path = tree / mutant.file
  source = path.read_bytes()
  changed = source[: mutant.start] + mutant.new.encode() + source[mutant.end :]
  path.write_bytes(changed)
  try:
    return run_tests(tree, tests, limit) != 0
  finally:
    path.write_bytes(source)


def print_table(results: dict[Mutant, bool]) -> None:
  counts = collections.Counter(mutant.file for mutant in results)
  killed = collections.Counter(
    mutant.file for mutant, is_killed in results.items() if is_killed
  )
  width = max(map(len, counts))
  print(f'{"file":{width}}  mutants  killed  survivors')
  for file, count in sorted(counts.items()):
    survivors = count - killed[file]
    print(f'{file:{width}}  {count:7}  {killed[file]:6}  {survivors:9}')
  for mutant, is_killed in results.items():
    if not is_killed:
      print(f'{mutant.file}:{mutant.line}: {mutant.change}')


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--files', nargs='+', required=True, help='files to mutate'
  )
  parser.add_argument(
    '--tests', nargs='+', required=True, help='test files to run, in order'
  )
  parser.add_argument('--num', type=int, default=40, help='number of mutants')
  parser.add_argument('--seed', type=int, default=0, help='seed of the sample')
  parser.add_argument(
    '--limit',
    type=float,
    help='seconds per mutant; by default twice the time of the unchanged code, '
    'plus 30',
  )
  args = parser.parse_args()

  mutants = [mutant for file in args.files for mutant in find_mutants(file)]
  number = min(args.num, len(mutants))
  mutants = sorted(random.Random(args.seed).sample(mutants, number))
  with tempfile.TemporaryDirectory() as folder:
    tree = pathlib.Path(folder) / 'checkout'
    ignored = shutil.ignore_patterns('.git', '__pycache__')
    shutil.copytree(_ROOT, tree, ignore=ignored)
    # Programs are compiled once: most are the same for every mutant.
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(tree / '.compiled')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    os.environ['JAX_PLATFORMS'] = 'cpu'
    _PROCESSES.set_forkserver_preload(_PRELOADED)
    start = time.monotonic()
    if run_tests(tree, args.tests, None):
      sys.exit('The tests fail without a mutation: run them with pytest.')
    limit = args.limit or 30 + 2 * (time.monotonic() - start)
    results = {}
    for mutant in mutants:
      results[mutant] = try_mutant(tree, mutant, args.tests, limit)
      outcome = 'killed' if results[mutant] else 'SURVIVED'
      print(
        f'{mutant.file}:{mutant.line}: {mutant.change}: {outcome}',
        file=sys.stderr,
        flush=True,
      )
  print_table(results)


if __name__ == '__main__':
  main()
