"""Decides which charts a stage has: the main ones, and the others by the prefix of their names.

They are drawn by `plots`; steps are counted from 1, as on the console.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segjax import json_files
from segjax.report import metric_docs, metric_names, plots, response_log
from segjax.report.metric_log import HASHES, METRICS_FILE
from segjax.report.study_charts import study_charts
from segjax.storage import is_before, read_json_lines

# Title and metrics of the charts that are shown first; the metrics of a chart share its axes, so
# that training and held-out data are seen together.
MAIN = (
  ('Reward per response, before KL', ('objective/reward', 'eval/reward')),
  ('Gold reward per response', ('eval/gold',)),
  ('Reward per response, after KL', ('objective/rlhf_reward',)),
  ('KL to the reference, nats per response', ('objective/kl', 'eval/kl')),
  ('Response length, tokens', ('response/length_mean', 'eval/length_mean')),
  ('Share of responses that end by themselves', ('response/eos_rate',)),
  ('Policy loss', ('policy/loss',)),
  ('Critic loss', ('critic/loss',)),
  ('Loss', ('sft/loss', 'reward_model/loss', 'dpo/loss', 'eval/loss')),
  ('Accuracy', ('reward_model/accuracy', 'dpo/accuracy', 'eval/accuracy')),
)
TIMING = ('generate', 'score', 'update', 'evaluate', 'between_steps')  # parts of a step, in order
_TIMING = 'timing/'
_COMPILE, _NUM_COMPILES = 'timing/compile', 'perf/num_compiles'
_ZERO_BELOW = 1e-7  # rounding errors of float32 are shown as 0
_MAX_ENTROPIES = 200_000  # in a histogram


@dataclasses.dataclass(frozen=True)
class Chart:
  """A chart.

  Attributes:
    title: what it shows.
    drawing: the SVG and the values under the pointer.
    last: the value next to the title, '' if the legend has it.
    note: what was measured on which data, and the step of the last value.
    legend: (name, value) of each series, in the order of their colours; () for a single one.
    description: of its metric, with the metric's key.
    is_wide: whether it is as wide as the page.
  """

  title: str
  drawing: plots.Drawing
  last: str = ''
  note: str = ''
  legend: tuple[tuple[str, str], ...] = ()
  description: str = ''
  is_wide: bool = False


@dataclasses.dataclass(frozen=True)
class Charts:
  """The charts of a stage: the main ones, and the others in groups (name, charts)."""

  main: list[Chart]
  groups: list[tuple[str, list[Chart]]]


def stage_charts(directory: Path) -> Charts:
  """Draws the charts of a stage's metrics, normaliser and responses, as far as it has any."""
  steps, series = read_metrics(directory / METRICS_FILE)
  main = [
    Chart(title, drawing, note=note, is_wide=True)
    for title, note, drawing in study_charts(directory)
  ] or [
    *_main_charts(directory.name, steps, series),
    *_normalizer_charts(directory),
    *_segment_charts(directory),
  ]
  in_main = {name for _, names in MAIN for name in names if name in series}
  others = sorted((name for name in series if name not in in_main), key=lambda n: (_prefix(n), n))
  groups = []
  for prefix, names in itertools.groupby(others, key=_prefix):
    charts = [
      _curve_chart(directory.name, metric_names.metric_name(name), steps, {name: series[name]})
      for name in names
    ]
    groups.append((metric_names.group_name(prefix), charts))
  return Charts(main, groups)


def card_png(path: Path, names: Sequence[str]) -> bytes:
  """Draws the metrics `names` of a metrics.jsonl for a model card; b'' if it has none of them."""
  steps, series = read_metrics(path)
  selected = {metric_names.metric_name(name): series[name] for name in names if name in series}
  return plots.render_png(steps, selected) if selected else b''


def read_metrics(path: Path) -> tuple[list[int], dict[str, list[float]]]:
  """Reads (steps, values by name) of a metrics.jsonl; NaN where a step lacks a metric.

  The file counts steps from 0; the result counts them from 1, as the console does.
  """
  rows = [row for row in read_json_lines(path) if is_before(row, sys.maxsize)]
  names = dict.fromkeys(name for row in rows for name in row if name != 'step')
  names = [name for name in names if not name.startswith(HASHES)]
  values = {name: [float(row.get(name, 'nan')) for row in rows] for name in sorted(names)}
  return [row['step'] + 1 for row in rows], values


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
  if any(_TIMING + part in series for part in TIMING):
    yield _timing_chart(stage, steps, series)


