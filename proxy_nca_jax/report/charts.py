"""Charts as inline SVG, which inherits the colors of the page around it."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

_WIDTH, _HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40  # Margins.
_MAX_MARKERS = 60
# The palette of Okabe and Ito, distinguishable with color vision deficiencies.
COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')


def lines(
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  title: str,
  x_label: str,
  y_label: str,
) -> str:
  """Draws a line chart; hovering over a point shows its values.

  Args:
    series: {name: (x, y)}, not empty; points that are not finite are ignored.
    title: description for screen readers.
    x_label: label of the horizontal axis.
    y_label: label of the vertical axis.

  Returns:
    HTML.
  """
  series = {
    name: np.array([point for point in zip(*pair) if np.isfinite(point).all()])
    .reshape(-1, 2)
    .T
    for name, pair in series.items()
  }
  series = {name: pair for name, pair in series.items() if pair.size}
  if not series:
    return ''
  xs, ys = (np.concatenate([s[i] for s in series.values()]) for i in (0, 1))
  x_position, x_ticks = _scale(xs.min(), xs.max(), _LEFT, _WIDTH - _RIGHT)
  y_position, y_ticks = _scale(ys.min(), ys.max(), _HEIGHT - _BOTTOM, _TOP)
  parts = [_axes(x_position, x_ticks, y_position, y_ticks, x_label, y_label)]
  for number, (name, (x, y)) in enumerate(series.items()):
    color = COLORS[number % len(COLORS)]
    points = [(x_position(a), y_position(b)) for a, b in zip(x, y)]
    path = ' '.join(f'{a:.1f},{b:.1f}' for a, b in points)
    parts.append(
      f'<polyline points="{path}" fill="none" stroke="{color}" '
      'stroke-width="2"/>'
    )
    # More markers would overlap.
    step = max(len(points) // _MAX_MARKERS, 1)
    parts += [
      f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"><title>'
      f'{html.escape(name)}: {_format(y[i])} at {_format(x[i])}</title>'
      '</circle>'
      for i, (a, b) in list(enumerate(points))[::step]
    ]
  return _figure(parts, title, list(series))


def histograms(
  series: Mapping[str, Sequence[float]],
  *,
  title: str,
  x_label: str,
  num_bins: int = 40,
) -> str:
  """Draws a histogram of each series, as fractions of that series.

  Args:
    series: {name: values}, not empty.
    title: description for screen readers.
    x_label: label of the horizontal axis.
    num_bins: number of bins, shared by all series.

  Returns:
    HTML.
  """
  values = np.concatenate(list(series.values()))
  edges = np.linspace(values.min(), values.max() + 1e-9, num_bins + 1)
  fractions = {
    name: np.histogram(v, edges)[0] / max(len(v), 1)
    for name, v in series.items()
  }
  x_position, x_ticks = _scale(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT)
  top = max(s.max() for s in fractions.values())
  y_position, y_ticks = _scale(0, top, _HEIGHT - _BOTTOM, _TOP)
  parts = [_axes(x_position, x_ticks, y_position, y_ticks, x_label, 'fraction')]
  for number, (name, each) in enumerate(fractions.items()):
    color = COLORS[number % len(COLORS)]
    parts += [
      f'<rect x="{x_position(a):.1f}" y="{y_position(s):.1f}" '
      f'width="{x_position(b) - x_position(a):.1f}" '
      f'height="{y_position(0) - y_position(s):.1f}" fill="{color}" '
      'opacity="0.6">'
      f'<title>{html.escape(name)}, {a:.2f} to {b:.2f}: {100 * s:.1f}%</title>'
      '</rect>'
      for a, b, s in zip(edges, edges[1:], each)
      if s
    ]
  return _figure(parts, title, list(series))


def _scale(low, high, start, end):
  """Returns (function from values to positions, round values for ticks)."""
  low, high = float(low), float(high)
  if high <= low:
    low, high = low - 0.5, high + 0.5
  step = 10 ** math.floor(math.log10((high - low) / 4))
  step *= next(x for x in (1, 2, 5, 10) if (high - low) / (x * step) <= 6)
  ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
  return lambda x: start + (x - low) / (high - low) * (end - start), ticks


def _axes(x_position, x_ticks, y_position, y_ticks, x_label, y_label) -> str:
  bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
  marks = [
    f'<line x1="{_LEFT}" x2="{right}" y1="{y_position(y):.1f}" '
    f'y2="{y_position(y):.1f}" class="grid"/><text x="{_LEFT - 6}" '
    f'y="{y_position(y) + 4:.1f}" text-anchor="end">{_format(y)}</text>'
    for y in y_ticks
  ] + [
    f'<text x="{x_position(x):.1f}" y="{bottom + 16}" text-anchor="middle">'
    f'{_format(x)}</text>'
    for x in x_ticks
  ]
  middle = (_LEFT + right) / 2
  return ''.join(marks) + (
    f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" '
    'class="axis"/>'
    f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">'
    f'{html.escape(x_label)}</text>'
    f'<text transform="translate(12 {(_TOP + bottom) / 2}) rotate(-90)" '
    f'text-anchor="middle">{html.escape(y_label)}</text>'
  )


def _figure(parts, title, names) -> str:
  title = html.escape(title)
  legend = ''.join(
    f'<span><i style="background:{COLORS[number % len(COLORS)]}"></i>'
    f'{html.escape(name)}</span>'
    for number, name in enumerate(names)
  )
  return (
    f'<div class="chart"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
    f'aria-label="{title}">{"".join(parts)}</svg>'
    f'<div class="legend">{legend}</div></div>'
  )


def _format(value: float) -> str:
  return f'{value:,.4g}'
