"""Self-contained HTML pages: images are embedded, and nothing is fetched.

The pages support phones, dark mode and screen readers. Information that a color
conveys is also conveyed by a mark or a word.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --correct: #1a7f37; --wrong: #c62828;
  --faint: color-mix(in srgb, currentColor 15%, transparent); }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; padding: 0 1rem;
  max-width: 72rem; }
h1, h2, h3 { line-height: 1.2; } h3 { margin-bottom: .25rem; }
.row { display: flex; gap: .5rem; overflow-x: auto; padding: .25rem 0; }
figure { margin: 0; flex: none; width: 6.5rem; }
figure img { width: 100%; display: block; border: 4px solid transparent;
  border-radius: 4px; }
figure.correct img { border-color: var(--correct); }
figure.wrong img { border-color: var(--wrong); border-style: dashed; }
figcaption { font-size: .75rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left;
  border-bottom: 1px solid var(--faint); vertical-align: top; }
td.number, th.number { text-align: right; } td:first-child { min-width: 9rem; }
th button { all: unset; cursor: pointer; font-weight: bold; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
.chart { max-width: 36rem; } .charts { display: flex; flex-wrap: wrap;
  gap: 1rem; } .charts > * { flex: 1 1 20rem; }
svg { width: 100%; height: auto; font-size: 12px; }
svg text { fill: currentColor; } svg .grid { stroke: var(--faint); }
svg .axis { stroke: currentColor; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .85rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem;
  margin-right: .3rem; border-radius: 2px; }
.map { position: relative; max-width: 44rem; }
.map circle:hover { stroke: currentColor; stroke-width: 2; }
#tip { position: absolute; display: none; pointer-events: none; padding: 4px;
  background: Canvas; border: 1px solid; font-size: .75rem; }
#tip i:not([hidden]) { display: block; width: 48px; height: 48px; }
pre { overflow-x: auto; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll('th button')) {
  button.addEventListener('click', () => {
    const th = button.parentElement, table = th.closest('table');
    const column = [...th.parentElement.children].indexOf(th);
    const up = th.getAttribute('aria-sort') !== 'ascending';
    for (const other of th.parentElement.children)
      other.removeAttribute('aria-sort');
    th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const value = (row) => row.children[column].dataset.value ??
      row.children[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  });
}
const tip = document.getElementById('tip');
for (const point of document.querySelectorAll('.map circle')) {
  point.addEventListener('pointerenter', () => {
    const box = point.closest('.map').getBoundingClientRect();
    const at = point.getBoundingClientRect();
    const {column, row, name} = point.dataset;
    tip.querySelector('i').style.backgroundPosition =
      `-${48 * column}px -${48 * row}px`;
    tip.querySelector('span').textContent = name;
    tip.style.left = `${at.left - box.left + 12}px`;
    tip.style.top = `${at.top - box.top + 12}px`;
    tip.style.display = 'block';
  });
  point.addEventListener('pointerleave', () => tip.style.display = 'none');
}
"""


class Card(NamedTuple):
  """An image with a caption, or only a caption.

  Attributes:
    image: the source of the image, from `thumbnail`; '' shows none.
    caption: one line of plain text.
    is_correct: frames the image as correct or wrong; None draws no frame.
  """

  image: str
  caption: str
  is_correct: bool | None = None


def thumbnail(image: Image.Image, *, side: int = 96) -> str:
  """Returns a small copy of an image as a data: URL, for <img>."""
  image = image.convert('RGB')
  image.thumbnail((side, side))
  return _data_url(image)


def _data_url(image: Image.Image) -> str:
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=85)
  return (
    'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode()
  )


def row(cards: Iterable[Card]) -> str:
  """Returns the HTML of images side by side."""
  return f'<div class="row">{"".join(map(_figure, cards))}</div>'


def _figure(card: Card) -> str:
  caption, kind = html.escape(card.caption), ''
  if card.is_correct is not None:
    kind = 'correct' if card.is_correct else 'wrong'
    caption = f'{"✓" if card.is_correct else "✗"} {caption}'
  image = f'<img src="{card.image}" alt="{caption}" loading="lazy">'
  return (
    f'<figure class="{kind}">{image if card.image else ""}'
    f'<figcaption>{caption}</figcaption></figure>'
  )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """Returns the HTML of a table; a click on a header sorts by its column.

  Floats are fractions, shown in percent; None is an empty cell.
  """
  head = ''.join(
    f'<th scope="col"><button type="button">{html.escape(name)}</button></th>'
    for name in header
  )
  body = ''.join(f'<tr>{"".join(map(_cell, cells))}</tr>' for cells in rows)
  return (
    f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _cell(value: object) -> str:
  if value is None:
    return '<td></td>'
  if isinstance(value, float):
    return f'<td class="number" data-value="{value}">{100 * value:.2f}</td>'
  if isinstance(value, int):
    return f'<td class="number" data-value="{value}">{value:,}</td>'
  return f'<td>{html.escape(str(value))}</td>'


def points(
  positions: np.ndarray,
  groups: Sequence[int],
  names: Sequence[str],
  images: Sequence[Image.Image | None],
  *,
  title: str,
) -> str:
  """Returns the HTML of a scatter plot; hovering over a point shows what it is.

  At most one per page, since its tooltip has a fixed id.

  Args:
    positions: float [num_points, 2].
    groups: the group of each point, [num_points], which determines its color.
    names: the name of each point, [num_points].
    images: the image of each point, [num_points]; None shows only its name.
    title: description for screen readers.
  """
  num_points, side = len(positions), 48
  columns = int(np.ceil(np.sqrt(num_points)))
  sheet = Image.new('RGB', (columns * side, -(-num_points // columns) * side))
  low, high = positions.min(axis=0), positions.max(axis=0)
  positions = 10 + 620 * (positions - low) / np.maximum(high - low, 1e-9)
  circles = []
  for index, ((x, y), group, name, image) in enumerate(
    zip(positions, groups, names, images)
  ):
    line, column = divmod(index, columns)
    if image:
      sheet.paste(image.resize((side, side)), (column * side, line * side))
    # The golden angle: consecutive groups get very different hues.
    hue = group * 137.508 % 360
    circles.append(
      f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="hsl({hue:.0f} 65% 50%)" '
      f'data-column="{column}" data-row="{line}" '
      f'data-name="{html.escape(name)}"/>'
    )
  thumbnails = f'<i style="background:url({_data_url(sheet)})"></i>'
  return (
    f'<div class="map"><svg viewBox="0 0 640 640" role="img" '
    f'aria-label="{html.escape(title)}">{"".join(circles)}</svg>'
    f'<div id="tip">{thumbnails if any(images) else "<i hidden></i>"}'
    '<span></span></div></div>'
  )


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
  """Returns a complete page; a section is (heading, HTML)."""
  title = html.escape(title)
  body = ''.join(
    f'<section><h2>{html.escape(heading)}</h2>{content}</section>'
    for heading, content in sections
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<link rel="icon" href="data:,"><title>{title}</title>'
    f'<style>{_STYLE}</style></head><body><main><h1>{title}</h1>{body}</main>'
    f'<script>{_SCRIPT}</script></body></html>\n'
  )
