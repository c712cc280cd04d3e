"""Summarises a run for the top of report.html: the state of its stages, key figures, warnings."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from segjax.report import charts, metric_names, stage_history, stage_tables
from segjax.report.alerts import AlertMonitor
from segjax.report.console import format_duration
from segjax.report.metric_log import METRICS_FILE
from segjax.report.result_warnings import result_warnings
from segjax.report.stage_tables import Table, format_value

_MAX_WARNINGS = 5  # per stage; the newest are shown


@dataclasses.dataclass(frozen=True)
class StageState:
  """A stage of a working directory.

  Attributes:
    key: its name in config.stages, also its directory.
    name: as a person reads it.
    state: done, running, stopped, starting or waiting.
    note: how long it took, or its step.
    error: the message of the error that stopped it.
    results: its single results by name.
    tables: its other results.
  """

  key: str
  name: str
  state: str
  note: str = ''
  error: str = ''
  results: tuple[tuple[str, str], ...] = ()
  tables: tuple[Table, ...] = ()


@dataclasses.dataclass(frozen=True)
class KeyFigure:
  """A key figure.

  Attributes:
    label: what was measured.
    scope: on which data, before or after which step.
    value: the figure.
    note: its value before, or its interval.
  """

  label: str
  scope: str
  value: str
  note: str


def stages(
  workdir: Path, names: Sequence[str], present: Mapping[str, str], error: str = ''
) -> list[StageState]:
  """Reads the stages from disk.

  Args:
    names: the stages in their order.
    present: the states of those stages of the present command that are not finished.
    error: the message of the error that stopped the present command.
  """
  runs, states = stage_history.read(workdir), []
  for key in names:
    name = metric_names.stage_name(key)
    record = stage_history.load_stage(workdir / key)
    results = record.get('results')
    if key not in present and results is not None:
      tables = tuple(stage_tables.stage_tables(key, results))
      shown = tuple(_single_results(key, results))
      note = _duration(results.get('seconds'))
      states.append(StageState(key, name, 'done', note, '', shown, tables))
      continue
    state, note, message = present.get(key, 'stopped'), '', ''
    if state in ('running', 'stopped') and (
      steps := charts.read_metrics(workdir / key / METRICS_FILE)[0]
    ):
      note = f'step {steps[-1]:,}{_of_total(record, key)}'
    if state == 'stopped':
      message = error if key in present else runs[key].error if key in runs else ''
    states.append(StageState(key, name, state, note, message))
  return states


def figures(workdir: Path, names: Sequence[str]) -> list[KeyFigure]:
  """Returns the key figures of the stages: held-out ones; without an evaluation, PPO's own."""
  results = {name: stage_history.load_stage(workdir / name).get('results') or {} for name in names}
  figures = list(_evaluation_figures(results.get('evaluate', {})))
  if not figures and 'ppo' in names:
    figures += _training_figures(workdir / 'ppo' / METRICS_FILE)
  label = "Reward model's accuracy"
  for name, title in (('reward', label), ('dpo', 'Accuracy of the implicit reward')):
    trained = results.get(name, {})
    if (accuracy := trained.get('held_out_accuracy')) is not None:
      what = 'steps' if 'held_out_pairs' not in trained else 'pairs'
      scope = f'{trained.get(f"held_out_{what}", 0):,} held-out {what}'
      chance = trained.get('held_out_length_baseline_accuracy')
      note = '' if chance is None else f'{format_value(chance)} by preferring the longer response'
      figures.append(KeyFigure(title, scope, format_value(accuracy), note))
  beside_pairs = results.get('reward', {})
  if (accuracy := beside_pairs.get('held_out_step_accuracy')) is not None:
    scope = f'{beside_pairs["held_out_steps"]:,} held-out steps'
    figures.append(KeyFigure('Accuracy on labelled steps', scope, format_value(accuracy), ''))
  if pairs := results.get('evaluate_reward', {}).get('pairs'):
    accuracy = pairs['all']['accuracy']
    subsets = list(pairs['subsets'])
    source = subsets[0] if len(subsets) == 1 else f'{len(subsets)} subsets'
    scope = f'{accuracy["n"]:,} pairs of {source}'
    figures.append(KeyFigure(label, scope, format_value(accuracy['mean']), _interval(accuracy)))
  return figures


