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

MAX_POINTS = 500  # of a curve


class _Palette(NamedTuple):
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
_PAGE = _Palette(tuple(_VARIABLES)[:6], *list(_VARIABLES)[6:])
# The light theme of page.css, for a PNG cannot change.
_CARD = _Palette(
  ('#0b62c4', '#d9650f', '#12876f', '#9a4fb5', '#8a7416', '#c2375b'),
  *('#5c6670', '#e3e6e9', '#b4510a'),
)
_SVG = 'http://www.w3.org/2000/svg'
_LINK = 'http://www.w3.org/1999/xlink'
_INCHES = (4.6, 2.2)
# Fixed axes, [left, bottom, width, height]: a layout engine takes as long as drawing.
_AXES = (0.1, 0.1, 0.885, 0.8)
_AXES_WITH_LABELS = (0.125, 0.2, 0.86, 0.7)
_PANEL_INCHES = (3.2, 2.2)
_PANEL_COLUMNS = 3
_SMOOTH_FROM = 40  # points from which on a curve is drawn with its running mean


def downsample(
  x: ArrayLike, y: ArrayLike, max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
  """Returns at most `max_points` points, in order, that keep every spike.

  The points are divided into max_points / 2 stretches, of each of which the lowest and the highest
  are kept. Points that are not finite are left out.
  """
  x, y = np.asarray(x, float), np.asarray(y, float)
  finite = np.isfinite(y)
  x, y = x[finite], y[finite]
  if len(x) <= max_points:
    return x, y
  edges = np.linspace(0, len(x), max(max_points // 2, 1) + 1).astype(int)
  indices = set()
  for low, high in itertools.pairwise(edges):
    indices |= {low + int(np.argmin(y[low:high])), low + int(np.argmax(y[low:high]))}
  selected = sorted(indices)
  return x[selected], y[selected]


def running_mean(y: np.ndarray, width: int) -> np.ndarray:
  """Returns the mean over `width` points around each point; over fewer at both ends."""
  total = np.concatenate([[0.0], np.cumsum(y)])
  index = np.arange(len(y))
  low, high = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(y))
  return (total[high] - total[low]) / (high - low)


def curve(x: ArrayLike, series: Mapping[str, ArrayLike], label: str) -> str:
  """Returns an SVG of lines over steps; `label` describes it to a screen reader."""
  return _svg(label, lambda axes: _draw_curves(axes, x, series, _PAGE))


def stacked(x: ArrayLike, series: Mapping[str, ArrayLike], label: str) -> str:
  """Returns an SVG of stacked areas over steps, averaged over stretches to MAX_POINTS points."""
  parts = np.array_split(np.arange(len(x)), min(len(x), MAX_POINTS))
  centers = [float(np.mean(np.asarray(x, float)[part])) for part in parts]
  values = [np.nan_to_num(np.asarray(y, float)) for y in series.values()]
  rows = [[float(np.mean(y[part])) for part in parts] for y in values]

  def draw(axes: Any) -> None:
    colours = list(itertools.islice(itertools.cycle(_PAGE.series), len(rows)))
    axes.stackplot(centers, *rows, colors=colours, labels=list(series), alpha=0.85, linewidth=0)
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    _integer_steps(axes)
    _legend(axes, len(series), _PAGE)

  return _svg(label, draw)


def histogram(
  values: ArrayLike, label: str, unit: str, *, mark: float | None = None, integers: bool = False
) -> str:
  """Returns an SVG of the share of values in each bin, in percent.

  Args:
    unit: name of the x axis.
    mark: a value to mark by a vertical line, labelled as the threshold.
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
    axes.stairs(share, edges, fill=True, color=_PAGE.series[0], alpha=0.85)
    if mark is not None:
      dashes = (0, (4, 3))
      axes.axvline(mark, color=_PAGE.warn, linewidth=1.4, linestyle=dashes, label='threshold')
      _legend(axes, 2, _PAGE)
    axes.set_position(_AXES_WITH_LABELS)
    axes.set_xlabel(unit)
    axes.set_ylabel('%')
    axes.set_ylim(bottom=0)

  return _svg(label, draw)


def fit(bins: Mapping[str, ArrayLike], key: str, w: float | int, b: float | int, label: str) -> str:
  """Returns an SVG of a statistic of the scores by relative position p, and its fit w ln p + b.

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
    first, second = _PAGE.series[:2]
    axes.scatter(
      position, observed, s=size, color=first, alpha=0.55, linewidth=0, label='bins of p'
    )
    axes.plot(line, w * np.log(line) + b, color=second, linewidth=1.6, label='fit')
    axes.set_position(_AXES_WITH_LABELS)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel('p, relative position')
    _legend(axes, 2, _PAGE)

  return _svg(label, draw)


def render_png(x: ArrayLike, series: Mapping[str, ArrayLike]) -> bytes:
  """Returns a PNG with a panel for each series over steps; the same values give the same bytes."""
  with _matplotlib():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_PANEL_COLUMNS, len(series))
    rows = math.ceil(len(series) / columns)
    inches = (columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1])
    figure = Figure(inches, dpi=100, layout='constrained')
    for number, (name, y) in enumerate(series.items(), 1):
      axes = figure.add_subplot(rows, columns, number)
      _style(axes, _CARD)
      _draw_curves(axes, x, {name: y}, _CARD)
      axes.set_title(name, fontsize=9, parse_math=False)
      axes.set_xlabel('step', fontsize=8)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={'Software': None})
  return out.getvalue()


