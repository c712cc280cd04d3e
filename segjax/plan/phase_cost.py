"""What the phases of a step cost a device, and what a step does in that time."""

import dataclasses

from segjax.model.chips import Chip
from segjax.plan.hlo_cost import ProgramCost


@dataclasses.dataclass(frozen=True)
class PhaseCost:
  """What a phase costs one device, all its calls in a step together.

  Attributes:
    calls: number of calls.
    flops: of matrix products and attention.
    attention_flops: the part of `flops` in attention kernels.
    bytes: read from and written to the main memory.
    exchanged: bytes of the operands of collectives.
    exchange_seconds: that the collectives take.
    exposed: the part of it in which the device waits for them.
    seconds: of the calls one after another.
  """

  calls: float | int
  flops: float | int
  attention_flops: float | int
  bytes: float | int
  exchanged: float | int
  exchange_seconds: float | int
  exposed: float | int
  seconds: float | int

  def times(self, number: float | int) -> 'PhaseCost':
    """Returns the cost of so many times the calls."""
    return PhaseCost(*(number * x for x in dataclasses.astuple(self)))

  @property
  def hidden(self) -> float:
    """The share of the collectives' time in which the device does other work; 1 without any."""
    seconds = self.exchange_seconds
    return max(0.0, 1 - self.exposed / seconds) if seconds else 1.0  # rounding may exceed it

  def bound(self, chip: Chip) -> str:
    """Returns what takes the largest part of the time at the rates of the chip; '' for no time."""
    rates = chip.rates
    products = self.flops - self.attention_flops
    parts = {
      'arithmetic': products / rates.products + self.attention_flops / rates.attention,
      'memory': self.bytes / chip.sustained_bandwidth,
      'links': self.exposed,
    }
    return max(parts, key=lambda name: parts[name]) if self.seconds else ''


def cost_of_call(program: ProgramCost) -> PhaseCost:
  """Returns the cost of a phase that calls a program once."""
  return PhaseCost(
    1,
    program.flops,
    program.attention_flops,
    program.bytes,
    sum(c.bytes for c in program.collectives),
    program.collective_seconds,
    program.exposed,
    program.seconds,
  )
