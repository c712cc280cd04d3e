"""Decides which charts a stage has: the main ones, and the others by the prefix of their names.

They are drawn by `plots`.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segjax import json_files
from segjax.report import metric_docs, plots, response_log
from segjax.report.metric_log import METRICS_FILE
from segjax.storage import is_before, read_json_lines

# Title and metrics of the charts that are shown first; the metrics of a chart share its axes.
MAIN = (
  ('Reward per response', ('objective/reward', 'objective/rlhf_reward')),
  ('Gold reward on held-out prompts', ('eval/gold',)),
  ('Reward on held-out prompts', ('eval/reward',)),
  ('KL to the reference, nats per response', ('objective/kl',)),
  ('Response length, tokens', ('response/length_mean',)),
  ('Share of finished responses', ('response/eos_rate',)),
  ('Policy loss', ('policy/loss',)),
  ('Critic loss', ('critic/loss',)),
  ('Loss', ('sft/loss', 'reward_model/loss', 'eval/loss')),
  ('Accuracy', ('reward_model/accuracy', 'eval/accuracy')),
)
TIMING = ('generate', 'score', 'update', 'evaluate', 'between_steps')  # parts of a step, in order
_TIMING = 'timing/'
_ZERO_BELOW = 1e-7  # rounding errors of float32 are shown as 0
_MAX_ENTROPIES = 200_000  # in a histogram


@dataclasses.dataclass(frozen=True)
class Chart:
  """A chart: its title, its metric's last value, the SVG, and the description of the metric."""

  title: str
  last: str
  svg: str
  description: str = ''


@dataclasses.dataclass(frozen=True)
class Charts:
  """The charts of a stage: the main ones, and the others in groups (prefix, charts)."""

  main: list[Chart]
  groups: list[tuple[str, list[Chart]]]


def stage_charts(directory: Path) -> Charts:
  """Draws the charts of a stage's metrics, normaliser and responses, as far as it has any."""
  steps, series = read_metrics(directory / METRICS_FILE)
  main = [
    *_main_charts(directory.name, steps, series),
    *_normalizer_charts(directory),
    *_segment_charts(directory),
  ]
  in_main = {name for _, names in MAIN for name in names if name in series}
  others = sorted((name for name in series if name not in in_main), key=lambda n: (_prefix(n), n))
  groups = []
  for prefix, names in itertools.groupby(others, key=_prefix):
    charts = [_curve_chart(directory.name, name, steps, {name: series[name]}) for name in names]
    groups.append((prefix, charts))
  return Charts(main, groups)


def card_png(path: Path, names: Sequence[str]) -> bytes:
  """Draws the metrics `names` of a metrics.jsonl for a model card; b'' if it has none of them."""
  steps, series = read_metrics(path)
  selected = {name: series[name] for name in names if name in series}
  return plots.render_png(steps, selected) if selected else b''


def read_metrics(path: Path) -> tuple[list[int], dict[str, list[float]]]:
  """Reads (steps, values by name) of a metrics.jsonl; NaN where a step lacks a metric."""
  rows = [row for row in read_json_lines(path) if is_before(row, sys.maxsize)]
  names = dict.fromkeys(name for row in rows for name in row if name != 'step')
  values = {name: [float(row.get(name, 'nan')) for row in rows] for name in sorted(names)}
  return [row['step'] for row in rows], values


def format_number(value: float | int | None) -> str:
  """Formats a number for the page: four significant digits, thousands separated, no -0."""
  if value is None:
    return '–'
  if isinstance(value, int):
    return f'{value:,}'
  if value != value or abs(value) == float('inf'):
    return str(value)
  size = abs(value)
  if size < _ZERO_BELOW:
    return '0'
  if size < 1e-3 or size >= 1e7:
    return f'{value:.2e}'
  digits = next((d for limit, d in ((1000, 0), (100, 1), (10, 2)) if size >= limit), 3)
  return f'{value:z,.{digits}f}'


def _prefix(name: str) -> str:
  return name.partition('/')[0] if '/' in name else 'other'


def _main_charts(stage: str, steps: list[int], series: dict[str, list[float]]) -> Iterator[Chart]:
  for title, names in MAIN:
    if selected := {name: series[name] for name in names if name in series}:
      yield _curve_chart(stage, title, steps, selected)
  parts = {part: series[_TIMING + part] for part in TIMING if _TIMING + part in series}
  if parts:
    seconds = sum(next((x for x in reversed(y) if x == x), 0.0) for y in parts.values())
    svg = plots.stacked(steps, parts, f'{stage}: seconds per step by part')
    yield Chart('Seconds per step by part', f'{format_number(seconds)} s', svg)


def _curve_chart(stage: str, title: str, steps: list[int], series: dict[str, list[float]]) -> Chart:
  finite = [x for x in next(iter(series.values())) if x == x]
  last = format_number(finite[-1]) if finite else '–'
  entry = metric_docs.find_entry(next(iter(series)))
  svg = plots.curve(steps, series, f'{stage}: {title}')
  return Chart(title, last, svg, entry.description if entry else '')


def _normalizer_charts(directory: Path) -> Iterator[Chart]:
  """Yields charts of the normaliser and of the bins that it was fitted on."""
  path = directory / 'normalizer.json'
  if not path.exists():
    return
  try:
    yield from _fit_charts(json_files.read_object(path))
  except (ValueError, KeyError, TypeError, AttributeError):
    return  # edited by hand: the other charts of the page do not depend on it


def _fit_charts(record: dict[str, Any]) -> Iterator[Chart]:
  bins, coefficients = record['bins'], record['coefficients']
  for title, key in (('Mean(p) of segment scores', 'mean'), ('Std(p) of segment scores', 'std')):
    w, b = coefficients[f'w_{key}'], coefficients[f'b_{key}']
    last = f'{format_number(w)} ln p {b:+.3f}' if w else format_number(b)
    yield Chart(title, last, plots.fit(bins, key, w, b, title))


def _segment_charts(directory: Path) -> Iterator[Chart]:
  """Yields histograms of the entropies and lengths of the logged responses' segments."""
  entropy, lengths, threshold = [], [], None
  for record in read_json_lines(directory / response_log.RESPONSES_FILE):
    threshold = record['threshold']
    for segment in record['segments']:
      lengths.append(len(segment['tokens']))
      entropy += [x for x in segment['entropy'] if x is not None]
    if len(entropy) > _MAX_ENTROPIES:
      break
  if not entropy:
    return
  name = directory.name
  above = ''
  if threshold is not None:
    above = f'{100 * sum(x > threshold for x in entropy) / len(entropy):.1f} % above {threshold:g}'
  title = 'Entropy of the reference'
  yield Chart(title, above, plots.histogram(entropy, f'{name}: {title}', 'nats', mark=threshold))
  label = f'{name}: segment lengths'
  svg = plots.histogram(lengths, label, 'tokens per segment', integers=True)
  yield Chart('Segment length', f'mean {format_number(sum(lengths) / len(lengths))}', svg)
