"""What the compiler says of one program, kept from plan to plan: its memory and its cost."""

import dataclasses
import functools
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jaxlib

from segjax.plan import abstract_arrays, hlo_cost
from segjax.plan.phase_cost import PhaseCost, cost_of_call
from segjax.plan.phases import Calls
from segjax.plan.topologies import Topology


@dataclasses.dataclass(frozen=True)
class ProgramFigures:
  """Memory of a program in bytes, and its cost.

  Attributes:
    aliased: the part of the outputs that is written over arguments.
    compile_seconds: of the compiler.
    refused: the compiler's message if the program cannot fit; the other figures are 0 then.
    cost: of one call; None where it is not counted.
  """

  arguments: int = 0
  temporaries: int = 0
  outputs: int = 0
  aliased: int = 0
  compile_seconds: float = 0.0
  refused: str = ''
  cost: PhaseCost | None = None

  @property
  def peak(self) -> int:
    """The largest number of bytes that the program has at once."""
    # Aliased outputs are counted among the arguments already.
    return self.arguments + self.temporaries + self.outputs - self.aliased


def find_figures(
  lowered: Any, calls: Calls | None, topology: Topology, nodes: list[int], cache: Path | None
) -> ProgramFigures:
  """Compiles a program, or reads from `cache` the result of compiling the same program.

  Args:
    lowered: the program. Its text is the key of the cache.
    calls: as which its cost is counted; None if it is not.
    topology: to compile for.
    nodes: the node of each device, in the order of the mesh.
    cache: directory of the results; None for none.
  """
  if math.isnan(topology.chip.flops):
    calls = None
  file = cache / f'{_fingerprint(lowered, calls, topology)}.json' if cache else None
  if file and file.exists():
    record = json.loads(file.read_text(encoding='utf-8'))
    cost = record.pop('cost')
    return ProgramFigures(**record, cost=cost and PhaseCost(**cost))
  figures = _compile(lowered, calls, topology, nodes)
  if file:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(figures)), encoding='utf-8')
  return figures


def _compile(
  lowered: Any, calls: Calls | None, topology: Topology, nodes: list[int]
) -> ProgramFigures:
  began = time.monotonic()
  try:
    compiled, text = abstract_arrays.compile_with_text(lowered, topology)
  except jax.errors.JaxRuntimeError as error:
    if not (message := abstract_arrays.refusal(error)):
      raise
    return ProgramFigures(compile_seconds=time.monotonic() - began, refused=message)
  seconds, analysis = time.monotonic() - began, compiled.memory_analysis()
  cost = None
  if calls is not None:
    program = hlo_cost.program_cost(
      text,
      topology.chip,
      nodes,
      calls.trips,
      pages=calls.pages,
      attended=calls.attended,
    )
    cost = cost_of_call(program)
  return ProgramFigures(
    analysis.argument_size_in_bytes,
    analysis.temp_size_in_bytes,
    analysis.output_size_in_bytes,
    analysis.alias_size_in_bytes,
    seconds,
    cost=cost,
  )


def _fingerprint(lowered: Any, calls: Calls | None, topology: Topology) -> str:
  """Returns a hash of the program, of the compiler's versions, and of how costs are counted."""
  versions = [jax.__version__, jaxlib.__version__]
  if topology.is_tpu:
    from importlib.metadata import PackageNotFoundError, version

    try:
      versions.append(version('libtpu'))
    except PackageNotFoundError:
      versions.append('libtpu')
  counted = ''
  if calls is not None:
    counted = f'{calls.trips} {calls.pages} {calls.attended} {topology.chip} {_readers()}'
  # Another compiler may schedule the same program with other temporaries.
  text = '\n'.join([topology.name, *versions, counted, lowered.as_text()])
  return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _readers() -> str:
  """Returns a hash of the code that reads costs in compiled programs."""
  files = sorted(Path(__file__).parent.glob('hlo*.py'))
  return hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()
