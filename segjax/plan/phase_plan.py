"""Plans one phase: the memory that it needs on a device, and what it costs in a step."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from segjax.model.chips import GIB
from segjax.plan import abstract_arrays
from segjax.plan.phase_cost import PhaseCost
from segjax.plan.phases import Calls, JobPrograms, Phase, lower_phase
from segjax.plan.program_figures import ProgramFigures, find_figures
from segjax.plan.topologies import Topology


@dataclasses.dataclass(frozen=True)
class PhasePlan:
  """What a phase needs of one device; sizes in bytes.

  Attributes:
    aliased: the part of the outputs that is written over arguments.
    resident: what lives on the device during the phase and is not an argument.
    compile_seconds: of the compiler, for all shapes of the program.
    refused: why the program cannot fit: the message of the compiler, which gives no figures then,
      or that of a run.
    cost: of a step; None outside of steps, for chips of unknown speed, and where there is no
      program.
    model_flops: see `Phase`.
  """

  name: str
  arguments: int
  temporaries: int
  outputs: int
  aliased: int
  resident: int
  compile_seconds: float
  refused: str = ''
  cost: PhaseCost | None = None
  model_flops: float | int = 0

  @property
  def peak(self) -> int:
    """The largest number of bytes in use at once."""
    # Aliased outputs are counted among the arguments already.
    return self.resident + self.arguments + self.temporaries + self.outputs - self.aliased


def plan_phase(
  phase: Phase, programs: JobPrograms, mesh: Mesh, topology: Topology, cache: Path | None
) -> PhasePlan:
  """Compiles a phase, or reads from `cache` the results of compiling the same programs.

  Memory is that of the longest texts, or of the drawn ones if these need more.
  """
  if phase.function is None:
    nothing = ProgramFigures()
    return _phase_plan(phase, nothing, nothing, None, 0)
  devices = (phase.mesh or mesh).devices.flat
  nodes = [device.process_index if topology.is_cuda else 0 for device in devices]

  def figures(arguments, calls: Calls | None):
    return find_figures(lower_phase(phase, mesh, arguments), calls, topology, nodes, cache)

  calls = phase.calls() if phase.calls else None
  if calls is None or calls.arguments is None:
    largest = drawn = figures(phase.arguments, calls)
  else:
    largest, drawn = figures(phase.arguments, None), figures(calls.arguments, calls)
  passed_in = sum(
    abstract_arrays.bytes_per_device(programs.trees[name]) for name in phase.passed_in
  )
  # Trees that are passed in are in the size of the arguments.
  cost = drawn.cost.times(calls.number) if drawn.cost and calls else None
  return _phase_plan(phase, largest, drawn, cost, live_bytes(phase, programs) - passed_in)


def _phase_plan(
  phase: Phase,
  largest: ProgramFigures,
  drawn: ProgramFigures,
  cost: PhaseCost | None,
  resident: int,
) -> PhasePlan:
  both = (largest,) if drawn is largest else (largest, drawn)
  fullest = max(both, key=lambda figures: figures.peak)
  return PhasePlan(
    phase.name,
    fullest.arguments,
    fullest.temporaries,
    fullest.outputs,
    fullest.aliased,
    resident,
    sum(figures.compile_seconds for figures in both),
    largest.refused or drawn.refused or phase.refused,
    cost,
    phase.model_flops,
  )


def live_bytes(phase: Phase, programs: JobPrograms) -> int:
  """Returns the bytes that live on a device during the phase, arguments included."""
  return sum(abstract_arrays.bytes_per_device(programs.trees[name]) for name in phase.live)


def in_gib(size: float | int) -> str:
  """Returns bytes as text in GiB."""
  return f'{size / GIB:.2f}'
