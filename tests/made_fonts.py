"""matplotlib's fonts with few of their characters: quick to draw them all."""

import os
import pathlib
import shutil
import string
import tempfile

import matplotlib
from fontTools import ttLib

FONTS = pathlib.Path(matplotlib.get_data_path(), 'fonts', 'ttf')
# Some Greek and Cyrillic capitals are drawn as Latin ones.
_CHARACTERS = frozenset(
  [
    *map(ord, string.ascii_letters + string.digits),
    *range(0x391, 0x3CA),
    *range(0x410, 0x450),
  ]
)


def write(path: pathlib.Path, font: str) -> None:
  """Writes a font of matplotlib, such as 'DejaVuSans.ttf', to a file."""
  with ttLib.TTFont(FONTS / font, recalcTimestamp=False) as full:
    for table in full['cmap'].tables:
      table.cmap = {
        character: name
        for character, name in table.cmap.items()
        if character in _CHARACTERS
      }
    full.save(path)


def folder() -> str:
  """Returns a folder of all text fonts, which tests and processes share."""
  root = os.environ['MADE_FONTS_DIR']
  path = os.path.join(root, 'fonts')
  if not os.path.exists(path):
    written = pathlib.Path(tempfile.mkdtemp(dir=root))
    for name in ('DejaVuSans', 'DejaVuSerif', 'STIXGeneral'):
      for font in FONTS.glob(f'{name}*.ttf'):
        write(written / font.name, font.name)
    try:
      os.rename(written, path)
    except OSError:  # Another process was faster.
      shutil.rmtree(written)
  return path
