"""Curves of a stage's metrics as a small PNG, for the card of the model that it made."""

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from segjax.report import charts, plots

_PANEL = 3.2, 2.2  # inches
_COLUMNS = 3


def png(path: Path, names: Sequence[str]) -> bytes:
  """One panel for each of the metrics `names` that `path`, a metrics.jsonl, has; b'' if none.

  Curves are thinned as those of the page are; values that are not finite are left out. The same
  lines give the same bytes.
  """
  steps, series = charts.read(path)
  found = {name: plots.thinned(steps, series[name]) for name in names if name in series}
  if not found:
    return b''
  with _quiet():
    return _drawn(found)


def _drawn(found: dict[str, tuple]) -> bytes:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = min(_COLUMNS, len(found))
  rows = math.ceil(len(found) / columns)
  figure = Figure((columns * _PANEL[0], rows * _PANEL[1]), dpi=100, layout='constrained')
  for number, (name, (steps, values)) in enumerate(found.items(), 1):
    axes = figure.add_subplot(rows, columns, number)
    axes.plot(steps, values, 'o' if len(steps) == 1 else '')
    axes.set_title(name, fontsize=9, parse_math=False)
    axes.set_xlabel('step', fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
  out = io.BytesIO()
  FigureCanvasAgg(figure).print_png(out, metadata={'Software': None})
  return out.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps matplotlib from telling on the console that it looks for fonts."""
  logger = logging.getLogger('matplotlib')
  before = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(before)
