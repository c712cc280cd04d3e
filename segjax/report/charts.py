"""Which charts a stage has: the main ones, the rest by the prefix of their names.

How they are drawn is in `plots`.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from segjax.report import metric_docs, plots, response_log
from segjax.report.metric_log import FILE
from segjax.storage import read_json_lines

# Title, and the metrics of a chart that stands on top; those of one chart share its axes.
MAIN = (
  ('Reward per response', ('objective/reward', 'objective/rlhf_reward')),
  ('Gold reward on held-out prompts', ('eval/gold',)),
  ('Reward on held-out prompts', ('eval/reward',)),
  ('KL to the reference, nats per response', ('objective/kl',)),
  ('Response length, tokens', ('response/length_mean',)),
  ('Responses that end by themselves', ('response/eos_rate',)),
  ('Policy loss', ('policy/loss',)),
  ('Critic loss', ('critic/loss',)),
  ('Loss', ('train/loss', 'eval/loss')),
  ('Accuracy', ('train/accuracy', 'eval/accuracy')),
)
TIMING = ('generate', 'score', 'update', 'evaluate', 'wait')  # of a step, in its order
_TIMING = 'timing/'
_NOISE = 1e-7  # what is smaller is shown as 0
_TOKENS = 200_000  # whose entropies a histogram is made of, at most


@dataclasses.dataclass(frozen=True)
class Chart:
  """A title, what its last value is, the picture, and what the metric means."""

  title: str
  last: str
  svg: str
  about: str = ''


@dataclasses.dataclass(frozen=True)
class Charts:
  """Of a stage: the main ones, and groups of the others, (prefix, charts)."""

  main: list[Chart]
  groups: list[tuple[str, list[Chart]]]


def of_stage(directory: Path) -> Charts:
  """The charts of a stage's metrics, normaliser and samples, as far as there are any."""
  steps, series = read(directory / FILE)
  main = [*_mains(directory.name, steps, series), *_fits(directory), *_histograms(directory)]
  shown = {name for _, names in MAIN for name in names if name in series}
  rest = sorted((name for name in series if name not in shown), key=lambda n: (_prefix(n), n))
  groups = []
  for prefix, names in itertools.groupby(rest, key=_prefix):
    charts = [_curve(directory.name, name, steps, {name: series[name]}) for name in names]
    groups.append((prefix, charts))
  return Charts(main, groups)


def read(path: Path) -> tuple[list[int], dict[str, list[float]]]:
  """(steps, values by name) of a metrics.jsonl; NaN where a step has no such value."""
  rows = list(read_json_lines(path))
  names = dict.fromkeys(name for row in rows for name in row if name != 'step')
  values = {name: [float(row.get(name, 'nan')) for row in rows] for name in sorted(names)}
  return [row['step'] for row in rows], values


def formatted(value: float | int | None) -> str:
  """A number as a person reads it: four digits that count, thousands apart, no -0."""
  if value is None:
    return '–'
  if isinstance(value, int):
    return f'{value:,}'
  if value != value or abs(value) == float('inf'):
    return str(value)
  size = abs(value)
  if size < _NOISE:
    return '0'
  if size < 1e-3 or size >= 1e7:
    return f'{value:.2e}'
  digits = next((d for limit, d in ((1000, 0), (100, 1), (10, 2)) if size >= limit), 3)
  return f'{value:z,.{digits}f}'


def _prefix(name: str) -> str:
  return name.partition('/')[0] if '/' in name else 'other'


def _mains(stage: str, steps: list[int], series: dict[str, list[float]]) -> Iterator[Chart]:
  for title, names in MAIN:
    if found := {name: series[name] for name in names if name in series}:
      yield _curve(stage, title, steps, found)
  parts = {part: series[_TIMING + part] for part in TIMING if _TIMING + part in series}
  if parts:
    seconds = sum(next((x for x in reversed(y) if x == x), 0.0) for y in parts.values())
    picture = plots.stacked(steps, parts, f'{stage}: seconds of a step')
    yield Chart('Where a step’s seconds go', f'{formatted(seconds)} s', picture)


def _curve(stage: str, title: str, steps: list[int], found: dict[str, list[float]]) -> Chart:
  finite = [x for x in next(iter(found.values())) if x == x]
  last = formatted(finite[-1]) if finite else '–'
  known = metric_docs.find_entry(next(iter(found)))
  picture = plots.curve(steps, found, f'{stage}: {title}')
  return Chart(title, last, picture, known.meaning if known else '')


def _fits(directory: Path) -> Iterator[Chart]:
  """The normaliser and what it was fitted on."""
  path = directory / 'normalizer.json'
  if not path.exists():
    return
  found = json.loads(path.read_text(encoding='utf-8'))
  bins, c = found['bins'], found['coefficients']
  for title, key in (('Mean(p) of segment scores', 'mean'), ('Std(p) of segment scores', 'std')):
    w, b = c[f'w_{key}'], c[f'b_{key}']
    last = f'{formatted(w)} ln p {b:+.3f}' if w else formatted(b)
    picture = plots.fit(bins['p'], bins['count'], bins[key], w, b, title)
    yield Chart(title, last, picture)


def _histograms(directory: Path) -> Iterator[Chart]:
  """Entropies and lengths of the segments of the samples."""
  entropy, lengths, threshold = [], [], None
  for record in read_json_lines(directory / response_log.FILE):
    threshold = record['threshold']
    for segment in record['segments']:
      lengths.append(len(segment['tokens']))
      entropy += [x for x in segment['entropy'] if x is not None]
    if len(entropy) > _TOKENS:
      break
  if not entropy:
    return
  name = directory.name
  above = ''
  if threshold is not None:
    above = f'{100 * sum(x > threshold for x in entropy) / len(entropy):.1f} % above {threshold:g}'
  label = 'Entropy of the reference on responses'
  picture = plots.histogram(entropy, f'{name}: {label}', 'nats', mark=threshold)
  yield Chart(label, above, picture)
  picture = plots.histogram(lengths, f'{name}: segment lengths', 'tokens of a segment', whole=True)
  yield Chart('Length of segments', f'mean {formatted(sum(lengths) / len(lengths))}', picture)
