"""Draws curves and histograms with matplotlib: inline SVG for report.html, PNG for model cards.

In an SVG the colours are the page's CSS variables, so that it follows the page's light and dark
theme. What is drawn is decided in `charts`.
"""

import contextlib
import io
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike

from segjax.report.thinning import MAX_POINTS, downsample, rounded, running_mean


class Palette(NamedTuple):
  """The colours of one kind of output; `series` are those of curves, in order."""

  series: tuple[str, ...]
  muted: str
  grid: str
  warn: str


# matplotlib accepts no CSS variables: an SVG is drawn in placeholder colours, replaced afterwards.
_VARIABLES = {f'#0000{i:02x}': f'var(--series-{i})' for i in range(1, 7)} | {
  '#000011': 'var(--muted)',
  '#000012': 'var(--grid)',
  '#000013': 'var(--warn)',
}
_PLACEHOLDER = re.compile('|'.join(_VARIABLES))
PAGE = Palette(tuple(_VARIABLES)[:6], *list(_VARIABLES)[6:])
# The light theme of page.css, for a PNG cannot change.
CARD = Palette(
  ('#0b62c4', '#d9650f', '#12876f', '#9a4fb5', '#8a7416', '#c2375b'),
  *('#5c6670', '#e3e6e9', '#b4510a'),
)
_SVG = 'http://www.w3.org/2000/svg'
_LINK = 'http://www.w3.org/1999/xlink'
_PANEL_INCHES = (3.2, 2.2)
_PANEL_COLUMNS = 3
_SMOOTH_FROM = 40  # points from which on a curve is drawn with its running mean


class Layout(NamedTuple):
  """Inches of a drawing, and its axes as shares of them: left, bottom, width, height."""

  inches: tuple[float, float]
  axes: tuple[float, float, float, float]


# Fixed axes: a layout engine takes as long as drawing.
_CHART = Layout((4.1, 2.05), (0.13, 0.215, 0.855, 0.745))


class Drawing(NamedTuple):
  """An SVG, and what the page shows of it under the pointer.

  Attributes:
    svg: the element.
    points: JSON: `box`, left and right end of the axes as shares of the width; `range`, the values
      of x there; `x`, the name of x; `series`, a list of (name, unit, values of x, values of y).
  """

  svg: str
  points: dict[str, Any]


Series = tuple[str, str, ArrayLike, ArrayLike]  # name, unit, x, y: what is under the pointer


def curve(x: ArrayLike, series: Mapping[str, ArrayLike], label: str) -> Drawing:
  """Draws lines over steps; `label` describes them to a screen reader."""
  points = [(name, '', *downsample(x, y)) for name, y in series.items()]
  return draw_svg(label, 'step', points, lambda axes: _draw_curves(axes, x, series, PAGE))


def stacked(x: ArrayLike, series: Mapping[str, ArrayLike], label: str) -> Drawing:
  """Draws stacked areas over steps, averaged over stretches to MAX_POINTS points."""
  parts = np.array_split(np.arange(len(x)), min(len(x), MAX_POINTS))
  centers = [float(np.mean(np.asarray(x, float)[part])) for part in parts]
  values = {name: np.nan_to_num(np.asarray(y, float)) for name, y in series.items()}
  means = {name: [float(np.mean(y[part])) for part in parts] for name, y in values.items()}

  def draw(axes: Any) -> None:
    colours = list(itertools.islice(itertools.cycle(PAGE.series), len(means)))
    axes.stackplot(centers, *means.values(), colors=colours, alpha=0.85, linewidth=0)
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    _integer_steps(axes)

  return draw_svg(label, 'step', [(name, 's', centers, y) for name, y in means.items()], draw)


def histogram(
  values: ArrayLike, label: str, unit: str, *, mark: float | None = None, integers: bool = False
) -> Drawing:
  """Draws the share of values in each bin, in percent.

  Args:
    unit: name of the x axis.
    mark: a value to mark by a vertical line.
    integers: one bin for each integer instead of 40 bins of equal width.
  """
  values = np.asarray(values, float).reshape(-1)
  high = float(values.max()) if len(values) else 1.0
  bins = np.linspace(0.0, max(high, 1e-6), 41)
  if integers:
    step = max(1, math.ceil((high + 1) / 60))
    bins = np.arange(0.5, high + step + 0.5, step)
  count, edges = np.histogram(values, bins)
  share = 100 * count / max(len(values), 1)

  def draw(axes: Any) -> None:
    axes.stairs(share, edges, fill=True, color=PAGE.series[0], alpha=0.85)
    if mark is not None:
      axes.axvline(mark, color=PAGE.series[1], linewidth=1.4, linestyle=(0, (4, 3)))
    axes.set_ylabel('%')
    axes.set_ylim(bottom=0)

  centers = (edges[:-1] + edges[1:]) / 2
  return draw_svg(label, unit, [('share', '%', centers, share)], draw)


def fit(
  bins: Mapping[str, ArrayLike], key: str, w: float | int, b: float | int, label: str
) -> Drawing:
  """Draws a statistic of the scores by relative position p, and its fit w ln p + b.

  Args:
    bins: the position `p` of each bin, its number of scores `count`, and the statistic `key`.
  """
  position, count, observed = (np.asarray(bins[name], float) for name in ('p', 'count', key))
  if len(position) > MAX_POINTS:  # the fullest bins have decided the fit
    fullest = np.sort(np.argsort(-count)[:MAX_POINTS])
    position, count, observed = position[fullest], count[fullest], observed[fullest]
  size = 3 + 30 * count / max(count.max(initial=1), 1)
  line = np.linspace(0.005, 1, 200)

  def draw(axes: Any) -> None:
    first, second = PAGE.series[:2]
    axes.scatter(position, observed, s=size, color=first, alpha=0.55, linewidth=0)
    axes.plot(line, w * np.log(line) + b, color=second, linewidth=1.6)
    axes.set_xlim(0, 1.02)

  fitted = w * np.log(np.maximum(position, 1e-9)) + b
  points = [('bin', '', position, observed), ('fit', '', position, fitted)]
  points.append(('scores in the bin', '', position, count))
  return draw_svg(label, 'p, relative position', points, draw)


