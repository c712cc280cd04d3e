"""Updates and scoring of PPO as the compilers make them, for the benchmark `compiled`.

Settings are those of the presets, texts have the lengths of UltraFeedback, and a step is one of
1,024 responses. Seconds are those of `plan.hlo_cost`, at rates that large programs sustain; MFU
counts three forward passes over real tokens, at the peak of the data sheet.
"""

import dataclasses
from typing import Any

from segjax.config.load import load_settings
from segjax.errors import UserError
from segjax.model.llama import LlamaConfig
from segjax.plan.phase_plan import PhasePlan, in_gib
from segjax.plan.planner import make_plan
from segjax.plan.ppo_programs import PPO
from segjax.plan.topologies import Topology
from segjax.report.console import log, table

PHASES = ('policy-update', 'critic-update', 'scoring')
_PRESETS = {'small': 'llama3_8b_sft', '8b': 'llama3_8b_sft', '70b': 'llama3_70b'}
_SIZES = (
  *('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers'),
  *('num_attention_heads', 'num_key_value_heads'),
)


def measure(
  topology: Topology, model: str, config: LlamaConfig, phases: list[str]
) -> list[dict[str, Any]]:
  """Compiles phases; returns what each costs a device in a step, in bytes and seconds.

  Args:
    topology: for which there is a preset; for others nothing is compiled.
    model: whose preset is taken.
    config: sizes of the networks.
    phases: some of PHASES.
  """
  if not phases:
    return []
  sizes = {f'network.{name}': getattr(config, name) for name in _SIZES}
  try:
    settings, _ = load_settings(f'ppo:{_PRESETS[model]},{topology.name}', sizes)
  except UserError as error:
    log(f'{topology.name}: no updates and scoring: {error}')
    return []
  names = tuple(phase.replace('-', ' ') for phase in phases)
  plan = make_plan(PPO, settings, topology, names)
  return [_record(phase, plan.topology) for phase in plan.phases]


def _record(phase: PhasePlan, topology: Topology) -> dict[str, Any]:
  record = {
    'phase': phase.name,
    'temporaries': phase.temporaries,
    'compile_seconds': round(phase.compile_seconds, 1),
    'refused': phase.refused,
  }
  if phase.cost is None:
    return record
  peak = phase.cost.seconds * topology.count * topology.chip.flops
  return (
    record
    | dataclasses.asdict(phase.cost)
    | {'hidden': phase.cost.hidden, 'mfu': phase.model_flops / peak}
  )


def print_records(records: list[dict[str, Any]]) -> None:
  """Prints a table of the phases of all topologies.

  Args:
    records: with the result of `measure` as `updates`.
  """
  rows = [
    (
      record['topology'],
      phase['phase'],
      *(_figures(phase) if 'flops' in phase else ('refused', *[''] * 6)),
      in_gib(phase['temporaries']),
    )
    for record in records
    for phase in record.get('updates', ())
  ]
  columns = ('calls', 'TFLOP', 'HBM GB', 'links GB', 'hidden', 'seconds', 'MFU')
  title = 'Updates and scoring of a step, per device; MFU of real tokens'
  if rows:
    table(title, ('topology', 'phase', *columns, 'temporaries GiB'), rows)


def _figures(phase: dict[str, Any]) -> tuple[str, ...]:
  return (
    f'{phase["calls"]:.3g}',
    f'{phase["flops"] / 1e12:,.0f}',
    f'{phase["bytes"] / 1e9:,.0f}',
    f'{phase["exchanged"] / 1e9:,.0f}',
    f'{phase["hidden"]:.0%}',
    f'{phase["seconds"]:.2f}',
    f'{phase["mfu"]:.1%}' if phase['mfu'] else '',
  )
