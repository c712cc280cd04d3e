"""Measures the memory that each phase needs on a device, by compiling each program once."""

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
from segjax.plan import abstract_arrays
from segjax.plan.programs import JobPrograms, Phase, lower_phase
from segjax.plan.topologies import Topology


@dataclasses.dataclass(frozen=True)
class PhaseMemory:
  """The memory of one device in one phase, in bytes.

  Attributes:
    aliased: the part of the outputs that is written over arguments.
    resident: what lives on the device during the phase and is not an argument.
    seconds: compile time.
    refused: the compiler's message if the program cannot fit; the other figures are 0 then.
  """

  name: str
  arguments: int
  temporaries: int
  outputs: int
  aliased: int
  resident: int
  seconds: float
  refused: str = ''

  @property
  def peak(self) -> int:
    """The largest number of bytes in use at once."""
    # Aliased outputs are counted among the arguments already.
    return self.resident + self.arguments + self.temporaries + self.outputs - self.aliased


def measure(
  phase: Phase, program: JobPrograms, mesh: Mesh, topology: Topology, cache: Path | None
) -> PhaseMemory:
  """Compiles a phase, or reads from `cache` the result of compiling the same program."""
  # Lowered on a hit too: the text of the program is the key of the cache.
  lowered = lower_phase(phase, mesh)
  file = cache / f'{_fingerprint(lowered, topology)}.json' if cache else None
  if file and file.exists():
    sizes = json.loads(file.read_text(encoding='utf-8'))
  else:
    sizes = _compile(lowered)
    if file:
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(json.dumps(sizes), encoding='utf-8')
  passed_in = sum(abstract_arrays.bytes_per_device(program.trees[name]) for name in phase.passed_in)
  # Trees that are passed in are in the size of the arguments.
  return PhaseMemory(name=phase.name, resident=live_bytes(phase, program) - passed_in, **sizes)


def live_bytes(phase: Phase, program: JobPrograms) -> int:
  """Returns the bytes that live on a device during the phase, arguments included."""
  return sum(abstract_arrays.bytes_per_device(program.trees[name]) for name in phase.live)


def _compile(lowered: Any) -> dict[str, Any]:
  began = time.monotonic()
  empty = dict.fromkeys(('arguments', 'temporaries', 'outputs', 'aliased'), 0)
  try:
    compiled = abstract_arrays.compile_program(lowered)
  except jax.errors.JaxRuntimeError as error:
    if not abstract_arrays.is_out_of_memory(error):
      raise
    # Its first sentences; a table of allocations follows them.
    message = re.sub(r'\s+', ' ', str(error)).partition('RESOURCE_EXHAUSTED: ')[2]
    return empty | {'seconds': time.monotonic() - began, 'refused': message[:200]}
  analysis = compiled.memory_analysis()
  return {
    'arguments': analysis.argument_size_in_bytes,
    'temporaries': analysis.temp_size_in_bytes,
    'outputs': analysis.output_size_in_bytes,
    'aliased': analysis.alias_size_in_bytes,
    'seconds': time.monotonic() - began,
  }


def _fingerprint(lowered: Any, topology: Topology) -> str:
  """Returns a hash of the program and of the compiler's versions."""
  versions = [jax.__version__, jaxlib.__version__]
  if topology.is_tpu:
    from importlib.metadata import PackageNotFoundError, version

    try:
      versions.append(version('libtpu'))
    except PackageNotFoundError:
      versions.append('libtpu')
  # Another compiler may schedule the same program with other temporaries.
  text = '\n'.join([topology.name, *versions, lowered.as_text()])
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def in_gib(size: float | int) -> str:
  """Returns bytes as text in GiB."""
  return f'{size / GIB:.2f}'
