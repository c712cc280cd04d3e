"""The exchanges between devices in a compiled program.

A TPU runs some of them piece by piece: one fusion starts the collective, fusions with other work go
on with it, and another one ends it. All of them contain it, with the same channel.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from segjax.plan import hlo
from segjax.plan.hlo import Computation, Instruction, Program, num_bytes

COLLECTIVES = {
  *('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute'),
  *('collective-broadcast', 'ragged-all-to-all'),
}


@dataclasses.dataclass(frozen=True)
class Exchange:
  """One collective, on one device.

  Attributes:
    bytes: of its operands; for all-gather of the results.
    devices: that take part in one exchange.
    per_node: the smallest number of them in a node where one is.
    crosses_nodes: whether devices of different nodes take part.
  """

  kind: str
  bytes: int
  devices: int
  per_node: int
  crosses_nodes: bool


def exchanges(
  program: Program, computation: Computation, instruction: Instruction, nodes: Sequence[int]
) -> Iterator[Exchange]:
  """Yields the collectives in an instruction, which may be a fusion or run asynchronously.

  Args:
    nodes: the node of each device, in the order of the mesh.
  """
  kind = instruction.opcode.removesuffix('-start')
  if kind in COLLECTIVES:
    groups = hlo.device_groups(instruction.attributes, len(nodes))
    operands = [computation[name].type for name in instruction.operands]
    size = sum(num_bytes(operand, everywhere=True) for operand in operands)
    size *= len(groups[0]) if kind == 'all-gather' else 1
    counts = [_per_node(group, nodes) for group in groups]
    crosses = any(len(count) > 1 for count in counts)
    per_node = min(min(count) for count in counts if len(count) > 1 or not crosses)
    yield Exchange(kind, size, len(groups[0]), per_node, crosses)
  elif instruction.is_fusion or instruction.opcode in ('async-start', 'custom-call'):
    if piece(program, instruction)[0] in ('step', 'done'):
      return
    for name in instruction.called:
      inside = program.computations[name]
      for part in inside.values():
        yield from exchanges(program, inside, part, nodes)


def piece(program: Program, instruction: Instruction) -> tuple[str, str]:
  """Returns the part of a collective that a fusion of a TPU runs, and the collective's channel.

  The part is 'start', 'step' or 'done'; of other instructions both are empty.
  """
  if not instruction.is_fusion:
    return '', ''
  fused = program.computations[instruction.called[0]].values()
  attributes = [part.attributes for part in fused]
  channels = [match[1] for text in attributes if (match := re.search(r'channel_id=(\d+)', text))]
  if not channels:
    return '', ''
  for role in ('Start', 'Done'):
    if any(f'"AsyncCollective{role}"' in text for text in attributes):
      return role.lower(), channels[0]
  is_step = instruction.called[0].startswith('async_collective_fusion')
  return ('step', channels[0]) if is_step else ('', '')


def _per_node(group: list[int], nodes: Sequence[int]) -> list[int]:
  """Returns how many devices of a group each of its nodes has."""
  members = [nodes[device] for device in group]
  return [members.count(node) for node in set(members)]
