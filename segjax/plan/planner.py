"""Plans a job on a topology: memory and time of every phase, and suggestions; prints the plan."""

import dataclasses
import json
import math
import operator
from pathlib import Path
from typing import Any

from segjax.config.settings import Settings
from segjax.errors import UserError
from segjax.model.llama import num_parameters
from segjax.model.mesh import check_batch, make_mesh
from segjax.plan import memory, roofline, suggestions, topologies
from segjax.plan.lengths import KINDS
from segjax.plan.memory import PhaseMemory, in_gib
from segjax.plan.phases import JobPlan, JobPrograms
from segjax.plan.topologies import Topology
from segjax.report.console import log, table
from segjax.run.models import find_network_config


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan of a job on a topology.

  Attributes:
    measured: the memory of the compiled phases.
    costs: what each phase of a step costs, by name.
    items_per_step: prompts or rows that a step takes.
    suggestions: lines with changes that would make it fit; empty if it fits.
  """

  job: JobPlan
  topology: Topology
  programs: JobPrograms
  measured: list[PhaseMemory]
  costs: dict[str, roofline.PhaseCost]
  items_per_step: int
  suggestions: list[str]

  @property
  def fits(self) -> bool:
    """Whether every phase fits into the memory of a device."""
    return all(not m.refused and m.peak <= self.topology.chip.memory for m in self.measured)

  @property
  def peak(self) -> int:
    """The largest peak of all phases, in bytes."""
    return max(phase.peak for phase in self.measured)

  @property
  def step_seconds(self) -> float:
    """A lower bound on the seconds of a step."""
    return sum(cost.seconds(self.topology.chip) for cost in self.costs.values())


def make_plan(
  job: JobPlan,
  s: Settings,
  topology: Topology,
  names: tuple[str, ...] = (),
  cache: Path | None = None,
  lengths: str = KINDS[0],
) -> Plan:
  """Compiles the job's phases for the topology.

  Args:
    names: of the phases to compile; empty for all.
    cache: a directory of earlier results.
    lengths: of the texts of a step, one of `lengths.KINDS`; memory is that of the longest texts.

  Raises:
    UserError: a phase does not exist, the sizes of the network are unknown, or a batch does not
      divide over the devices.
  """
  network = find_network_config(s)
  if network is None:
    raise UserError(
      'config.network.vocab_size=0 and config.policy.path is not a local directory, so the sizes '
      'of the network are unknown; use a preset such as llama3_8b_sft, or a local policy.path.'
    )
  devices = topologies.devices(topology)
  mesh = make_mesh(s.mesh.data, s.mesh.fsdp, s.mesh.tensor, devices)
  for key in job.batch_keys:
    if size := operator.attrgetter(key)(s):
      check_batch(f'config.{key}={size}', size, mesh)
  programs = job.programs(s, network, mesh, topology.chip.memory, lengths)
  existing = [phase.name for phase in programs.phases]
  for name in names:
    if name not in existing:
      raise UserError(f'--phases: {name!r} is not one of {", ".join(existing)}.')
  measured = []
  for phase in programs.phases:
    if not names or phase.name in names:
      measured.append(memory.measure(phase, programs, mesh, topology, cache))
      log(f'{phase.name}: compiled in {measured[-1].seconds:.0f} s', 'plan')
  costs = job.costs(s, programs.configs, mesh)
  plan = Plan(job, topology, programs, measured, costs, job.items_per_step(s), [])
  if plan.fits:
    return plan
  compiled = suggestions.Measured(job, s, network, mesh, measured, topology.chip.memory, lengths)
  lines = suggestions.suggest_changes(compiled)
  return dataclasses.replace(plan, suggestions=lines)


_COLUMNS = ('arguments', 'temporaries', 'outputs', 'aliased', 'resident', 'peak')


def print_plan(plan: Plan) -> None:
  """Prints the plan."""
  chip = plan.topology.chip
  log('')
  _print_memory(plan)
  trees = [(name, in_gib(size)) for name, size in plan.programs.sizes().items()]
  table('Lives across phases', ('', 'GiB per device'), trees)
  if not math.isnan(chip.flops):
    _print_time(plan)
  for phase in plan.measured:
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
      f'{phase.seconds:.0f}',
      *(in_gib(getattr(phase, name)) for name in _COLUMNS),
      'refused' if phase.refused else 'yes' if phase.peak <= chip.memory else 'NO',
    )
    for phase in plan.measured
  ]
  limit = '' if math.isinf(chip.memory) else f' of {in_gib(chip.memory)}'
  title = (
    f'{plan.job.name} on {plan.topology.name}, {plan.topology.count} devices, networks of '
    f'{num_parameters(network) / 1e9:.2f} B: GiB{limit} per device'
  )
  table(title, ('phase', 'compile s', *_COLUMNS, 'fits'), rows)


def _print_time(plan: Plan) -> None:
  chip = plan.topology.chip
  rows = [
    (name, f'{cost.seconds(chip):.1f}', cost.bound(chip)) for name, cost in plan.costs.items()
  ]
  title = 'Lower bound on a step: 100 % of the data sheet, texts of the maximum length'
  table(title, ('phase', 'seconds', 'bound by'), rows)
  per_hour = plan.items_per_step / plan.step_seconds * 3600
  days = roofline.EPOCH_ROWS / per_hour / 24
  log(
    f'{plan.step_seconds:.0f} s a step, {per_hour:,.0f} {plan.job.items} an hour, '
    f'{days:.2f} days for {roofline.EPOCH_ROWS:,}'
  )


def to_json(plan: Plan) -> str:
  """Returns the plan's figures as JSON, in bytes and seconds."""
  chip = plan.topology.chip
  record: dict[str, Any] = {
    'job': plan.job.name,
    'topology': plan.topology.name,
    'devices': plan.topology.count,
    'fits': plan.fits,
    'memory': None if math.isinf(chip.memory) else int(chip.memory),
    'phases': [dataclasses.asdict(m) | {'peak': m.peak} for m in plan.measured],
    'trees': plan.programs.sizes(),
    'suggestions': plan.suggestions,
  }
  if not math.isnan(chip.flops):
    record['roofline'] = {name: cost.seconds(chip) for name, cost in plan.costs.items()}
    record['seconds_per_step'] = plan.step_seconds
  return json.dumps(record)
