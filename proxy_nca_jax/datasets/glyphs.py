"""Glyphs: each class is a character, drawn in the styles of many fonts.

The fonts are those that matplotlib ships, or a folder of fonts, so that an
embedding can be trained and evaluated without a download.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
import tensorflow_datasets as tfds
from fontTools import ttLib
from PIL import Image, ImageFont, features

from proxy_nca_jax import images
from proxy_nca_jax.datasets import records
from proxy_nca_jax.runtime import errors, folders

# matplotlib's text fonts; its other fonts contain parts of formulas.
_TEXT_FONTS = ('DejaVuSans', 'DejaVuSerif', 'STIXGeneral')
_SUFFIXES = ('.ttf', '.otf', '.ttc', '.otc')
# At 24 pixels per em, 99% of all glyphs fit into 32 pixels; others are shrunk.
_PIXELS_PER_EM, _CANVAS = 24, 32


@dataclasses.dataclass(frozen=True)
class Face:
  """One font style: a font file and the index of the style in it."""

  path: str
  index: int

  @property
  def name(self) -> str:
    stem = folders.escape(os.path.basename(self.path))
    return f'{stem}#{self.index}' if self.index else stem

  @functools.cached_property
  def characters(self) -> frozenset[int]:
    with ttLib.TTFont(self.path, fontNumber=self.index, lazy=True) as font:
      return frozenset(font.getBestCmap() or ())

  @functools.cached_property
  def font(self) -> ImageFont.FreeTypeFont:
    # The basic layout does not depend on an installed shaping engine.
    return ImageFont.truetype(
      self.path,
      _PIXELS_PER_EM,
      self.index,
      layout_engine=ImageFont.Layout.BASIC,
    )

  def draw(self, character: int) -> np.ndarray | None:
    """Draws a character centered by its ink, uint8 [32, 32]; None if blank."""
    mask, _ = self.font.getmask2(chr(character), mode='L')
    width, height = mask.size
    ink = np.array(mask, np.uint8).reshape(height, width)
    rows, columns = np.nonzero(ink)
    if not rows.size:
      return None
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    if max(ink.shape) > _CANVAS:
      glyph = Image.fromarray(ink)
      glyph.thumbnail((_CANVAS, _CANVAS))
      ink = np.asarray(glyph)
    canvas = np.zeros((_CANVAS, _CANVAS), np.uint8)
    height, width = ink.shape
    top, left = (_CANVAS - height) // 2, (_CANVAS - width) // 2
    canvas[top : top + height, left : left + width] = ink
    return canvas


@dataclasses.dataclass(kw_only=True)
class GlyphsConfig(tfds.core.BuilderConfig):
  """The faces to draw and the minimum number of distinct styles per class."""

  faces: Sequence[Face] = ()
  min_styles: int = 8


class Glyphs(records.OrderedBuilder):
  """Characters in every style of a set of fonts, 32 x 32 pixels.

  Homoglyphs, characters that share a pixel-identical drawing, form one class,
  and each drawing is kept once. So no image has two labels, and no query has an
  exact copy in the gallery.
  """

  def _info(self) -> tfds.core.DatasetInfo:
    return records.make_info(self, side=_CANVAS)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'images': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict]]:
    faces = self.builder_config.faces
    labels, class_names = [], []
    for characters in group_homoglyphs(faces):
      drawings = {}
      for face, character, drawing in _draw_all(faces, characters):
        name = f'U+{character:04X} {face.name}'
        drawings.setdefault(drawing.tobytes(), (name, drawing))
      if len(drawings) < self.builder_config.min_styles:
        continue
      for name, drawing in drawings.values():
        image = Image.fromarray(drawing).convert('RGB')
        yield (
          len(labels),
          {
            'image': images.encode_png(image),
            'label': len(class_names),
            'name': name,
          },
        )
        labels.append(len(class_names))
      class_names.append(''.join(map(chr, characters)))
    if not labels:
      raise ValueError(
        f'No character has {self.builder_config.min_styles} distinct drawings '
        f'in the {len(faces)} fonts: lower config.dataset.min_styles.'
      )
    self.info.metadata.update(labels=labels, class_names=class_names)


def group_homoglyphs(faces: Sequence[Face]) -> list[list[int]]:
  """Groups characters that share a drawing, by union-find over hashes.

  Only an 8-byte hash of each drawing stays in memory. A hash collision would
  merge two classes; with 10 million drawings, its probability is about one in
  400,000.

  Args:
    faces: the font styles.

  Returns:
    Groups of Unicode code points, in ascending order of their first members.
  """
  characters = sorted(frozenset().union(*(face.characters for face in faces)))
  characters = [c for c in characters if _is_visible(c)]
  parents = {character: character for character in characters}

  def root(character):
    while parents[character] != character:
      parents[character] = parents[parents[character]]
      character = parents[character]
    return character

  first_with = {}
  for _, character, drawing in _draw_all(faces, characters):
    digest = hashlib.blake2b(drawing.tobytes(), digest_size=8).digest()
    other = first_with.setdefault(digest, character)
    parents[root(character)] = root(other)
  groups = collections.defaultdict(list)
  for character in characters:
    groups[root(character)].append(character)
  return list(groups.values())


def _is_visible(character: int) -> bool:
  """Whether it is a letter, number, punctuation or symbol."""
  return unicodedata.category(chr(character))[0] in 'LNPS'


def _draw_all(faces, characters):
  for character in characters:
    for face in faces:
      if character in face.characters:
        drawing = face.draw(character)
        if drawing is not None:
          yield face, character, drawing


def _text_fonts() -> list[str]:
  folder = os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf')
  return [
    os.path.join(folder, name)
    for name in sorted(os.listdir(folder))
    if name.startswith(_TEXT_FONTS) and 'Display' not in name
  ]


def _fonts_in(fonts_dir: str) -> list[str]:
  """Returns the font files of a folder, without links to nothing.

  Raises:
    ValueError: if the folder or one below it cannot be listed.
  """
  if not os.path.isdir(fonts_dir):
    raise ValueError(
      f'No folder {fonts_dir!r} (config.dataset.fonts_dir): name a folder of '
      f'fonts ({", ".join(_SUFFIXES)}), or leave it empty to use the fonts '
      'that matplotlib ships.'
    )
  listing = folders.list_files(fonts_dir)
  if listing.unlisted:
    raise ValueError(
      f'{folders.describe(listing.unlisted)} in {fonts_dir!r} '
      '(config.dataset.fonts_dir) cannot be listed: make it readable, or move '
      'it away.'
    )
  return [
    os.path.join(fonts_dir, path)
    for path in listing.files
    if path.lower().endswith(_SUFFIXES)
  ]


def _faces(path: str) -> list[Face]:
  """Returns the styles in a font file.

  Raises:
    ValueError: if the file is not a font that can be drawn.
  """
  try:
    with open(path, 'rb') as file:
      is_collection = file.read(4) == b'ttcf'
    num_fonts = 1
    if is_collection:
      with ttLib.TTCollection(path, lazy=True) as collection:
        num_fonts = len(collection.fonts)
    faces = [Face(os.path.abspath(path), i) for i in range(num_fonts)]
    for face in faces:
      _ = face.characters, face.font
    return faces
  # fontTools raises many types for broken tables, including AssertionError and
  # struct.error.
  except Exception as error:
    raise ValueError(
      f'{folders.escape(path)}: {errors.one_line(error)}'
    ) from error


def make_builder(
  *, data_dir: str, fonts_dir: str, min_styles: int
) -> tuple[tfds.core.DatasetBuilder, list[list[str]]]:
  """Returns the builder for a set of fonts, and the files that are not fonts.

  Args:
    data_dir: the folder of prepared datasets.
    fonts_dir: a folder of fonts, searched recursively; '' uses the text fonts
      of matplotlib.
    min_styles: classes with fewer distinct drawings are left out.

  Returns:
    (builder, skipped): skipped has [file, reason] of each unreadable font.

  Raises:
    ValueError: if the folder is missing or has no readable font.
  """
  faces, skipped, contents = [], [], hashlib.sha256()
  for path in _fonts_in(fonts_dir) if fonts_dir else _text_fonts():
    try:
      faces.extend(_faces(path))
    except ValueError as error:
      skipped.append([folders.escape(os.path.basename(path)), str(error)])
      continue
    with open(path, 'rb') as file:
      contents.update(hashlib.file_digest(file, 'sha256').digest())
  if not faces:
    raise ValueError(
      f'No readable font in {fonts_dir!r} (config.dataset.fonts_dir): expected '
      f'files ending in {", ".join(_SUFFIXES)}.'
    )
  # The dataset depends on the fonts, these settings and the rasterizer.
  freetype = features.version('freetype2')
  settings = [min_styles, freetype, unicodedata.unidata_version]
  contents.update(json.dumps(settings).encode())
  config = GlyphsConfig(
    name=contents.hexdigest()[:16], faces=faces, min_styles=min_styles
  )
  builder = Glyphs(data_dir=data_dir, config=config, file_format='array_record')
  return builder, skipped
