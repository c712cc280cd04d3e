"""Reads the text of a compiled program: its computations, instructions, shapes and device groups.

The text is what `compiled.as_text()` returns, of programs for CUDA, TPU and CPU alike. What the
instructions cost is in `hlo_traffic`.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

VIEWS = {'bitcast', 'reshape'}  # in a fusion they move nothing
_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16, 'f16': 16}
_ARRAY = re.compile(r'\b(pred|bf16|[fsuc]\d+(?:e\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_NAME = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r'\s*([\w\-]+)\(')
# Groups have three forms: lists, an iota, axes of a mesh. An iota [a,b]T(1,0) is the numbers 0, 1,
# ... in an array [a, b], transposed.
_IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'
_MESH_GROUPS = re.compile(
  rf'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{_IOTA}|([\d,]+))\))? \{{([^}}]*)\}}'
)
_CALLED = re.compile(
  r'(?:calls|to_apply|body|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)'
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation.

  Attributes:
    type: of the result, as the text has it.
    operands: names of instructions of the same computation.
    attributes: the rest of the line.
    literal: the number of a parameter or the value of a constant, as text.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool
  literal: str = ''

  @property
  def is_fusion(self) -> bool:
    """Whether it is a fusion, or starts one that ends at another instruction, as on CUDA."""
    return self.opcode in ('fusion', 'fusion-start')

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it runs; for a loop the body alone."""
    if match := re.search(r'branch_computations=\{([^}]*)\}', self.attributes):
      return tuple(name.strip().lstrip('%') for name in match[1].split(','))
    return tuple(_CALLED.findall(self.attributes))


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a program by name, and the name of the first that runs."""

  computations: dict[str, Computation]
  entry: str

  def trip_count(self, loop: Instruction) -> int | None:
    """Returns the iterations of a loop; None if they are not known before it runs."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(match[1])
    condition = re.search(r'condition=%?([\w.\-]+)', loop.attributes)
    if condition is None:
      return None
    # TPU: a counter from 0 that is compared with a constant.
    tested = self.computations[condition[1]]
    test = root(tested)
    if test.opcode != 'compare' or 'direction=LT' not in test.attributes:
      return None
    counter, limit = (tested[name] for name in test.operands)
    if limit.opcode != 'constant':
      return None
    return -(-int(limit.literal) // self._increment(loop, counter))

  def _increment(self, loop: Instruction, counter: Instruction) -> int:
    """Returns what an iteration adds to the counter of a loop; an unrolled loop adds more than 1.

    Args:
      counter: the element of the loop's state, in the computation of its condition.
    """
    index = re.search(r'index=(\d+)', counter.attributes)
    body = self.computations[loop.called[0]]
    if index is None or root(body).opcode != 'tuple':
      return 1
    added = body[root(body).operands[int(index[1])]]
    steps = [body[name] for name in added.operands if body[name].opcode == 'constant']
    return int(steps[0].literal) if added.opcode == 'add' and steps else 1


def root(computation: Computation) -> Instruction:
  """Returns the instruction whose result is that of the computation."""
  return next(instruction for instruction in computation.values() if instruction.is_root)


def parameter(computation: Computation, number: int) -> Instruction:
  """Returns the parameter of this number."""
  return next(
    instruction
    for instruction in computation.values()
    if instruction.opcode == 'parameter' and instruction.literal == str(number)
  )


def viewed(fused: Computation, instruction: Instruction) -> Instruction:
  """Returns the instruction of a fusion whose bytes another one views under another shape."""
  while instruction.opcode in VIEWS:
    instruction = fused[instruction.operands[0]]
  return instruction


def step_loop(program: Program) -> Instruction:
  """Returns the loop over decode steps: the first whose number of iterations is not known.

  Where all are known it is the outermost.
  """
  entry = program.computations[program.entry]
  loops = [
    instruction
    for computation in (entry, *program.computations.values())
    for instruction in computation.values()
    if instruction.opcode == 'while'
  ]
  if not loops:
    raise ValueError('the program has no loop.')
  return next((loop for loop in loops if program.trip_count(loop) is None), loops[0])


def host_waits(program: Program) -> int:
  """Returns how many instructions of a program for GPUs have a condition that the host waits for.

  XLA copies the condition to the host, once for a branch and before each iteration of a loop, and
  the device runs empty meanwhile. A loop of known length has no such copies.
  """
  instructions = [i for c in program.computations.values() for i in c.values()]
  branches = sum(i.opcode == 'conditional' for i in instructions)
  loops = [i for i in instructions if i.opcode == 'while']
  return branches + sum(program.trip_count(loop) is None for loop in loops)


def parse(text: str) -> Program:
  """Parses the text of a compiled program."""
  computations: dict[str, Computation] = {}
  entry, current = '', None
  for line in _joined_lines(text):
    if match := _HEADER.match(line):
      current = computations.setdefault(match[2], {})
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _NAME.match(line)):
      instruction = _parse_instruction(bool(match[1]), match[2], line[match.end() :])
      current[instruction.name] = instruction
  return Program(computations, entry)