def _curve_chart(stage: str, title: str, steps: list[int], series: dict[str, list[float]]) -> Chart:
  """Draws metrics over the steps; the legend says on which data each was measured."""
  ends = {name: _last_value(steps, y) for name, y in series.items()}
  named = {metric_names.metric_scope(stage, name) or 'value': name for name in series}
  drawing = plots.curve(
    steps, {scope: series[name] for scope, name in named.items()}, f'{stage}: {title}'
  )
  last_step = max((step for step, _ in ends.values()), default=0)
  at_step = f'at step {last_step:,}' if last_step else ''
  docs = [f'{name}: {_describe(name)}' for name in series]
  if len(series) > 1:
    legend = tuple((scope, ends[name][1]) for scope, name in named.items())
    return Chart(title, drawing, '', at_step, legend, '\n'.join(docs))
  (scope, name), *_ = named.items()
  note = ' · '.join(part for part in (scope if scope != 'value' else '', at_step) if part)
  return Chart(title, drawing, ends[name][1], note, (), docs[0])


def _last_value(steps: list[int], y: list[float]) -> tuple[int, str]:
  """Returns (step, value as text) of the last value that is not NaN."""
  for step, value in zip(reversed(steps), reversed(y), strict=True):
    if value == value:
      return step, format_number(value)
  return 0, '–'


def _describe(name: str) -> str:
  entry = metric_docs.find_entry(name)
  return entry.description if entry else metric_names.metric_name(name)


def _timing_chart(stage: str, steps: list[int], series: dict[str, list[float]]) -> Chart:
  """Draws the parts of a step without compiling, which takes many times as long.

  Files of an earlier version have no seconds of compiling: there the steps that compiled are left
  out.
  """
  kept = _steps_without_compiling(len(steps), series)
  left_out = len(steps) - len(kept)
  parts = {}
  for part in TIMING:
    if y := series.get(_TIMING + part):
      parts[metric_names.metric_name(_TIMING + part)] = [y[index] for index in kept]
  kept_steps = [steps[index] for index in kept]
  title = 'Seconds of a step, by part'
  drawing = plots.stacked(kept_steps, parts, f'{stage}: {title}')
  notes = [f'mean of {len(kept):,} steps']
  if left_out:
    notes.append(f'without {left_out:,} that compiled programs')
  if _COMPILE in series:
    total = sum(x for x in series[_COMPILE] if x == x)
    notes.append(f'compiling is not in it, {format_number(total)} s in all')
  means = {name: sum(x for x in y if x == x) / len(kept) for name, y in parts.items()}
  legend = tuple((name, f'{format_number(mean)} s') for name, mean in means.items())
  last = f'{format_number(sum(means.values()))} s'
  return Chart(title, drawing, last, ' · '.join(notes), legend)


def _steps_without_compiling(count: int, series: dict[str, list[float]]) -> list[int]:
  """Returns the indices of the steps whose parts hold no compiling; all if there are none."""
  compiles = series.get(_NUM_COMPILES)
  if compiles is None or _COMPILE in series:
    return list(range(count))
  steps = enumerate(itertools.pairwise([0.0, *compiles]))
  return [index for index, (before, now) in steps if not now > before] or list(range(count))


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
  for title, key in (('Mean of segment scores', 'mean'), ('Std of segment scores', 'std')):
    w, b = coefficients[f'w_{key}'], coefficients[f'b_{key}']
    last = f'{format_number(w)} ln p {b:+.3f}' if w else format_number(b)
    note = 'by relative position p in the response'
    legend = (('bins of p, larger with more scores', ''), ('fit', last))
    yield Chart(title, plots.fit(bins, key, w, b, title), '', note, legend)


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
  name, above, legend = directory.name, '', ()
  if threshold is not None:
    above = f'{100 * sum(x > threshold for x in entropy) / len(entropy):.1f} % above {threshold:g}'
    legend = (('share of tokens', ''), (f'threshold, {threshold:g} nats', ''))
  title, note = 'Entropy of the reference', 'tokens of the logged responses'
  drawing = plots.histogram(entropy, f'{name}: {title}', 'nats', mark=threshold)
  yield Chart(title, drawing, above, note, legend)
  title, note = 'Segment length', 'segments of the logged responses'
  drawing = plots.histogram(lengths, f'{name}: {title}', 'tokens per segment', integers=True)
  mean = format_number(sum(lengths) / len(lengths))
  yield Chart(title, drawing, f'mean {mean}', note)
