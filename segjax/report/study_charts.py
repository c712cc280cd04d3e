"""Charts of a study from its results.jsonl and summary.json: for report.html, and as PNG files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from segjax import json_files
from segjax.report import study_plots
from segjax.report.plots import Drawing
from segjax.report.study_plots import Band, CreditPoint, Interval
from segjax.storage import atomic_file, read_json_lines

RESULTS_FILE = 'results.jsonl'
SUMMARY_FILE = 'summary.json'


def study_charts(directory: Path) -> Iterator[tuple[str, str, Drawing]]:
  """Yields (title, note, drawing) of a study; none of a directory that holds no study."""
  for language, bands in read_bands(directory).items():
    title = f'Gold reward over KL, {language}'
    note = 'mean over seeds at equal KL, as far as half of them reach, with 95 % intervals'
    yield title, note, study_plots.curves_svg(bands, title)
  for language, (x, rows) in read_differences(directory).items():
    title = f'Differences, {language}'
    note = 'paired by seed; 95 % intervals by resampling seeds, then prompts'
    yield title, note, study_plots.forest_svg(rows, title, x)
  for language, (y, points) in read_credit(directory).items():
    title = f'Gold reward and credit, {language}'
    note = 'means over seeds with 95 % intervals'
    yield title, note, study_plots.credit_svg(points, title, y)


def write_pngs(directory: Path) -> None:
  """Writes gold_over_kl-LANGUAGE.png, differences-LANGUAGE.png and credit-LANGUAGE.png."""
  for language, bands in read_bands(directory).items():
    _write(directory / f'gold_over_kl-{language}.png', study_plots.curves_png(bands))
  for language, (x, rows) in read_differences(directory).items():
    _write(directory / f'differences-{language}.png', study_plots.forest_png(rows, x))
  for language, (y, points) in read_credit(directory).items():
    _write(directory / f'credit-{language}.png', study_plots.credit_png(points, y))


def read_bands(directory: Path) -> dict[str, dict[str, Band]]:
  """Returns the band of each arm by language, of the cells that have ended."""
  curves: dict[str, dict[str, list]] = {}
  for record in read_json_lines(directory / RESULTS_FILE):
    if 'curve' in record:
      arms = curves.setdefault(record['language'], {})
      arms.setdefault(record['arm'], []).append(record['curve'])
  return {
    language: {arm: study_plots.band(group) for arm, group in arms.items()}
    for language, arms in curves.items()
  }


def read_differences(directory: Path) -> dict[str, tuple[str, list[Interval]]]:
  """Returns (name of the axis, differences to the baseline) by language, at the main level."""
  found = {}
  for language, part in _read_summary(directory).items():
    where, comparisons = next(iter(part['comparisons'].items()))
    rows = [_interval(c) for c in comparisons if c['difference']['low'] is not None]
    if rows:
      baseline = comparisons[0]['baseline']
      found[language] = f'gold reward minus that of {baseline}, at {where} nats', rows
  return found


def read_credit(directory: Path) -> dict[str, tuple[str, list[CreditPoint]]]:
  """Returns (name of the axis, credit and gold of each arm at the end) by language."""
  found = {}
  for language, part in _read_summary(directory).items():
    points = [
      CreditPoint(arm, _ends(x['credit']), _ends(x['gold']['end']))
      for arm, x in part['arms'].items()
      if None not in (x['credit']['low'], x['gold']['end']['low'])
    ]
    if points:
      found[language] = 'gold reward at the end', points
  return found


def _read_summary(directory: Path) -> dict[str, Any]:
  """Returns what `write_summary` wrote; {} before."""
  path = directory / SUMMARY_FILE
  return json_files.read_object(path) if path.exists() else {}


def _ends(estimate: Mapping[str, Any]) -> tuple[float, float, float]:
  mean, low, high = (float(estimate[key]) for key in ('mean', 'low', 'high'))
  return mean, low, high


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
  """Writes what the charts show of the comparisons."""
  with atomic_file(directory / SUMMARY_FILE) as partial:
    partial.write_text(json.dumps(summary, indent=1) + '\n', encoding='utf-8')


def _interval(comparison: Mapping[str, Any]) -> Interval:
  difference = comparison['difference']
  return Interval(comparison['arm'], *(difference[key] for key in ('mean', 'low', 'high')))


def _write(path: Path, content: bytes) -> None:
  with atomic_file(path) as partial:
    partial.write_bytes(content)
