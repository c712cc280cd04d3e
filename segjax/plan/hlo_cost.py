"""The cost of one run of a compiled program on one device: arithmetic, memory, exchanges, seconds.

Seconds are the length of the program's own schedule by list simulation. Instructions run one after
another, each as long as the slower of its arithmetic and its memory traffic at the rates of
`model.chips`. A collective that the schedule starts and waits for later runs beside them, and so do
the prefetches of a TPU; the collectives of a device run one after another, and so do prefetches.
Nothing is charged for starting a kernel or for the latency of a link.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from segjax.model.chips import Chip
from segjax.plan import hlo, hlo_collectives, hlo_flops
from segjax.plan.hlo import Computation, Instruction
from segjax.plan.hlo_bytes import BytesReader
from segjax.plan.hlo_collectives import Exchange


@dataclasses.dataclass(frozen=True)
class Collectives:
  """The collectives of one kind in one run of a program, on one device.

  Attributes:
    bytes: of their operands; for all-gather of the results.
    seconds: that they take alone.
    crosses_nodes: whether devices of different nodes take part in one.
  """

  kind: str
  crosses_nodes: bool
  number: int
  bytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class ProgramCost:
  """What one run of a program costs one device.

  Attributes:
    flops: operations of matrix products, those of attention included.
    attention_flops: the part of `flops` in attention kernels.
    bytes: read from and written to the main memory.
    exposed: seconds for which the device waits for a collective.
    seconds: of the run.
  """

  flops: float = 0.0
  attention_flops: float = 0.0
  bytes: int = 0
  collectives: tuple[Collectives, ...] = ()
  exposed: float = 0.0
  seconds: float = 0.0

  @property
  def collective_seconds(self) -> float:
    """Seconds that the collectives take."""
    return sum((c.seconds for c in self.collectives), 0.0)


def program_cost(
  text: str,
  chip: Chip,
  nodes: Sequence[int],
  trips: int = 1,
  *,
  pages: Mapping[str, int] | None = None,
  attended: float = 0.5,
) -> ProgramCost:
  """Returns what one run of a compiled program costs one device.

  Args:
    text: of the compiled program.
    nodes: the node of each device, in the order of the mesh.
    trips: iterations of loops whose number is not known before they run.
    pages: what a kernel of paged attention reads of its arrays, see `hlo_bytes.BytesReader`.
    attended: share of the pairs of positions that a kernel of attention on packed rows computes,
      see `hlo_flops.attention`.
  """
  return _Reader(text, chip, nodes, trips, pages, attended).cost


class _Schedule:
  """The clock of a device while it runs a computation, and when its other work is done.

  Prefetches have the part of the memory's bandwidth that instructions leave: their time stands
  still while an instruction is bound by memory.
  """

  def __init__(self):
    self.clock = self.exposed = 0.0
    self._link = 0.0  # when the collectives so far are done
    self._taken = 0.0  # seconds of the memory that instructions took
    self._prefetched = 0.0  # when the prefetches so far are done, on a clock without these seconds
    self._ends: dict[str, tuple[float, bool]] = {}

  def compute(self, arithmetic: float, memory: float) -> None:
    """Advances the clock by an instruction that takes these seconds."""
    self.clock += max(arithmetic, memory)
    self._taken += memory

  def start(self, name: str, seconds: float, *, is_collective: bool) -> None:
    """Starts a collective or a prefetch, which runs beside the instructions."""
    if is_collective:
      end = self._link = max(self.clock, self._link) + seconds
    else:
      end = self._prefetched = max(self.clock - self._taken, self._prefetched) + seconds
    self._ends[name] = end, is_collective

  def follow(self, name: str, start: str) -> None:
    """Lets an instruction stand for an earlier one whose work it goes on with."""
    if start in self._ends:
      self._ends[name] = self._ends[start]

  def wait(self, start: str) -> None:
    """Advances the clock to the end of what was started."""
    end, is_collective = self._ends.pop(start, (0.0, False))
    if not is_collective:
      end += self._taken
    left = max(0.0, end - self.clock)
    self.exposed += left if is_collective else 0.0
    self.clock += left


class _Reader:
  """Adds up the costs of a program's computations."""

  def __init__(
    self,
    text: str,
    chip: Chip,
    nodes: Sequence[int],
    trips: int,
    pages: Mapping[str, int] | None,
    attended: float,
  ):
    self._program = hlo.parse(text)
    self._chip, self._nodes, self._trips, self._attended = chip, nodes, trips, attended
    self._memory = BytesReader(self._program, pages)
    self.cost = self._run(self._program.entry)

  @functools.cache  # noqa: B019 - the reader does not outlive its cost
  def _run(self, name: str) -> ProgramCost:
    """Returns the cost of running a computation once, on an idle device."""
    computation = self._program.computations[name]
    schedule = _Schedule()
    parts = [self._step(schedule, computation, instruction) for instruction in computation.values()]
    total = _total((cost, 1) for cost in parts)
    return dataclasses.replace(
      total, exposed=total.exposed + schedule.exposed, seconds=schedule.clock
    )

  def _step(
    self, schedule: _Schedule, computation: Computation, instruction: Instruction
  ) -> ProgramCost:
    """Runs one instruction on the schedule; returns its cost."""
    if instruction.opcode.endswith('-done'):
      schedule.wait(instruction.operands[0])
    elif instruction.opcode.endswith('-update'):
      schedule.follow(instruction.name, instruction.operands[0])
    elif instruction.opcode in ('while', 'call', 'conditional'):
      cost = self._nested(instruction)
      schedule.compute(cost.seconds, 0.0)
      return cost
    else:
      return self._single(schedule, computation, instruction)
    return ProgramCost()

  def _nested(self, instruction: Instruction) -> ProgramCost:
    branches = [self._run(called) for called in instruction.called]
    cost = max(branches, key=lambda branch: branch.seconds)  # one branch of a conditional runs
    if instruction.opcode != 'while':
      return cost
    trips = self._program.trip_count(instruction)
    return _total([(cost, self._trips if trips is None else trips)])

  def _single(
    self, schedule: _Schedule, computation: Computation, instruction: Instruction
  ) -> ProgramCost:
    memory = self._memory.moved(computation, instruction)
    exchanged = list(
      hlo_collectives.exchanges(self._program, computation, instruction, self._nodes)
    )
    collectives = tuple(
      Collectives(e.kind, e.crosses_nodes, 1, e.bytes, self._seconds(e)) for e in exchanged
    )
    kernel = hlo_flops.attention(computation, instruction, self._attended)
    products = hlo_flops.products(self._program, computation, instruction)
    rates = self._chip.rates
    busy = kernel / rates.attention + products / rates.products
    seconds = memory / self._chip.sustained_bandwidth
    part, channel = hlo_collectives.piece(self._program, instruction)
    if part == 'done':
      schedule.wait(channel)
    elif collectives:
      name = channel or instruction.name
      schedule.compute(busy, 0.0)
      schedule.start(name, sum(c.seconds for c in collectives), is_collective=True)
      is_waited_for_later = instruction.opcode.endswith('-start') or part == 'start'
      if not is_waited_for_later or '"is_sync":true' in instruction.attributes:
        schedule.wait(name)
    elif instruction.opcode.endswith('-start'):
      schedule.start(instruction.name, max(busy, seconds), is_collective=False)
    else:
      schedule.compute(busy, seconds)
    return ProgramCost(kernel + products, kernel, memory, collectives)

  def _seconds(self, exchange: Exchange) -> float:
    """Returns the time of a ring: each device passes on all parts but one."""
    rates = self._chip.rates
    rate = rates.link
    if exchange.crosses_nodes:
      # The devices of a node share the traffic of the group between nodes.
      rate = min(rates.link, exchange.per_node * rates.network)
    share = (exchange.devices - 1) / exchange.devices
    passes = {'all-reduce': 2 * share, 'collective-permute': 1.0, 'collective-broadcast': 1.0}
    return exchange.bytes * passes.get(exchange.kind, share) / rate


def _total(parts: Iterator[tuple[ProgramCost, int]] | list[tuple[ProgramCost, int]]) -> ProgramCost:
  """Returns the sum of costs, each as often as it occurs."""
  flops = attention = exposed = seconds = 0.0
  memory = 0
  counts: Counter[tuple[str, bool]] = Counter()
  sizes: Counter[tuple[str, bool]] = Counter()
  times: Counter[tuple[str, bool]] = Counter()
  for cost, n in parts:
    flops, attention = flops + n * cost.flops, attention + n * cost.attention_flops
    exposed, seconds = exposed + n * cost.exposed, seconds + n * cost.seconds
    memory += n * cost.bytes
    for c in cost.collectives:
      key = c.kind, c.crosses_nodes
      counts[key] += n * c.number
      sizes[key] += n * c.bytes
      times[key] += n * c.seconds  # type: ignore[assignment]
  collectives = [Collectives(*key, counts[key], sizes[key], times[key]) for key in counts]
  collectives.sort(key=lambda c: -c.seconds)
  return ProgramCost(flops, attention, memory, tuple(collectives), exposed, seconds)
