"""Every flag and field that the package mentions exists."""

import argparse
import ast
import importlib
import pathlib
import re
from unittest import mock

from absl.testing import absltest

import proxy_nca_jax
from proxy_nca_jax import configuration

_PACKAGE = pathlib.Path(proxy_nca_jax.__file__).parent
_COMMANDS = ('evaluate', 'search', 'report', 'datasets')
# Flags of other programs: of argparse, absl and multiprocessing.
_OTHERS = {'help', 'multiprocessing'}
# The style sheet names its colors like flags.
_WITHOUT_FLAGS = ('pages.py',)
# Names of examples, and attributes of other objects called config.
_EXAMPLES = {'x', 'update', 'to_dict'}
_GAP = '\0'  # Where an f-string takes a value.


def _texts(path):
  """Yields the texts of a file: docstrings, messages and f-strings."""
  tree = ast.parse(path.read_text())
  inside = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr):
      inside |= {id(part) for part in node.values}
      yield ''.join(
        part.value if isinstance(part, ast.Constant) else _GAP
        for part in node.values
      )
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      if id(node) not in inside:
        yield node.value


def _mentions(pattern):
  """{name: the file that mentions it}; the pattern's group is the name."""
  found = {}
  for path in sorted(_PACKAGE.rglob('*.py')):
    if path.name not in _WITHOUT_FLAGS:
      for text in _texts(path):
        for match in re.finditer(pattern, text):
          found.setdefault(match[1], path.name)
  return found


def _flags():
  """Returns the flags of all commands."""
  names = {'config'}
  add = argparse.ArgumentParser.add_argument

  def record(parser, *flags, **settings):
    names.update(flag.lstrip('-') for flag in flags)
    return add(parser, *flags, **settings)

  with (
    mock.patch.object(argparse.ArgumentParser, 'add_argument', record),
    mock.patch('sys.stdout'),
  ):
    for name in _COMMANDS:
      module = importlib.import_module(f'proxy_nca_jax.{name}.__main__')
      try:
        module.main(['--help'])
      except SystemExit:
        pass
  for path in _PACKAGE.rglob('*.py'):
    names |= set(re.findall(r"DEFINE_\w+\(\s*'(\w+)'", path.read_text()))
  return names


class AdviceTest(absltest.TestCase):
  def test_every_flag_that_is_mentioned_exists(self):
    # Not a dash of a text such as `a--b`, and whole names only.
    found = _mentions(rf'(?<![\w-])--([a-z]\w*)(?![\w{_GAP}*])')
    self.assertGreater(len(found), 20)
    wrong = found.keys() - _flags() - _OTHERS
    self.assertEmpty({name: found[name] for name in wrong})

  def test_every_field_that_is_mentioned_exists(self):
    found = _mentions(
      rf'(?<![\w.])config\.([a-z_]+(?:\.[a-z_]+)*)(?![\w{_GAP}(])'
    )
    self.assertGreater(len(found), 40)
    groups = {name.rpartition('.')[0] for name in configuration.FIELDS}
    wrong = found.keys() - configuration.FIELDS.keys() - groups - _EXAMPLES
    self.assertEmpty({name: found[name] for name in wrong})


if __name__ == '__main__':
  absltest.main()
