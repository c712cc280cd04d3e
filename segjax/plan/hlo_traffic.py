"""What a step of a decode program moves: bytes read and written, bytes copied, collectives.

Counted from the text of the compiled program: each instruction reads its operands and writes its
result once. Of an operand that a fusion slices, the slice counts; of an array that is updated in
place, the update. Pages that a kernel of paged attention reads are counted by live positions,
because the kernel stops at the length of each row.

Weights, keys and values come from the main memory of a device. Results that the next instruction
reads stay on a GPU in its L2 cache, where they fit; they are added up on their own.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from segjax.plan import hlo, hlo_collectives
from segjax.plan.hlo import Computation, Instruction, Program, num_bytes
from segjax.plan.hlo_bytes import FREE, UPDATE, BytesReader, is_free
from segjax.plan.hlo_collectives import COLLECTIVES

_NESTED = {'while', 'call', 'conditional', 'async-start'}
# What only copies or casts; in a fusion also an update that is not done in place.
_MOVING = {
  *('copy', 'copy-start', 'transpose', 'concatenate', 'slice', 'dynamic-slice', 'pad', 'reverse'),
  *('reshape', 'bitcast', 'convert', 'parameter', 'constant', 'tuple', 'dynamic-update-slice'),
}
_COMPUTING = {
  *('dot', 'convolution', 'reduce', 'reduce-window', 'gather', 'scatter', 'sort', 'custom-call'),
}
_SMALL = 2**18  # bytes; copies below it are of tokens and page tables


@dataclasses.dataclass(frozen=True)
class Collective:
  """The collectives of one kind, on one device.

  Attributes:
    bytes: of their operands; for all-gather of the results.
    number: how often one runs.
    crosses_nodes: whether devices of different nodes take part in one.
  """

  kind: str
  bytes: int
  number: int
  crosses_nodes: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What a device moves, in bytes.

  Attributes:
    moved: read from and written to the main memory.
    copied: written by copies of weights, keys or values, and counted in `moved` too.
    cached: read from and written to the L2 cache of a GPU.
  """

  moved: int
  copied: int
  cached: int
  collectives: list[Collective]