def _draw_curves(
  axes: Any, x: ArrayLike, series: Mapping[str, ArrayLike], palette: _Palette
) -> None:
  """Draws lines; a long one faintly, with its running mean over a 25th of its points on top."""
  for colour, (name, y) in zip(itertools.cycle(palette.series), series.items(), strict=False):
    y = np.asarray(y, float)
    steps, values = downsample(x, y)
    if len(steps) <= _SMOOTH_FROM:
      axes.plot(steps, values, color=colour, label=name, marker='o', markersize=2.2)
      continue
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    finite = np.isfinite(y)
    mean = running_mean(y[finite], max(3, int(finite.sum()) // 25))
    axes.plot(*downsample(np.asarray(x, float)[finite], mean), color=colour, label=name)
  axes.margins(x=0.02, y=0.12)
  _integer_steps(axes)
  _legend(axes, len(series), palette)


def _svg(label: str, draw: Callable[[Any], None]) -> str:
  """Returns the SVG of what `draw` puts on the axes it is called with."""
  with _matplotlib(**{'svg.fonttype': 'none', 'svg.hashsalt': label}):
    from matplotlib.figure import Figure

    figure = Figure(_INCHES)
    axes = figure.add_axes(_AXES)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    _style(axes, _PAGE)
    draw(axes)
    raw = io.BytesIO()
    figure.savefig(raw, format='svg', metadata={'Date': None})
  return _inline(raw.getvalue(), label)


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


def _style(axes: Any, palette: _Palette) -> None:
  from matplotlib.ticker import MaxNLocator

  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(palette.grid)
  axes.tick_params(colors=palette.muted, length=0, labelsize=8)
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


def _legend(axes: Any, count: int, palette: _Palette) -> None:
  if count > 1:
    axes.legend(
      loc='lower left',
      bbox_to_anchor=(-0.02, 1.0),
      ncols=count,
      frameon=False,
      fontsize=8,
      labelcolor=palette.muted,
      handlelength=1.2,
      columnspacing=1.2,
      borderaxespad=0,
    )


def _integer_steps(axes: Any) -> None:
  from matplotlib.ticker import MaxNLocator

  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _tick(value: float | int, _: int) -> str:
  """Returns a short label, such as 1.2k, 0.05 or 3e-07."""
  if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
    return f'{value:.2g}'
  return f'{value / 1000:g}k' if abs(value) >= 1e4 else f'{value:.6g}'
