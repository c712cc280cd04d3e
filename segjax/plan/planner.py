"""Plans a job on a topology: memory and time of every phase, and suggestions."""

import dataclasses
import operator
from pathlib import Path

from segjax.config.settings import Settings
from segjax.errors import UserError
from segjax.model.mesh import check_batch, make_mesh
from segjax.plan import phase_plan, suggestions, topologies
from segjax.plan.lengths import KINDS
from segjax.plan.phase_plan import PhasePlan
from segjax.plan.phases import JobPlan, JobPrograms
from segjax.plan.topologies import Topology
from segjax.report.console import log
from segjax.run.network_sizes import find_network_config
from segjax.run.training_loop import check_micro_batch


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan of a job on a topology.

  Attributes:
    lengths: of the texts of a step, one of `lengths.KINDS`.
    phases: what the compiled phases need.
    items_per_step: prompts or rows that a step takes.
    suggestions: lines with changes that would make it fit; empty if it fits.
  """

  job: JobPlan
  topology: Topology
  programs: JobPrograms
  lengths: str
  phases: list[PhasePlan]
  items_per_step: int
  suggestions: list[str]

  @property
  def fits(self) -> bool:
    """Whether every phase fits into the memory of a device."""
    return all(not p.refused and p.peak <= self.topology.chip.memory for p in self.phases)

  @property
  def peak(self) -> int:
    """The largest peak of all phases, in bytes."""
    return max(phase.peak for phase in self.phases)

  @property
  def step_seconds(self) -> float | None:
    """Seconds of a step; None if a phase has no cost or was not compiled."""
    costs = {phase.name: phase.cost for phase in self.phases if not phase.refused}
    steps = [costs.get(phase.name) for phase in self.programs.phases if phase.calls]
    if len(costs) < len(self.programs.phases) or not all(steps):
      return None
    return sum(cost.seconds for cost in steps if cost)

  @property
  def tokens_per_second(self) -> float | None:
    """Real tokens of a step, of prompts and responses, by its seconds."""
    return self.programs.tokens / self.step_seconds if self.step_seconds else None

  @property
  def update_mfu(self) -> float | None:
    """Model FLOPs of the updates on real tokens, as a share of the peak of all devices."""
    updates = [phase for phase in self.phases if phase.model_flops and phase.cost]
    seconds = sum(phase.cost.seconds for phase in updates if phase.cost)
    if not seconds:
      return None
    flops = sum(phase.model_flops for phase in updates)
    return flops / seconds / self.topology.count / self.topology.chip.flops


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
  check_micro_batch(s, job.name, mesh)
  programs = job.programs(s, network, mesh, topology.chip.memory, lengths)
  existing = [phase.name for phase in programs.phases]
  for name in names:
    if name not in existing:
      raise UserError(f'--phases: {name!r} is not one of {", ".join(existing)}.')
  phases = []
  for phase in programs.phases:
    if not names or phase.name in names:
      phases.append(phase_plan.plan_phase(phase, programs, mesh, topology, cache))
      log(f'{phase.name}: compiled in {phases[-1].compile_seconds:.0f} s', 'plan')
  plan = Plan(job, topology, programs, lengths, phases, job.items_per_step(s), [])
  if plan.fits:
    return plan
  compiled = suggestions.Measured(job, s, network, mesh, phases, topology.chip.memory, lengths)
  lines = suggestions.suggest_changes(compiled)
  return dataclasses.replace(plan, suggestions=lines)
