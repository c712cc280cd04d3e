"""Draws a study: gold reward over KL for each arm, and its differences to the baseline.

As SVG for report.html, and as PNG where a page such as a README shows them.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from segjax.report import plots
from segjax.report.plots import Drawing, Layout, Palette, Series

_POINTS = 60  # of a mean curve
_LINES = ('-', (0, (4, 2)), (0, (1, 1.5)))  # as many colours in each
_CURVES = Layout((7.2, 3.2), (0.075, 0.14, 0.68, 0.82))


class Band(NamedTuple):
  """The mean curve of an arm over seeds, and its 95 % interval; NaN where fewer than two reach."""

  kl: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


class Interval(NamedTuple):
  """A difference of an arm to the baseline, with its interval."""

  arm: str
  mean: float
  low: float
  high: float


def band(curves: Sequence[Sequence[Sequence[float | int]]]) -> Band:
  """Returns the mean of curves [(KL, gold), ...] at equal KL, as far as half of them reach.

  mean ± t(0.975, n - 1) s / √n over the n curves that reach a KL
  """
  ends = sorted(curve[-1][0] for curve in curves)
  kl = np.linspace(0, ends[(len(ends) - 1) // 2], _POINTS)
  values = np.full((len(curves), _POINTS), np.nan)
  for row, curve in zip(values, curves, strict=True):
    x, y = np.array(curve, float).T
    row[:] = np.where(kl <= x[-1], np.interp(kl, x, y), np.nan)
  count = np.isfinite(values).sum(0)
  mean = np.nansum(values, 0) / count
  square = np.nansum((values - mean) ** 2, 0)
  with np.errstate(divide='ignore', invalid='ignore'):
    half = stdtrit(count - 1, 0.975) * np.sqrt(square / (count - 1) / count)
  return Band(kl, mean, mean - half, mean + half)


def curves_svg(bands: Mapping[str, Band], label: str) -> Drawing:
  """Draws gold over KL of each arm, with bands over seeds."""
  points: list[Series] = [(name, '', b.kl, b.mean) for name, b in bands.items()]
  return plots.draw_svg(label, _KL, points, _draw_curves(bands, plots.PAGE), _CURVES)


def curves_png(bands: Mapping[str, Band]) -> bytes:
  """Draws the same as a PNG."""
  return plots.draw_png(_KL, _draw_curves(bands, plots.CARD), _CURVES)


_KL = 'KL to the SFT model, nats per response'


def _draw_curves(bands: Mapping[str, Band], palette: Palette) -> Callable[[Any], None]:
  styles = itertools.cycle(itertools.product(_LINES, palette.series))

  def draw(axes: Any) -> None:
    for (name, b), (line, colour) in zip(bands.items(), styles, strict=False):
      axes.plot(b.kl, b.mean, color=colour, linestyle=line, label=name)
      axes.fill_between(b.kl, b.low, b.high, color=colour, alpha=0.13, linewidth=0)
    axes.margins(x=0.01)
    axes.set_ylabel('gold reward')
    _legend(axes, palette)

  return draw


def _legend(axes: Any, palette: Palette) -> None:
  legend = axes.legend(
    loc='center left', bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, handlelength=1.6
  )
  for text in legend.get_texts():
    text.set_color(palette.muted)


def forest_svg(rows: Sequence[Interval], label: str, x: str) -> Drawing:
  """Draws the difference of each arm to the baseline with its interval, one below the other."""
  index = np.arange(len(rows), dtype=float)
  points: list[Series] = [
    (row.arm, '', [row.mean], [i]) for i, row in zip(index, rows, strict=True)
  ]
  return plots.draw_svg(label, x, points, _draw_forest(rows, plots.PAGE), _forest_layout(rows))


def forest_png(rows: Sequence[Interval], x: str) -> bytes:
  """Draws the same as a PNG."""
  return plots.draw_png(x, _draw_forest(rows, plots.CARD), _forest_layout(rows))


def _forest_layout(rows: Sequence[Interval]) -> Layout:
  height = 0.62 + 0.27 * len(rows)
  return Layout((7.2, height), (0.19, 0.5 / height, 0.64, 1 - 0.6 / height))


def _draw_forest(rows: Sequence[Interval], palette: Palette) -> Callable[[Any], None]:
  def draw(axes: Any) -> None:
    y = np.arange(len(rows))
    mean, low, high = (np.array([getattr(r, k) for r in rows]) for k in ('mean', 'low', 'high'))
    axes.axvline(0, color=palette.muted, linewidth=0.8)
    errors = np.stack([mean - low, high - mean])
    axes.errorbar(mean, y, xerr=errors, fmt='o', color=palette.series[0], markersize=4)
    axes.yaxis.set_major_locator(_fixed(y))
    axes.set_yticks(y, [row.arm for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)

  return draw


def _fixed(positions: np.ndarray) -> Any:
  from matplotlib.ticker import FixedLocator

  return FixedLocator(positions)


class CreditPoint(NamedTuple):
  """Credit of an arm's rewards and gold of its policies, each as mean, low, high."""

  arm: str
  credit: tuple[float, float, float]
  gold: tuple[float, float, float]


def credit_svg(points: Sequence[CreditPoint], label: str, y: str) -> Drawing:
  """Draws gold of each arm over the credit of its rewards."""
  series: list[Series] = [(p.arm, '', [p.credit[0]], [p.gold[0]]) for p in points]
  return plots.draw_svg(label, _CREDIT, series, _draw_credit(points, y, plots.PAGE), _CURVES)


def credit_png(points: Sequence[CreditPoint], y: str) -> bytes:
  """Draws the same as a PNG."""
  return plots.draw_png(_CREDIT, _draw_credit(points, y, plots.CARD), _CURVES)


_CREDIT = 'rank correlation of the rewards of clauses with their true credit'


def _draw_credit(points: Sequence[CreditPoint], y: str, palette: Palette) -> Callable[[Any], None]:
  def draw(axes: Any) -> None:
    styles = itertools.cycle(itertools.product('os^', palette.series))
    for point, (marker, colour) in zip(points, styles, strict=False):
      errors = [[[m - low], [high - m]] for m, low, high in (point.credit, point.gold)]
      axes.errorbar(
        [point.credit[0]],
        [point.gold[0]],
        xerr=errors[0],
        yerr=errors[1],
        fmt=marker,
        color=colour,
        markersize=5,
        elinewidth=0.8,
        label=point.arm,
      )
    axes.set_ylabel(y)
    _legend(axes, palette)

  return draw
