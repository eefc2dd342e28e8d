"""Pages of HTML that are one file: pictures are inside, nothing is fetched."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image

# Readable on a phone and in the dark; a frame tells right from wrong, and so
# does a mark for those who see no colours.
_STYLE = """
:root { color-scheme: light dark; --right: #1a7f37; --wrong: #c62828; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; padding: 0 1rem;
  max-width: 72rem; }
h1, h2 { line-height: 1.2; }
.row { display: flex; gap: .5rem; overflow-x: auto; padding: .5rem 0;
  align-items: flex-start; }
figure { margin: 0; flex: none; width: 7rem; }
figure img { width: 100%; height: auto; display: block; box-sizing: border-box;
  border: 4px solid transparent; border-radius: 4px; }
figure.right img { border-color: var(--right); }
figure.wrong img { border-color: var(--wrong); border-style: dashed; }
figcaption { font-size: .75rem; overflow-wrap: anywhere; }
"""


class Card(NamedTuple):
  """A picture with a caption.

  Attributes:
    image: its source, of `thumbnail`.
    caption: one line, plain text.
    is_right: whether it is framed as right, as wrong, or, by default, not.
  """

  image: str
  caption: str
  is_right: bool | None = None


def thumbnail(image: Image.Image, *, side: int = 112) -> str:
  """Returns a small copy as the source of an <img>, a data: URL."""
  image = image.convert('RGB')
  image.thumbnail((side, side))
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=85)
  return 'data:image/jpeg;base64,' + base64.b64encode(
    buffer.getvalue()
  ).decode()


def row(cards: Iterable[Card]) -> str:
  """Returns pictures side by side."""
  return f'<div class="row">{"".join(map(_figure, cards))}</div>'


def _figure(card: Card) -> str:
  caption, kind = html.escape(card.caption), ''
  if card.is_right is not None:
    kind = 'right' if card.is_right else 'wrong'
    caption = f'{"✓" if card.is_right else "✗"} {caption}'
  return (
    f'<figure class="{kind}"><img src="{card.image}" alt="{caption}" '
    f'loading="lazy"><figcaption>{caption}</figcaption></figure>'
  )


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
  """Returns a whole page of sections, each a heading and HTML."""
  title = html.escape(title)
  body = ''.join(
    f'<section><h2>{html.escape(heading)}</h2>{content}</section>'
    for heading, content in sections
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{title}</title><style>{_STYLE}</style></head>'
    f'<body><main><h1>{title}</h1>{body}</main></body></html>\n'
  )
