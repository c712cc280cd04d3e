"""What each phase takes of a device's memory, as its compiler says; measured once per program."""

import dataclasses
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.sharding import Mesh

from segjax.model.chips import GIB
from segjax.plan import abstract_arrays, programs
from segjax.plan.programs import JobPrograms, Phase
from segjax.plan.topologies import Topology


@dataclasses.dataclass(frozen=True)
class PhaseMemory:
  """One device's memory in one phase, bytes.

  Attributes:
    beside: what lives meanwhile and is no argument.
    aliased: of the outputs, what is written where an argument was.
    seconds: that the compiler took.
    refused: its message where it found that the program cannot fit; the other figures are 0 then.
  """

  name: str
  arguments: int
  temporaries: int
  outputs: int
  aliased: int
  beside: int
  seconds: float
  refused: str = ''

  @property
  def peak(self) -> int:
    return self.beside + self.arguments + self.temporaries + self.outputs - self.aliased


def measure(
  phase: Phase, program: JobPrograms, mesh: Mesh, topology: Topology, cache: Path | None
) -> PhaseMemory:
  """Compiles a phase, or finds in `cache` what compiling the same program said."""
  lowered = programs.lowered(phase, mesh)
  file = cache / f'{_fingerprint(lowered, topology)}.json' if cache else None
  if file and file.exists():
    found = json.loads(file.read_text(encoding='utf-8'))
  else:
    found = _compile(lowered)
    if file:
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(json.dumps(found), encoding='utf-8')
  passed = sum(abstract_arrays.bytes_per_device(program.held[name]) for name in phase.passed)
  return PhaseMemory(name=phase.name, beside=held_bytes(phase, program) - passed, **found)


def held_bytes(phase: Phase, program: JobPrograms) -> int:
  """What lives on a device during the phase, its arguments among it."""
  return sum(abstract_arrays.bytes_per_device(program.held[name]) for name in phase.alive)


def _compile(lowered: Any) -> dict[str, Any]:
  began = time.time()
  empty = dict.fromkeys(('arguments', 'temporaries', 'outputs', 'aliased'), 0)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    message = re.sub(r'\s+', ' ', str(error)).partition('RESOURCE_EXHAUSTED: ')[2]
    return empty | {'seconds': time.time() - began, 'refused': message[:200]}
  found = compiled.memory_analysis()
  return {
    'arguments': found.argument_size_in_bytes,
    'temporaries': found.temp_size_in_bytes,
    'outputs': found.output_size_in_bytes,
    'aliased': found.alias_size_in_bytes,
    'seconds': time.time() - began,
  }


def _fingerprint(lowered: Any, topology: Topology) -> str:
  """Of the program and of what compiles it."""
  versions = [jax.__version__, jaxlib.__version__]
  if topology.is_tpu:
    from importlib.metadata import PackageNotFoundError, version

    try:
      versions.append(version('libtpu'))
    except PackageNotFoundError:
      versions.append('libtpu')
  text = '\n'.join([topology.name, *versions, lowered.as_text()])
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def in_gib(size: float | int) -> str:
  """Bytes as GiB."""
  return f'{size / GIB:.2f}'