class TrafficReader:
  """Adds up what a compiled program moves."""

  def __init__(
    self, text: str, nodes: list[int], pages: Mapping[str, int] | None = None, cache: int = 0
  ):
    """Parses the program.

    Args:
      text: of the compiled program.
      nodes: the node of each device, in the order of the mesh.
      pages: shape of an array of pages on one device, such as 'bf16[8,920,64,128]', to the bytes of
        it that one call of a kernel reads.
      cache: bytes of the device's L2 cache; 0 for TPUs, whose programs name the memory.
    """
    self._program: Program = hlo.parse(text)
    self._memory = BytesReader(self._program, pages)
    self._nodes, self._cache = nodes, cache
    self._loop = hlo.step_loop(self._program)

  def step(self) -> Traffic:
    """Returns the traffic of one iteration of the loop over steps."""
    return self._traffic(self._loop.called[0])

  def outside(self) -> Traffic:
    """Returns the traffic of the program before and after the loop over steps."""
    return self._traffic(self._program.entry)

  def _traffic(self, name: str) -> Traffic:
    moved = copied = cached = 0
    counts: Counter[tuple[str, bool]] = Counter()
    sizes: Counter[tuple[str, bool]] = Counter()
    for times, computation, instruction in self._run(name):
      in_memory, in_cache = self._bytes(computation, instruction)
      moved, cached = moved + times * in_memory, cached + times * in_cache
      if self._is_copy(computation, instruction):
        copied += times * self._memory.written(computation, instruction)
      program = self._program
      for e in hlo_collectives.exchanges(program, computation, instruction, self._nodes):
        counts[e.kind, e.crosses_nodes] += times
        sizes[e.kind, e.crosses_nodes] += times * e.bytes
    collectives = [Collective(kind, sizes[kind, x], n, x) for (kind, x), n in counts.items()]
    return Traffic(moved, copied, cached, sorted(collectives, key=lambda c: -c.bytes))

  def _run(self, name: str) -> Iterator[tuple[int, Computation, Instruction]]:
    """Yields (how often it runs, its computation, instruction) of a computation and its loops."""
    computation = self._program.computations[name]
    for instruction in computation.values():
      if instruction is self._loop:
        continue
      if instruction.opcode not in _NESTED:
        yield 1, computation, instruction
        continue
      times = self._program.trip_count(instruction) or 1 if instruction.opcode == 'while' else 1
      branches = [list(self._run(called)) for called in instruction.called]
      # Of a conditional one branch runs: the one that moves most.
      for n, inside, part in max(branches, key=self._total):
        yield times * n, inside, part

  def _total(self, branch: list[tuple[int, Computation, Instruction]]) -> int:
    return sum(n * sum(self._bytes(inside, part)) for n, inside, part in branch)

  def _bytes(self, computation: Computation, instruction: Instruction) -> tuple[int, int]:
    """Returns the bytes that an instruction reads and writes in the (main memory, L2 cache)."""
    if is_free(instruction):
      return 0, 0
    written = self._memory.written(computation, instruction)
    is_main = (
      self._is_copy(computation, instruction)
      or written < num_bytes(instruction.type)  # an update of what the loop carries
      or written > self._cache
    )
    main, cached = (written, 0) if is_main else (0, written)
    for number, name in enumerate(instruction.operands):
      if name in instruction.operands[:number]:  # what occurs twice is read once
        continue
      operand = computation[name]
      size = self._memory.read(instruction, number, operand)
      if (
        _state(computation, name)
        or self._is_copy(computation, hlo.viewed(computation, operand))
        or num_bytes(operand.type) > self._cache
      ):
        main += size
      else:
        cached += size
    return main, cached

  def _is_copy(self, computation: Computation, instruction: Instruction) -> bool:
    """Whether an instruction copies, slices or casts an argument, or what a loop carries."""
    inside = self._opcodes(instruction)
    if inside & (_COMPUTING | COLLECTIVES) or instruction.opcode in FREE | _NESTED:
      return False
    written = self._memory.written(computation, instruction)
    is_update = instruction.opcode in UPDATE or (
      instruction.is_fusion and written < num_bytes(instruction.type)
    )
    if written < _SMALL or is_update:
      return False
    states = [_state(computation, name) for name in instruction.operands]
    large = [state for state in states if state and num_bytes(state.type) >= _SMALL]
    if inside <= _MOVING:
      return bool(large)
    # Elementwise work on what no step changes is a copy too: a cast, another scale.
    return any(_is_constant(computation, state) for state in large)

  def _opcodes(self, instruction: Instruction) -> set[str]:
    """Returns the opcodes inside an instruction; arithmetic on scalars does not count."""
    if not instruction.is_fusion:
      return {instruction.opcode}
    fused = self._program.computations[instruction.called[0]].values()
    return set().union(*(self._opcodes(part) for part in fused if re.search(r'\[\d', part.type)))


def _state(computation: Computation, name: str) -> Instruction | None:
  """Returns the argument or element of a loop's state that an operand is; None if computed."""
  instruction = computation[name]
  while instruction.opcode in ('bitcast', 'copy-done', 'opt-barrier'):
    instruction = computation[instruction.operands[0]]
  if instruction.opcode == 'get-tuple-element':
    state = computation[instruction.operands[0]]
    return instruction if state.opcode == 'parameter' else None
  return instruction if instruction.opcode == 'parameter' else None


def _is_constant(computation: Computation, source: Instruction) -> bool:
  """Whether an argument, or an element of a loop's state, is the same in every iteration."""
  root = hlo.root(computation)
  match = re.search(r'index=(\d+)', source.attributes)
  if root.opcode != 'tuple' or match is None:
    return True
  return root.operands[int(match[1])] == source.name
