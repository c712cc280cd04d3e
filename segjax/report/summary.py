"""Summarises a run for the top of report.html: the state of its stages, key figures, warnings."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segjax.report import charts
from segjax.report.alerts import AlertMonitor
from segjax.report.metric_log import METRICS_FILE
from segjax.report.result_warnings import result_warnings

_STAGE_FILE = 'stage.json'
_MAX_WARNINGS = 5  # per stage; the newest are shown


@dataclasses.dataclass(frozen=True)
class StageState:
  """A stage: its state (done, running, stopped, waiting), a note, and its results by name."""

  name: str
  state: str
  note: str
  results: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class KeyFigure:
  """A key figure: its value, and a note such as its value before or its interval."""

  label: str
  value: str
  note: str


def stages(workdir: Path, names: Sequence[str], state: str) -> list[StageState]:
  """Reads the state of the stages from disk; the one that has begun and is not done is `state`."""
  states = []
  for name in names:
    record = _load_json(workdir / name / _STAGE_FILE)
    results = record.get('results')
    if results is not None:
      shown = [(k, v) for k, v in _flatten(results) if k != 'seconds']
      states.append(StageState(name, 'done', _duration(results.get('seconds')), shown))
      continue
    is_next = not states or states[-1].state == 'done'
    note = ''
    if is_next and (steps := charts.read_metrics(workdir / name / METRICS_FILE)[0]):
      note = f'step {steps[-1] + 1:,}{_of_total(record, name)}'
    states.append(StageState(name, state if is_next else 'waiting', note, []))
  return states


def figures(workdir: Path, names: Sequence[str]) -> list[KeyFigure]:
  """Returns the key figures: PPO at the start and now, evaluation before and after."""
  result = []
  if 'evaluate' in names:
    result += _evaluation_figures(_load_json(workdir / 'evaluate' / 'results.json'))
  if 'ppo' in names:
    _, series = charts.read_metrics(workdir / 'ppo' / METRICS_FILE)
    for label, name in (
      ('Reward in training', 'objective/reward'),
      ('KL, nats', 'objective/kl'),
      ('Length, tokens', 'response/length_mean'),
    ):
      if y := [x for x in series.get(name, []) if x == x]:
        count = max(1, len(y) // 20)
        first, last = sum(y[:count]) / count, sum(y[-count:]) / count
        result.append(KeyFigure(label, f'{last:z,.2f}', f'{first:z,.2f} at the start'))
  if 'reward' in names:
    results = _load_json(workdir / 'reward' / _STAGE_FILE).get('results', {})
    if (accuracy := results.get('held_out_accuracy')) is not None:
      note = f'accuracy on {results.get("held_out_pairs", 0):,} held-out pairs'
      result.append(KeyFigure('Reward model', f'{100 * accuracy:.1f} %', note))
  return result


def warnings(workdir: Path, names: Sequence[str]) -> list[str]:
  """Returns the reasons to doubt the figures: skipped updates, alerts, results."""
  result = []
  for name in names:
    steps, series = charts.read_metrics(workdir / name / METRICS_FILE)
    skipped = [
      step for step, x in zip(steps, series.get('skipped_updates', []), strict=False) if x > 0
    ]
    if skipped:
      last = skipped[-1] + 1
      result.append(f'{name}: updates were skipped in {len(skipped)} step(s), last in step {last}')
    monitor, alerts = AlertMonitor(), []
    monitored = {metric: series[metric] for metric in monitor.metrics if metric in series}
    for index, step in enumerate(steps):
      values = {metric: y[index] for metric, y in monitored.items()}
      alerts += [f'{name}, step {step + 1}: {alert}' for alert in monitor.update(values)]
    result += alerts[-_MAX_WARNINGS:]
    results = _load_json(workdir / name / _STAGE_FILE).get('results') or {}
    result += [f'{name}: {text}' for text in result_warnings(name, results)]
  return result


def _evaluation_figures(results: dict[str, Any]) -> Iterator[KeyFigure]:
  before, after = results.get('before', {}), results.get('after', {})
  for label, name in (('Gold reward, held out', 'gold'), ('Reward score, held out', 'score')):
    if name in before and name in after:
      low, high = after[name].get('low'), after[name].get('high')
      interval = f'; 95 % interval now [{low:.2f}, {high:.2f}]' if low is not None else ''
      note = f'{before[name]["mean"]:z,.2f} before PPO{interval}'
      yield KeyFigure(label, f'{after[name]["mean"]:z,.2f}', note)


def _of_total(record: dict[str, Any], name: str) -> str:
  total = record.get('key', {}).get('settings', {}).get(name, {}).get('max_steps')
  return f' of {total:,}' if total else ''


def _flatten(results: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, str]]:
  """Yields (label, value) of nested results; what exists before and after as one line."""
  before, after = results.get('before'), results.get('after')
  if isinstance(before, dict) and isinstance(after, dict):
    results = {k: v for k, v in results.items() if k not in ('before', 'after')}
    for name in after:
      if name in before:
        yield name.replace('_', ' '), f'{_mean(before[name])} → {_mean(after[name])}'
  for name, value in results.items():
    label = f'{prefix}{name.replace("_", " ")}'
    if isinstance(value, dict):
      yield from _flatten(value, f'{label}, ')
    elif isinstance(value, float | int | None):
      yield label, charts.format_number(value)
    else:
      yield label, str(value)


def _mean(value: Any) -> str:
  """Formats a number, or the mean of an interval."""
  return charts.format_number(value['mean'] if isinstance(value, dict) else value)


def _duration(seconds: float | None) -> str:
  if seconds is None:
    return ''
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{seconds:.1f} s'


def _load_json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
