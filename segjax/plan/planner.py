"""The plan of a job, printed: memory and time of every phase, and what would make it fit."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from segjax.config.settings import Settings
from segjax.errors import UserError
from segjax.hf import reader
from segjax.jobs import pipeline
from segjax.model.llama import LlamaConfig, make_config, num_parameters
from segjax.model.mesh import make_mesh
from segjax.plan import memory, programs, roofline, suggestions, topologies
from segjax.plan.memory import PhaseMemory, in_gib
from segjax.plan.programs import JobPrograms
from segjax.plan.topologies import Topology
from segjax.report.console import log, table


@dataclasses.dataclass(frozen=True)
class Plan:
  """What was found out about a job on a topology."""

  job: str
  topology: Topology
  program: JobPrograms
  measured: list[PhaseMemory]
  work: dict[str, roofline.PhaseCost]
  suggestions: list[str]
  prompts: int  # per step

  @property
  def fits(self) -> bool:
    return all(not m.refused and m.peak <= self.topology.chip.memory for m in self.measured)

  @property
  def peak(self) -> int:
    return max(found.peak for found in self.measured)

  @property
  def step_seconds(self) -> float:
    return sum(work.seconds(self.topology.chip) for work in self.work.values())


def make_plan(
  job: str, s: Settings, topology: Topology, names: tuple[str, ...] = (), cache: Path | None = None
) -> Plan:
  """Compiles the job's phases, or those of `names`, for the topology.

  Raises:
    ValueError: no such job or phase; sizes that are not known; batches that do not divide.
  """
  if job not in programs.JOBS:
    raise UserError(f'there is no plan for the job {job!r}, only for {", ".join(programs.JOBS)}.')
  network = _network(s)
  devices = topologies.devices(topology)
  mesh = make_mesh(s.mesh.data, s.mesh.fsdp, s.mesh.tensor, devices)
  pipeline.check_batches(job, s, mesh)
  program = programs.program(job, s, network, mesh)
  known = [phase.name for phase in program.phases]
  for name in names:
    if name not in known:
      raise UserError(f'--phases: {name!r} is not one of {", ".join(known)}.')
  measured = []
  for phase in program.phases:
    if not names or phase.name in names:
      measured.append(memory.measure(phase, program, mesh, topology, cache))
      log(f'{phase.name}: compiled in {measured[-1].seconds:.0f} s', 'plan')
  plan = Plan(job, topology, program, measured, _work(job, s, program, mesh), [], _prompts(job, s))
  if plan.fits:
    return plan
  found = suggestions.suggest_changes(job, s, network, mesh, measured, topology.chip.memory)
  return dataclasses.replace(plan, advice=found)


def _network(s: Settings) -> LlamaConfig:
  """Of the policy: from its directory if that is here, else config.network's sizes."""
  path = Path(s.policy.path).expanduser()
  if s.policy.path and path.is_dir():
    return reader.load_config(path)
  if not s.network.vocab_size:
    raise UserError(
      'the sizes of the network are not known: take a preset such as llama3_8b_sft, or give '
      '--config.policy.path a directory that is here.'
    )
  return make_config(s.network)


def _work(job: str, s: Settings, program: JobPrograms, mesh: Mesh) -> dict[str, roofline.PhaseCost]:
  if job == 'ppo':
    return roofline.ppo_step(s, program.networks, mesh)
  return roofline.update(job, s, program.networks, mesh)


def _prompts(job: str, s: Settings) -> int:
  return (
    s.ppo.rollout_batch_size // s.rollout.samples_per_prompt
    if job == 'ppo'
    else getattr(s, job).batch
  )


def show(plan: Plan) -> None:
  """Prints the plan."""
  chip, network = plan.topology.chip, next(iter(plan.program.networks.values()))
  log('')
  rows = [
    (
      found.name,
      f'{found.seconds:.0f}',
      *(in_gib(getattr(found, name)) for name in _COLUMNS),
      'refused' if found.refused else 'yes' if found.peak <= chip.memory else 'NO',
    )
    for found in plan.measured
  ]
  limit = '' if math.isinf(chip.memory) else f' of {in_gib(chip.memory)}'
  title = (
    f'{plan.job} on {plan.topology.name}, {plan.topology.count} devices, networks of '
    f'{num_parameters(network) / 1e9:.2f} B: GiB{limit} per device'
  )
  table(title, ('phase', 'compile s', *_COLUMNS, 'fits'), rows)
  if plan.topology.is_estimate:
    log('an estimate: compiled for CPU devices, which widen bfloat16 and know no flash attention')
  held = [(name, in_gib(size)) for name, size in plan.program.sizes().items()]
  table('What lives across phases', ('', 'GiB per device'), held)
  if not math.isnan(chip.flops):
    rows = [
      (name, f'{work.seconds(chip):.1f}', work.bound(chip)) for name, work in plan.work.items()
    ]
    title = "A step at 100 % of the chip's figures, texts as long as they may be: a lower bound"
    table(title, ('phase', 'seconds', 'bound by'), rows)
    rate = plan.prompts / plan.step_seconds * 3600
    days = roofline.PROMPTS / rate / 24
    what = 'prompts' if plan.job == 'ppo' else 'rows'
    log(
      f'{plan.step_seconds:.0f} s a step, {rate:,.0f} {what} an hour, '
      f'{days:.2f} days for {roofline.PROMPTS:,}'
    )
  for found in plan.measured:
    if found.refused:
      log(f'{found.name}: {found.refused}')
  for line in plan.advice:
    log(line)
  log('it fits' if plan.fits else 'it does NOT fit')


_COLUMNS = ('arguments', 'temporaries', 'outputs', 'aliased', 'beside', 'peak')


def as_json(plan: Plan) -> str:
  """The plan's figures, bytes and seconds."""
  chip = plan.topology.chip
  found: dict[str, Any] = {
    'job': plan.job,
    'topology': plan.topology.name,
    'devices': plan.topology.count,
    'is_estimate': plan.topology.is_estimate,
    'fits': plan.fits,
    'memory': None if math.isinf(chip.memory) else int(chip.memory),
    'phases': [dataclasses.asdict(m) | {'peak': m.peak} for m in plan.measured],
    'held': plan.program.sizes(),
    'advice': plan.advice,
  }
  if not math.isnan(chip.flops):
    found['roofline'] = {name: work.seconds(chip) for name, work in plan.work.items()}
    found['seconds_per_step'] = plan.step_seconds
  return json.dumps(found)
