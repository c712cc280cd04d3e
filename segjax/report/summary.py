"""What a run comes to in a few words: the state of its stages, key figures, warnings."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segjax.report import charts
from segjax.report.alerts import AlertMonitor
from segjax.report.metric_log import FILE

_STAGE = 'stage.json'
_WARNINGS = 5  # of a stage that are shown, the newest


@dataclasses.dataclass(frozen=True)
class StageState:
  """A stage: done, running, stopped or waiting; what it is at, and its results by name."""

  name: str
  state: str
  note: str
  results: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class KeyFigure:
  """A key figure: its value, and beside it what it was before or how sure it is."""

  label: str
  value: str
  note: str


def stages(workdir: Path, names: Sequence[str], state: str) -> list[StageState]:
  """The stages as they stand on disk; the one that is begun and not done is in `state`."""
  found = []
  for name in names:
    record = _json(workdir / name / _STAGE)
    results = record.get('results')
    if results is not None:
      shown = [(k, v) for k, v in _flat(results) if k != 'seconds']
      found.append(StageState(name, 'done', _duration(results.get('seconds')), shown))
      continue
    is_next = not found or found[-1].state == 'done'
    note = ''
    if is_next and (steps := charts.read(workdir / name / FILE)[0]):
      note = f'step {steps[-1] + 1:,}{_of(record, name)}'
    found.append(StageState(name, state if is_next else 'waiting', note, []))
  return found


def figures(workdir: Path, names: Sequence[str]) -> list[KeyFigure]:
  """What one looks at first: of PPO first and last, of evaluate before and after."""
  found = []
  if 'evaluate' in names:
    found += _evaluated(_json(workdir / 'evaluate' / 'results.json'))
  if 'ppo' in names:
    _, series = charts.read(workdir / 'ppo' / FILE)
    for label, name in (
      ('Reward in training', 'objective/reward'),
      ('KL, nats', 'objective/kl'),
      ('Length, tokens', 'response/length_mean'),
    ):
      if y := [x for x in series.get(name, []) if x == x]:
        few = max(1, len(y) // 20)
        first, last = sum(y[:few]) / few, sum(y[-few:]) / few
        found.append(KeyFigure(label, f'{last:z,.2f}', f'at first {first:z,.2f}'))
  if 'reward' in names:
    results = _json(workdir / 'reward' / _STAGE).get('results', {})
    if (accuracy := results.get('held_out_accuracy')) is not None:
      pairs = results.get('held_out_pairs', 0)
      found.append(
        KeyFigure('Reward model', f'{100 * accuracy:.1f} %', f'right on {pairs:,} pairs')
      )
  return found


def warnings(workdir: Path, names: Sequence[str]) -> list[str]:
  """What a person should look at before believing the figures: what `watch` said, bad steps."""
  found = []
  for name in names:
    steps, series = charts.read(workdir / name / FILE)
    bad = [step for step, x in zip(steps, series.get('skipped_updates', []), strict=False) if x > 0]
    if bad:
      found.append(f'{name}: {len(bad)} step(s) were left out as bad, the last was {bad[-1] + 1}')
    watch, said = AlertMonitor(), []
    watched = {metric: series[metric] for metric in watch.names if metric in series}
    for at, step in enumerate(steps):
      values = {metric: values[at] for metric, values in watched.items()}
      said += [f'{name}, step {step + 1}: {warning}' for warning in watch.look(values)]
    found += said[-_WARNINGS:]
  return found


def _evaluated(results: dict[str, Any]) -> Iterator[KeyFigure]:
  before, after = results.get('before', {}), results.get('after', {})
  for label, name in (('Gold reward, held out', 'gold'), ('Reward score, held out', 'score')):
    if name in before and name in after:
      low, high = after[name].get('low'), after[name].get('high')
      sure = f', 95 % [{low:.2f}, {high:.2f}]' if low is not None else ''
      note = f'before PPO {before[name]["mean"]:z,.2f}{sure}'
      yield KeyFigure(label, f'{after[name]["mean"]:z,.2f}', note)


def _of(record: dict[str, Any], name: str) -> str:
  total = record.get('key', {}).get('settings', {}).get(name, {}).get('max_steps')
  return f' of {total:,}' if total else ''


def _flat(results: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, str]]:
  before, after = results.get('before'), results.get('after')
  if isinstance(before, dict) and isinstance(after, dict):
    results = {k: v for k, v in results.items() if k not in ('before', 'after')}
    for name in after:
      if name in before:
        yield name.replace('_', ' '), f'{_mean(before[name])} → {_mean(after[name])}'
  for name, value in results.items():
    label = f'{prefix}{name.replace("_", " ")}'
    if isinstance(value, dict):
      yield from _flat(value, f'{label}, ')
    elif isinstance(value, float | int | None):
      yield label, charts.formatted(value)
    else:
      yield label, str(value)


def _mean(value: Any) -> str:
  """A number, or the middle of an interval."""
  return charts.formatted(value['mean'] if isinstance(value, dict) else value)


def _duration(seconds: float | None) -> str:
  if seconds is None:
    return ''
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{seconds:.1f} s'


def _json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