def _joined_lines(text: str) -> Iterator[str]:
  """Yields headers and instructions; the metadata of a TPU kernel has line breaks of its own."""
  line = ''
  for part in text.splitlines():
    if _HEADER.match(part) or _NAME.match(part) or part == '}':
      yield line
      line = part
    else:
      line += part
  yield line


def _parse_instruction(is_root: bool, name: str, rest: str) -> Instruction:
  rest = re.sub(r'/\*.*?\*/', '', rest)  # the index in a long tuple
  # A tuple type has spaces and parentheses, also those of the tiles of a layout.
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  opcode = _OPCODE.match(rest, end)
  assert opcode, rest
  close = _closing(rest, opcode.end() - 1)
  operands = rest[opcode.end() : close]
  names = tuple(re.findall(r'%([\w.\-]+)', operands))
  literal = operands if opcode[1] in ('parameter', 'constant') else ''
  result = rest[:end]
  if opcode[1] == 'fusion-start':  # ((operands), result, context)
    result = result[_closing(result, 1) + 1 : result.rindex(',')].lstrip(', ')
  return Instruction(name, result, opcode[1], names, rest[close + 1 :], is_root, literal)


def _closing(text: str, begin: int) -> int:
  """Returns the index of the parenthesis that closes the one at `begin`."""
  depth = 0
  for index in range(begin, len(text)):
    depth += (text[index] == '(') - (text[index] == ')')
    if not depth:
      return index
  raise ValueError(f'no closing parenthesis: {text}')


def arrays(type_text: str, *, everywhere: bool = False) -> list[tuple[str, int]]:
  """Returns (shape such as 'bf16[8,128]', bytes) of each array of a type.

  Args:
    everywhere: False counts bytes in the main memory of the device alone: arrays that a TPU keeps
      in its vector memory have a memory space S(n) in their layout.
  """
  result = []
  for dtype, dims, layout in _ARRAY.findall(type_text):
    bits = _BITS.get(dtype) or int(re.findall(r'\d+', dtype)[0])
    size = math.prod(int(dim) for dim in dims.split(',') if dim) * bits // 8
    result.append((f'{dtype}[{dims}]', size if everywhere or 'S(' not in layout else 0))
  return result


def num_bytes(type_text: str, *, everywhere: bool = False) -> int:
  """Returns the bytes of all arrays of a type; see `arrays`."""
  return sum(size for _, size in arrays(type_text, everywhere=everywhere))


def device_groups(attributes: str, count: int) -> list[list[int]]:
  """Returns the groups of devices among which a collective exchanges data.

  Args:
    attributes: of the instruction.
    count: devices of the program; they are numbered in the order of the mesh.
  """
  if match := re.search(r'source_target_pairs=\{([\d,{}]*)\}', attributes):
    return [_integers(pair) for pair in re.findall(r'\d+,\d+', match[1])]
  if match := re.search(r'replica_groups=\{(\{[\d,{}]*\})\}', attributes):
    return [_integers(group) for group in re.findall(r'\{([\d,]+)\}', match[1])]
  if match := re.search(rf'replica_groups=\[([\d,]+)\]<={_IOTA}', attributes):
    return _iota(match[2], match[3]).reshape(_integers(match[1])).tolist()
  if match := _MESH_GROUPS.search(attributes):
    return _groups_of_mesh(*match.groups())
  return [list(range(count))]


def _integers(text: str | None) -> list[int]:
  return [int(number) for number in re.findall(r'\d+', text or '')]


def _iota(dims: str, order: str | None) -> np.ndarray:
  """Returns 0, 1, ... as an array of these dimensions, transposed."""
  numbers = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
  return numbers.transpose(_integers(order)) if order else numbers


def _groups_of_mesh(
  mesh: str, dims: str | None, order: str | None, ids: str | None, axes: str
) -> list[list[int]]:
  """Returns the groups of devices along some axes of a mesh.

  Args:
    mesh: such as 'a'=2,'b'=4.
    dims: of the iota that has the devices of the mesh.
    order: its transposition.
    ids: the devices themselves, where they are no iota.
    axes: such as 'a','b':(2)2, the part of b with 2 entries before it and 2 of its own.
  """
  sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", mesh)}
  numbers = (
    np.array(_integers(ids)) if ids else _iota(dims or str(math.prod(sizes.values())), order)
  )
  grouped: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
  for name, before, size in re.findall(r"('[^']*')(?::\((\d+)\)(\d+))?", axes):
    begin = int(before or 1)
    grouped[name].append((begin, begin * int(size or sizes[name])))
  shape, inside = [], []
  for name, size in sizes.items():
    cuts = sorted({1, size, *(cut for part in grouped[name] for cut in part)})
    for begin, end in itertools.pairwise(cuts):
      shape.append(end // begin)
      inside.append(any(first <= begin and end <= last for first, last in grouped[name]))
  # A stable sort: the dimensions of a group come last.
  numbers = numbers.reshape(shape).transpose(np.argsort(inside, kind='stable'))
  members = math.prod(size for size, is_inside in zip(shape, inside, strict=True) if is_inside)
  return numbers.reshape(-1, members).tolist()
