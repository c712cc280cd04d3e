"""Prints a plan: the memory and the time of its phases, on the console and as JSON."""

import dataclasses
import json
import math
from typing import Any

from segjax.model.llama import num_parameters
from segjax.plan.phase_plan import PhasePlan, in_gib
from segjax.plan.planner import Plan
from segjax.report.console import log, table

_EPOCH_ROWS = 60_000  # prompts of UltraFeedback
_SIZES = ('arguments', 'temporaries', 'outputs', 'aliased', 'resident', 'peak')


def print_plan(plan: Plan) -> None:
  """Prints the plan."""
  log('')
  _print_memory(plan)
  trees = [(name, in_gib(size)) for name, size in plan.programs.sizes().items()]
  table('Lives across phases', ('', 'GiB per device'), trees)
  if at_once := plan.programs.responses_at_once:
    log(f'{at_once:,} responses are decoded at once')
  if plan.programs.note:
    log(plan.programs.note)
  if any(phase.cost for phase in plan.phases):
    _print_time(plan)
  for phase in plan.phases:
    if phase.refused:
      log(f'{phase.name}: {phase.refused}')
  for line in plan.suggestions:
    log(line)
  log('it fits' if plan.fits else 'it does NOT fit')


def _print_memory(plan: Plan) -> None:
  chip, network = plan.topology.chip, next(iter(plan.programs.configs.values()))
  rows = [
    (
      phase.name,
      f'{phase.compile_seconds:.0f}',
      *(in_gib(getattr(phase, name)) for name in _SIZES),
      'refused' if phase.refused else 'yes' if phase.peak <= chip.memory else 'NO',
    )
    for phase in plan.phases
  ]
  limit = '' if math.isinf(chip.memory) else f' of {in_gib(chip.memory)}'
  title = (
    f'{plan.job.name} on {plan.topology.name}, {plan.topology.count} devices, networks of '
    f'{num_parameters(network) / 1e9:.2f} B: GiB{limit} per device'
  )
  table(title, ('phase', 'compile s', *_SIZES, 'fits'), rows)


def _print_time(plan: Plan) -> None:
  columns = (
    'phase',
    'calls',
    'TFLOP',
    'HBM GB',
    'links GB',
    'hidden',
    'seconds',
    'bound by',
    'MFU',
  )
  title = f'A step, per device, texts of {plan.lengths} lengths, by the compiled programs'
  table(title, columns, [_time_row(phase, plan) for phase in plan.phases if phase.cost])
  if plan.update_mfu:
    log(f'updates: {plan.update_mfu:.1%} of peak on real tokens')
  if plan.step_seconds:
    per_hour = plan.items_per_step / plan.step_seconds * 3600
    log(
      f'{plan.step_seconds:.1f} s a step, {plan.tokens_per_second:,.0f} tokens/s, {per_hour:,.0f} '
      f'{plan.job.items} an hour, {_EPOCH_ROWS / per_hour / 24:.2f} days for {_EPOCH_ROWS:,}'
    )


def _time_row(phase: PhasePlan, plan: Plan) -> tuple[str, ...]:
  cost, chip = phase.cost, plan.topology.chip
  assert cost
  peak = cost.seconds * plan.topology.count * chip.flops
  return (
    phase.name,
    f'{cost.calls:.4g}',
    f'{cost.flops / 1e12:.1f}',
    f'{cost.bytes / 1e9:.0f}',
    f'{cost.exchanged / 1e9:.1f}',
    f'{cost.hidden:.0%}' if cost.exchanged else '',
    f'{cost.seconds:.2f}',
    cost.bound(chip),
    f'{phase.model_flops / peak:.1%}' if phase.model_flops else '',
  )


def to_json(plan: Plan) -> str:
  """Returns the plan's figures as JSON, in bytes, FLOPs and seconds of one device."""
  chip = plan.topology.chip
  record: dict[str, Any] = {
    'job': plan.job.name,
    'topology': plan.topology.name,
    'devices': plan.topology.count,
    'lengths': plan.lengths,
    'fits': plan.fits,
    'memory': None if math.isinf(chip.memory) else int(chip.memory),
    'phases': [_record(phase, plan) for phase in plan.phases],
    'trees': plan.programs.sizes(),
    'responses_at_once': plan.programs.responses_at_once,
    'note': plan.programs.note,
    'suggestions': plan.suggestions,
    'seconds_per_step': plan.step_seconds,
    'tokens_per_second': plan.tokens_per_second,
    'update_mfu': plan.update_mfu,
  }
  return json.dumps(record)


def _record(phase: PhasePlan, plan: Plan) -> dict[str, Any]:
  record = dataclasses.asdict(phase) | {'peak': phase.peak}
  if phase.cost:
    record['cost'] |= {'hidden': phase.cost.hidden, 'bound': phase.cost.bound(plan.topology.chip)}
  return record