def render_png(x: ArrayLike, series: Mapping[str, ArrayLike]) -> bytes:
  """Returns a PNG with a panel for each series over steps; the same values give the same bytes."""
  with _matplotlib():
    from matplotlib.figure import Figure

    columns = min(_PANEL_COLUMNS, len(series))
    rows = math.ceil(len(series) / columns)
    inches = (columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1])
    figure = Figure(inches, dpi=100, layout='constrained')
    for number, (name, y) in enumerate(series.items(), 1):
      axes = figure.add_subplot(rows, columns, number)
      _style(axes, CARD)
      _draw_curves(axes, x, {name: y}, CARD)
      axes.set_title(name, fontsize=9, parse_math=False)
      axes.set_xlabel('step', fontsize=8)
    return _png(figure)


def draw_png(x: str, draw: Callable[[Any], None], layout: Layout) -> bytes:
  """Returns a PNG of what `draw` puts on the axes it is called with."""
  with _matplotlib():
    from matplotlib.figure import Figure

    figure = Figure(layout.inches, dpi=130)
    axes = figure.add_axes(layout.axes)
    _style(axes, CARD)
    draw(axes)
    axes.set_xlabel(x, labelpad=2)
    return _png(figure)


def _png(figure: Any) -> bytes:
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  out = io.BytesIO()
  FigureCanvasAgg(figure).print_png(out, metadata={'Software': None})
  return out.getvalue()


def _draw_curves(
  axes: Any, x: ArrayLike, series: Mapping[str, ArrayLike], palette: Palette
) -> None:
  """Draws lines; a long one faintly, with its running mean over a 25th of its points on top."""
  for colour, y in zip(itertools.cycle(palette.series), series.values(), strict=False):
    y = np.asarray(y, float)
    steps, values = downsample(x, y)
    if len(steps) <= _SMOOTH_FROM:
      axes.plot(steps, values, color=colour, marker='o', markersize=2.2)
      continue
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    finite = np.isfinite(y)
    mean = running_mean(y[finite], max(3, int(finite.sum()) // 25))
    axes.plot(*downsample(np.asarray(x, float)[finite], mean), color=colour)
  axes.margins(x=0.02, y=0.12)
  _integer_steps(axes)


def draw_svg(
  label: str, x: str, points: list[Series], draw: Callable[[Any], None], layout: Layout = _CHART
) -> Drawing:
  """Returns what `draw` puts on the axes it is called with, with the points under the pointer."""
  with _matplotlib(**{'svg.fonttype': 'none', 'svg.hashsalt': label}):
    from matplotlib.figure import Figure

    figure = Figure(layout.inches)
    axes = figure.add_axes(layout.axes)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    _style(axes, PAGE)
    draw(axes)
    axes.set_xlabel(x, labelpad=2)
    raw = io.BytesIO()
    figure.savefig(raw, format='svg', metadata={'Date': None})
    shown = {
      'box': [layout.axes[0], layout.axes[0] + layout.axes[2]],
      'range': [float(end) for end in axes.get_xlim()],
      'x': x,
      'series': [(name, unit, rounded(xs, 9), rounded(ys, 5)) for name, unit, xs, ys in points],
    }
  return Drawing(_inline(raw.getvalue(), label), shown)


@contextlib.contextmanager
def _matplotlib(**style: Any) -> Iterator[None]:
  """Sets matplotlib's style, and silences its messages about building a cache of fonts."""
  import matplotlib

  logger = logging.getLogger('matplotlib')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with matplotlib.rc_context({'font.size': 9, 'lines.linewidth': 1.6} | style):
      yield
  finally:
    logger.setLevel(level)


def _style(axes: Any, palette: Palette) -> None:
  from matplotlib.ticker import MaxNLocator

  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(palette.grid)
  axes.tick_params(colors=palette.muted, length=0, labelsize=9)
  axes.xaxis.label.set_color(palette.muted)
  axes.yaxis.label.set_color(palette.muted)
  axes.grid(axis='y', color=palette.grid, linewidth=0.7)
  axes.set_axisbelow(True)
  axes.yaxis.set_major_locator(MaxNLocator(4))
  axes.yaxis.set_major_formatter(_tick)


def _inline(svg: bytes, label: str) -> str:
  """Returns the SVG as an element of the page: its colours, font and width are the page's."""
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
      style = _PLACEHOLDER.sub(lambda match: _VARIABLES[match[0]], node.attrib['style'])
      node.attrib['style'] = re.sub("'DejaVu Sans'[^;]*", 'system-ui, sans-serif', style)
  return ElementTree.tostring(root, encoding='unicode')


def _integer_steps(axes: Any) -> None:
  from matplotlib.ticker import MaxNLocator

  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def _tick(value: float | int, _: int) -> str:
  """Returns a short label, such as 1.2k, 0.05 or 3e-07."""
  if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
    return f'{value:.2g}'
  return f'{value / 1000:g}k' if abs(value) >= 1e4 else f'{value:.6g}'
