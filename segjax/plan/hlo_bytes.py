"""Bytes of the main memory that one instruction of a compiled program reads and writes.

An instruction reads its operands and writes its result once. Of an operand that a fusion slices,
the slice counts; of an array that is updated in place, the update. Arrays that a TPU keeps in its
vector memory cost nothing.
"""

from collections.abc import Mapping

from segjax.plan import hlo
from segjax.plan.hlo import Computation, Instruction, Program, num_bytes
from segjax.plan.hlo_collectives import COLLECTIVES

# They move nothing, or what they move is counted elsewhere.
FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all'),
  *('partition-id', 'replica-id', 'opt-barrier', 'domain', 'add-dependency'),
}
UPDATE = {'dynamic-update-slice': 1, 'scatter': -1}  # to the operand that is written
_PART = {'dynamic-slice', 'slice', 'gather'}  # they read as much as they return
# Their result repeats the operands, which are not written.
_WITH_OPERANDS = {'all-gather-start', 'reduce-scatter-start', 'collective-permute-start'}


def is_free(instruction: Instruction) -> bool:
  """Whether an instruction moves nothing of its own."""
  return instruction.opcode in FREE or instruction.opcode.endswith(('-done', '-update'))


class BytesReader:
  """Counts what the instructions of a program read and write."""

  def __init__(self, program: Program, pages: Mapping[str, int] | None = None):
    """Keeps the program.

    Args:
      program: whose computations the instructions call.
      pages: shape of an array of pages on one device, such as 'bf16[8,920,64,128]', to the bytes of
        it that one call of a kernel reads.
    """
    self._program, self._pages = program, pages or {}

  def moved(self, computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes that an instruction reads and writes."""
    if is_free(instruction):
      return 0
    if instruction.opcode == 'async-start':
      inside = self._program.computations[instruction.called[0]]
      return sum(self.moved(inside, part) for part in inside.values())
    names = instruction.operands
    numbers = [i for i, name in enumerate(names) if name not in names[:i]]  # read once
    reads = (self.read(instruction, i, computation[names[i]]) for i in numbers)
    return self.written(computation, instruction) + sum(reads)

  def written(self, computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes that an instruction writes."""
    if instruction.is_fusion:
      return _written_by_fusion(self._program.computations[instruction.called[0]], instruction)
    if instruction.opcode in UPDATE:
      return num_bytes(computation[instruction.operands[UPDATE[instruction.opcode]]].type)
    sizes = [size for _, size in hlo.arrays(instruction.type)]
    if instruction.opcode == 'copy-start':  # (result, operand, context)
      return sizes[0]
    if instruction.opcode in _WITH_OPERANDS:
      return sum(sizes) - sum(num_bytes(computation[name].type) for name in instruction.operands)
    return sum(sizes)

  def read(self, instruction: Instruction, number: int, operand: Instruction) -> int:
    """Returns the bytes that an instruction reads of one of its operands."""
    size = num_bytes(operand.type)
    if instruction.is_fusion:
      fused = self._program.computations[instruction.called[0]]
      return min(size, self._read_through(fused, hlo.parameter(fused, number)))
    if instruction.opcode in _PART:
      return min(size, num_bytes(instruction.type))
    if instruction.opcode in UPDATE and number == 0:
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
        total += self.read(user, number, source)
    return total

  def _is_view(self, instruction: Instruction, number: int) -> bool:
    """Whether a fusion in a fusion returns one of its operands as it is, or in other tiles."""
    if not instruction.is_fusion:
      return False
    fused = self._program.computations[instruction.called[0]]
    root = hlo.viewed(fused, hlo.root(fused))
    if root.opcode == 'copy':  # done for what is read of its result, as int8 weights are on TPUs
      root = hlo.viewed(fused, fused[root.operands[0]])
    return root is hlo.parameter(fused, number)


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
  """Returns the bytes of a fusion's result that it writes, if not all of them."""
  result = hlo.viewed(fused, result)
  # What a step of an asynchronous collective passes on, see `hlo_collectives`.
  is_passed_on = result.opcode in {'parameter', *COLLECTIVES}
  if is_passed_on or '"AsyncCollectiveDone"' in result.attributes:
    return 0
  if result.opcode in UPDATE:
    result = fused[result.operands[UPDATE[result.opcode]]]
  return num_bytes(result.type)
