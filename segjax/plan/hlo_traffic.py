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

from segjax.plan import hlo
from segjax.plan.hlo import Computation, Instruction, Program, num_bytes

_COLLECTIVES = {
  *('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute'),
  *('collective-broadcast', 'ragged-all-to-all'),
}
# They move nothing, or what they move is counted elsewhere.
_FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all'),
  *('partition-id', 'replica-id', 'opt-barrier', 'domain', 'add-dependency'),
}
_NESTED = {'while', 'call', 'conditional', 'async-start'}
# What only copies or casts; in a fusion also an update that is not done in place.
_MOVING = {
  *('copy', 'copy-start', 'transpose', 'concatenate', 'slice', 'dynamic-slice', 'pad', 'reverse'),
  *('reshape', 'bitcast', 'convert', 'parameter', 'constant', 'tuple', 'dynamic-update-slice'),
}
_COMPUTING = {
  *('dot', 'convolution', 'reduce', 'reduce-window', 'gather', 'scatter', 'sort', 'custom-call'),
}
_PART = {'dynamic-slice', 'slice', 'gather'}  # they read as much as they return
_UPDATE = {'dynamic-update-slice': 1, 'scatter': -1}  # to the operand that is written
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
    self._nodes, self._pages, self._cache = nodes, pages or {}, cache
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
        copied += times * self._written(computation, instruction)
      for kind, size, crosses in self._collectives(computation, instruction):
        counts[kind, crosses] += times
        sizes[kind, crosses] += times * size
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
    if instruction.opcode in _FREE or instruction.opcode.endswith(('-done', '-update')):
      return 0, 0
    written = self._written(computation, instruction)
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
      size = self._read(instruction, number, operand)
      if (
        _state(computation, name)
        or self._is_copy(computation, hlo.viewed(computation, operand))
        or num_bytes(operand.type) > self._cache
      ):
        main += size
      else:
        cached += size
    return main, cached

  def _written(self, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == 'fusion':
      return _written_by_fusion(self._program.computations[instruction.called[0]], instruction)
    if instruction.opcode in _UPDATE:
      return num_bytes(computation[instruction.operands[_UPDATE[instruction.opcode]]].type)
    sizes = [size for _, size in hlo.arrays(instruction.type)]
    if instruction.opcode == 'copy-start':  # (result, operand, context)
      return sizes[0]
    if instruction.opcode in ('all-gather-start', 'collective-permute-start'):
      # (operands, results): the operands are not written.
      return sum(sizes) - sum(num_bytes(computation[name].type) for name in instruction.operands)
    return sum(sizes)

  def _read(self, instruction: Instruction, number: int, operand: Instruction) -> int:
    """Returns the bytes that an instruction reads of one of its operands."""
    size = num_bytes(operand.type)
    if instruction.opcode == 'fusion':
      fused = self._program.computations[instruction.called[0]]
      return min(size, self._read_through(fused, hlo.parameter(fused, number)))
    if instruction.opcode in _PART:
      return min(size, num_bytes(instruction.type))
    if instruction.opcode in _UPDATE and number == 0:
      return 0
    if instruction.opcode == 'custom-call':
      shape = next((shape for shape, _ in hlo.arrays(operand.type)), '')
      return self._pages.get(shape, size)
    return size

  def _read_through(self, fused: Computation, source: Instruction) -> int:
    """Returns the bytes that the instructions of a fusion read of one of them."""
    total = 0
    for user in (i for i in fused.values() if source.name in i.operands):
      number = user.operands.index(source.name)
      if user.opcode in hlo.VIEWS or self._is_view(user, number):
        total += self._read_through(fused, user)
      elif user.opcode != 'tuple':
        total += self._read(user, number, source)
    return total

  def _is_view(self, instruction: Instruction, number: int) -> bool:
    """Whether a fusion in a fusion returns one of its operands as it is, or in other tiles."""
    if instruction.opcode != 'fusion':
      return False
    fused = self._program.computations[instruction.called[0]]
    root = hlo.viewed(fused, hlo.root(fused))
    if root.opcode == 'copy':  # done for what is read of its result, as int8 weights are on TPUs
      root = hlo.viewed(fused, fused[root.operands[0]])
    return root is hlo.parameter(fused, number)

  def _is_copy(self, computation: Computation, instruction: Instruction) -> bool:
    """Whether an instruction copies, slices or casts an argument, or what a loop carries."""
    inside = self._opcodes(instruction)
    if inside & (_COMPUTING | _COLLECTIVES) or instruction.opcode in _FREE | _NESTED:
      return False
    if self._written(computation, instruction) < _SMALL or self._is_update(instruction):
      return False
    states = [_state(computation, name) for name in instruction.operands]
    large = [state for state in states if state and num_bytes(state.type) >= _SMALL]
    if inside <= _MOVING:
      return bool(large)
    # Elementwise work on what no step changes is a copy too: a cast, another scale.
    return any(_is_constant(computation, state) for state in large)

  def _is_update(self, instruction: Instruction) -> bool:
    """Whether an instruction updates an array in place."""
    if instruction.opcode != 'fusion':
      return instruction.opcode in _UPDATE
    fused = self._program.computations[instruction.called[0]]
    return _written_by_fusion(fused, instruction) < num_bytes(instruction.type)

  def _opcodes(self, instruction: Instruction) -> set[str]:
    """Returns the opcodes inside an instruction; arithmetic on scalars does not count."""
    if instruction.opcode != 'fusion':
      return {instruction.opcode}
    fused = self._program.computations[instruction.called[0]].values()
    return set().union(*(self._opcodes(part) for part in fused if re.search(r'\[\d', part.type)))

  def _collectives(
    self, computation: Computation, instruction: Instruction
  ) -> Iterator[tuple[str, int, bool]]:
    """Yields (kind, bytes, whether it crosses nodes) of the collectives in an instruction."""
    kind = instruction.opcode.removesuffix('-start')
    if kind in _COLLECTIVES:
      groups = hlo.device_groups(instruction.attributes, len(self._nodes))
      operands = [computation[name].type for name in instruction.operands]
      size = sum(num_bytes(operand, everywhere=True) for operand in operands)
      size *= len(groups[0]) if kind == 'all-gather' else 1
      yield kind, size, any(len({self._nodes[i] for i in group}) > 1 for group in groups)
    elif instruction.opcode == 'fusion':
      fused = self._program.computations[instruction.called[0]]
      for part in fused.values():
        yield from self._collectives(fused, part)


def _written_by_fusion(fused: Computation, fusion: Instruction) -> int:
  """Returns the bytes that a fusion writes; of arrays that it updates in place, the update."""
  root = hlo.root(fused)
  results = [fused[name] for name in root.operands] if root.opcode == 'tuple' else [root]
  sizes = [size for _, size in hlo.arrays(fusion.type)]
  if len(sizes) != len(results):
    return sum(sizes)
  return sum(
    min(size, _updated_bytes(fused, result)) for size, result in zip(sizes, results, strict=True)
  )


def _updated_bytes(fused: Computation, result: Instruction) -> int:
  result = hlo.viewed(fused, result)
  if result.opcode in _UPDATE:
    result = fused[result.operands[_UPDATE[result.opcode]]]
  return num_bytes(result.type)


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
