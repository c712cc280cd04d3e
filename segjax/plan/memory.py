"""Measures the memory that each phase needs on a device, by compiling each program once."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.sharding import Mesh

from segjax.model.chips import GIB
from segjax.plan import abstract_arrays
from segjax.plan.phases import JobPrograms, Phase, lower_phase
from segjax.plan.topologies import Topology

_NOTHING = dict.fromkeys(('arguments', 'temporaries', 'outputs', 'aliased'), 0)


@dataclasses.dataclass(frozen=True)
class PhaseMemory:
  """The memory of one device in one phase, in bytes.

  Attributes:
    aliased: the part of the outputs that is written over arguments.
    resident: what lives on the device during the phase and is not an argument.
    seconds: compile time.
    refused: why the program cannot fit: the message of the compiler, which gives no figures then,
      or that of a run.
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
  if phase.function is None:
    return PhaseMemory(phase.name, **_NOTHING, resident=0, seconds=0.0, refused=phase.refused)
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
  resident = live_bytes(phase, program) - passed_in
  sizes['refused'] = sizes.get('refused') or phase.refused
  return PhaseMemory(name=phase.name, resident=resident, **sizes)


def live_bytes(phase: Phase, program: JobPrograms) -> int:
  """Returns the bytes that live on a device during the phase, arguments included."""
  return sum(abstract_arrays.bytes_per_device(program.trees[name]) for name in phase.live)


def _compile(lowered: Any) -> dict[str, Any]:
  began = time.monotonic()
  try:
    compiled = abstract_arrays.compile_program(lowered)
  except jax.errors.JaxRuntimeError as error:
    if not (message := abstract_arrays.refusal(error)):
      raise
    return _NOTHING | {'seconds': time.monotonic() - began, 'refused': message}
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
