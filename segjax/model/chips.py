"""Memory, FLOP/s and bandwidths of devices, by the vendors' figures."""

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Specification of one device.

  Attributes:
    memory: bytes that programs may use.
    flops: dense bfloat16 FLOP/s.
    bandwidth: of its memory, bytes/s.
    link: bytes/s that it can send to other devices.
  """

  name: str
  memory: float | int
  flops: float
  bandwidth: float
  link: float


# TPU: cloud.google.com/tpu/docs/v5p, v5e, v6e; memory as the compiler reports it.
# GPU: the vendor's data sheets (SXM, dense); 92 % of the memory, a usual value of
# XLA_PYTHON_CLIENT_MEM_FRACTION.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v5e', 15.75 * GIB, 197e12, 0.819e12, 0.2e12),
    Chip('v5p', 95.74 * GIB, 459e12, 2.765e12, 0.6e12),
    Chip('v6e', 31.25 * GIB, 918e12, 1.64e12, 0.448e12),
    Chip('A100-80GB', 0.92 * 80e9, 312e12, 2.039e12, 0.3e12),
    Chip('H100-80GB', 0.92 * 80e9, 989e12, 3.35e12, 0.45e12),
    Chip('H200-141GB', 0.92 * 141e9, 989e12, 4.8e12, 0.45e12),
    Chip('cpu', math.inf, math.nan, math.nan, math.nan),
  )
}

# Prefixes of jax's `device_kind`, longer ones first: 'TPU v5' matches 'TPU v5 lite' too.
_KINDS = (
  ('TPU v5 lite', 'v5e'),
  ('TPU v5e', 'v5e'),
  ('TPU v6 lite', 'v6e'),
  ('TPU v6e', 'v6e'),
  ('TPU v5', 'v5p'),
  ('NVIDIA H200', 'H200-141GB'),
  ('NVIDIA H100', 'H100-80GB'),
  ('NVIDIA A100', 'A100-80GB'),
)


def chip_for_kind(device_kind: str) -> Chip | None:
  """Returns the chip of a jax `device_kind`; None for kinds that are not listed."""
  return next((CHIPS[name] for kind, name in _KINDS if device_kind.startswith(kind)), None)
