"""Curves and histograms as inline SVG whose colours are the page's, in light and in dark.

matplotlib draws with colours that stand for CSS variables. What is drawn is `curves`' affair.
"""

import contextlib
import io
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike

POINTS = 500  # of a curve, at most

# Colours that are drawn with, and the CSS variables that take their place.
_COLOURS = {f'#0000{i:02x}': f'var(--series-{i})' for i in range(1, 7)} | {
  '#000010': 'var(--ink)',
  '#000011': 'var(--muted)',
  '#000012': 'var(--grid)',
  '#000013': 'var(--warn)',
}
SERIES = list(_COLOURS)[:6]
_INK, _MUTED, _GRID, _WARN = list(_COLOURS)[6:]
_COLOUR = re.compile('|'.join(_COLOURS))
_SVG = 'http://www.w3.org/2000/svg'
_LINK = 'http://www.w3.org/1999/xlink'
_INCHES = (4.6, 2.2)
_PLACE = (0.1, 0.1, 0.885, 0.8)  # of the axes: left, bottom, width, height
_NAMED = (0.125, 0.2, 0.86, 0.7)  # where they have names
_SMOOTH = 40  # points from which on a curve is drawn with its running mean


def thinned(x: ArrayLike, y: ArrayLike, most: int = POINTS) -> tuple[Any, Any]:
  """At most `most` points, in order: of each of most / 2 stretches the lowest and the highest.

  So no spike is lost. Points that are not finite are left out.
  """
  x, y = np.asarray(x, float), np.asarray(y, float)
  finite = np.isfinite(y)
  x, y = x[finite], y[finite]
  if len(x) <= most:
    return x, y
  edges = np.linspace(0, len(x), max(most // 2, 1) + 1).astype(int)
  kept = set()
  for low, high in itertools.pairwise(edges):
    kept |= {low + int(np.argmin(y[low:high])), low + int(np.argmax(y[low:high]))}
  kept = sorted(kept)
  return x[kept], y[kept]


def averaged(y: np.ndarray, width: int) -> np.ndarray:
  """The running mean over `width` points around each; fewer at both ends."""
  total = np.concatenate([[0.0], np.cumsum(y)])
  at = np.arange(len(y))
  low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(y))
  return (total[high] - total[low]) / (high - low)


def curve(x: ArrayLike, series: dict[str, ArrayLike], label: str) -> str:
  """Lines over steps; a long one is drawn faintly, with its running mean over a 25th on top."""
  with _axes(label) as (axes, out):
    for colour, (name, y) in zip(_cycle(), series.items(), strict=False):
      at, values = thinned(x, y)
      if len(at) > _SMOOTH:
        axes.plot(at, values, color=colour, linewidth=0.8, alpha=0.35)
        finite = np.isfinite(np.asarray(y, float))
        mean = averaged(np.asarray(y, float)[finite], max(3, int(finite.sum()) // 25))
        axes.plot(*thinned(np.asarray(x, float)[finite], mean), color=colour, label=name)
      else:
        axes.plot(at, values, color=colour, label=name, marker='o', markersize=2.2)
    axes.margins(x=0.02, y=0.12)
    _whole_steps(axes)
    _legend(axes, len(series))
  return out.getvalue()


def stacked(x: ArrayLike, series: dict[str, ArrayLike], label: str) -> str:
  """Areas upon each other, each the mean over its stretch of at most POINTS."""
  with _axes(label) as (axes, out):
    parts = np.array_split(np.arange(len(x)), min(len(x), POINTS))
    at = [float(np.mean(np.asarray(x, float)[part])) for part in parts]
    known = [np.nan_to_num(np.asarray(y, float)) for y in series.values()]
    rows = [[float(np.mean(y[part])) for part in parts] for y in known]
    colours = [colour for colour, _ in zip(_cycle(), rows, strict=False)]
    axes.stackplot(at, *rows, colors=colours, labels=list(series), alpha=0.85, linewidth=0)
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    _whole_steps(axes)
    _legend(axes, len(series))
  return out.getvalue()


def histogram(
  values: ArrayLike, label: str, unit: str, *, mark: float | None = None, whole: bool = False
) -> str:
  """Shares of the values by bin of equal width, or of each whole number; `mark` is a line."""
  values = np.asarray(values, float).reshape(-1)
  low, high = (0.0, float(values.max())) if len(values) else (0.0, 1.0)
  bins = np.linspace(low, max(high, 1e-6), 41)
  if whole:
    step = max(1, math.ceil((high + 1) / 60))
    bins = np.arange(0.5, high + step + 0.5, step)
  count, edges = np.histogram(values, bins)
  with _axes(label) as (axes, out):
    axes.stairs(100 * count / max(len(values), 1), edges, fill=True, color=SERIES[0], alpha=0.85)
    if mark is not None:
      axes.axvline(mark, color=_WARN, linewidth=1.4, linestyle=(0, (4, 3)), label='threshold')
      _legend(axes, 2)
    axes.set_position(_NAMED)
    axes.set_xlabel(unit)
    axes.set_ylabel('%')
    axes.set_ylim(bottom=0)
  return out.getvalue()


def fit(
  position: ArrayLike,
  count: ArrayLike,
  observed: ArrayLike,
  w: float | int,
  b: float | int,
  label: str,
) -> str:
  """What the scores are in each bin of p, dots by their number, and w ln p + b through them."""
  with _axes(label) as (axes, out):
    at, count, observed = (np.asarray(x, float) for x in (position, count, observed))
    if len(at) > POINTS:  # the best filled ones say most
      best = np.sort(np.argsort(-count)[:POINTS])
      at, count, observed = at[best], count[best], observed[best]
    size = 3 + 30 * count / max(count.max(initial=1), 1)
    axes.scatter(at, observed, s=size, color=SERIES[0], alpha=0.55, linewidth=0, label='bins of p')
    line = np.linspace(0.005, 1, 200)
    axes.plot(line, w * np.log(line) + b, color=SERIES[1], linewidth=1.6, label='fit')
    axes.set_position(_NAMED)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel('p, relative position')
    _legend(axes, 2)
  return out.getvalue()


@contextlib.contextmanager
def _axes(label: str) -> Iterator[tuple[Any, io.StringIO]]:
  """(axes to draw on, a text that is the SVG afterwards)."""
  import matplotlib
  from matplotlib.figure import Figure

  out = io.StringIO()
  style = {'svg.fonttype': 'none', 'svg.hashsalt': label, 'font.size': 9, 'lines.linewidth': 1.6}
  with matplotlib.rc_context(style):
    figure = Figure(_INCHES)  # fixed margins: finding them by layout takes as long as drawing
    axes = figure.add_axes(_PLACE)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.spines['bottom'].set_color(_GRID)
    axes.tick_params(colors=_MUTED, length=0, labelsize=8)
    axes.xaxis.label.set_color(_MUTED)
    axes.yaxis.label.set_color(_MUTED)
    axes.grid(axis='y', color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(_tick)
    yield axes, out
    raw = io.BytesIO()
    figure.savefig(raw, format='svg', metadata={'Date': None})
    out.write(_inlined(raw.getvalue(), label))


def _inlined(svg: bytes, label: str) -> str:
  """The SVG as it can stand in a page: the page's colours and font, named, as wide as there is."""
  ElementTree.register_namespace('', _SVG)
  ElementTree.register_namespace('xlink', _LINK)
  root = ElementTree.fromstring(svg)
  for child in list(root):
    if child.tag == f'{{{_SVG}}}metadata':
      root.remove(child)
  for name in ('width', 'height', 'version'):
    root.attrib.pop(name, None)
  root.attrib |= {'class': 'chart', 'role': 'img', 'aria-label': label}
  for node in root.iter():
    if 'style' in node.attrib:
      style = _COLOUR.sub(lambda match: _COLOURS[match[0]], node.attrib['style'])
      node.attrib['style'] = re.sub("'DejaVu Sans'[^;]*", 'system-ui, sans-serif', style)
  return ElementTree.tostring(root, encoding='unicode')


def _cycle() -> Iterator[str]:
  while True:
    yield from SERIES


def _legend(axes: Any, count: int) -> None:
  if count > 1:
    axes.legend(
      loc='lower left',
      bbox_to_anchor=(-0.02, 1.0),
      ncols=count,
      frameon=False,
      fontsize=8,
      labelcolor=_MUTED,
      handlelength=1.2,
      columnspacing=1.2,
      borderaxespad=0,
    )


def _whole_steps(axes: Any) -> None:
  from matplotlib.ticker import MaxNLocator

  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _tick(value: float | int, _: int) -> str:
  """1.2k, 0.05, 3e-07: short, and the same width for the same axis as far as may be."""
  if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
    return f'{value:.2g}'
  return f'{value / 1000:g}k' if abs(value) >= 1e4 else f'{value:.6g}'