def warnings(workdir: Path, names: Sequence[str]) -> list[str]:
  """Returns the reasons to doubt the figures: skipped updates, alerts, results."""
  result = []
  for key in names:
    steps, series = charts.read_metrics(workdir / key / METRICS_FILE)
    name = metric_names.stage_name(key)
    skipped = [
      step for step, x in zip(steps, series.get('skipped_updates', []), strict=False) if x > 0
    ]
    if skipped:
      result.append(
        f'{name}: updates were skipped in {len(skipped)} step(s), last in step {skipped[-1]}'
      )
    monitor, alerts = AlertMonitor(), []
    monitored = {metric: series[metric] for metric in monitor.metrics if metric in series}
    for index, step in enumerate(steps):
      values = {metric: y[index] for metric, y in monitored.items()}
      alerts += [f'{name}, step {step}: {alert}' for alert in monitor.update(values)]
    result += alerts[-_MAX_WARNINGS:]
    results = stage_history.load_stage(workdir / key).get('results') or {}
    result += [f'{name}: {text}' for text in result_warnings(key, results)]
  if _is_of_earlier_policy(workdir, names):
    result.append(
      f'{metric_names.stage_name("evaluate")}: PPO ran again since, so the figures before and after'
      ' are of an earlier policy; run evaluate again'
    )
  return result


def _is_of_earlier_policy(workdir: Path, names: Sequence[str]) -> bool:
  """Returns whether PPO began again after its policy was evaluated; `names` are in order."""
  if not {'ppo', 'evaluate'} <= set(names) or names.index('evaluate') > names.index('ppo'):
    return False
  settings = stage_history.load_stage(workdir / 'evaluate').get('key', {}).get('settings', {})
  path = settings.get('policy', {}).get('path', '')
  return path == 'ppo/model' or path.endswith(f'/{workdir.absolute().name}/ppo/model')


def _evaluation_figures(results: dict[str, Any]) -> Iterator[KeyFigure]:
  before, after = results.get('before', {}), results.get('after', {})
  scope = 'held-out prompts, after PPO'
  for key, label in (('gold', 'Gold reward'), ('score', "Reward model's score")):
    if key in before and key in after:
      note = f'{format_value(before[key]["mean"])} before PPO\n'
      if gain := after.get(f'{key}_gain'):
        note += f'gain {format_value(gain)}'
      else:
        note += _interval(after[key])
      yield KeyFigure(label, scope, format_value(after[key]['mean']), note)
  judge = 'gold' if 'win_rate_gold' in after else 'score'
  if rate := after.get(f'win_rate_{judge}'):
    equal = after.get(f'lc_win_rate_{judge}', {}).get('mean')
    note = _interval(rate) + ('' if equal is None else f'\n{format_value(equal)} at equal length')
    label = 'Win rate by gold reward' if judge == 'gold' else "Win rate by reward model's score"
    yield KeyFigure(label, 'held-out prompts, after against before', _mean(rate), note)
  if 'kl_nats' in after:
    kl = format_value(after['kl_nats'], 2)
    yield KeyFigure('KL to the reference', scope, kl, 'nats per response')


def _training_figures(path: Path) -> Iterator[KeyFigure]:
  steps, series = charts.read_metrics(path)
  for key in ('objective/reward', 'objective/kl', 'response/length_mean'):
    if values := [(step, x) for step, x in zip(steps, series.get(key, ()), strict=False) if x == x]:
      (first, begin), (last, end) = values[0], values[-1]
      scope = f'training prompts, step {last:,}'
      note = f'{charts.format_number(begin)} at step {first:,}'
      yield KeyFigure(metric_names.metric_name(key), scope, charts.format_number(end), note)


def _interval(value: Mapping[str, Any]) -> str:
  if value.get('low') is None:
    return ''
  return f'95\u00a0% interval [{format_value(value["low"])},\u00a0{format_value(value["high"])}]'


def _mean(value: Mapping[str, Any]) -> str:
  return format_value(value['mean'])


def _of_total(record: dict[str, Any], name: str) -> str:
  total = record.get('key', {}).get('settings', {}).get(name, {}).get('max_steps')
  return f' of {total:,}' if total else ''


def _single_results(stage: str, results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields (name, value) of the results that are no tables; the seconds are shown elsewhere."""
  for key, value in results.items():
    if key != 'seconds' and not isinstance(value, dict | list):
      if isinstance(value, float) and value.is_integer():  # a count that was averaged
        value = int(value)
      text = value if isinstance(value, str) else charts.format_number(value)
      yield metric_names.result_name(stage, key), text


def _duration(seconds: float | None) -> str:
  if seconds is None:
    return ''
  return f'{seconds:.1f} s' if round(seconds) < 60 else format_duration(seconds)
