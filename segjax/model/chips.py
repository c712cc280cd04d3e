"""Memory, FLOP/s and bandwidths of devices, by the vendors' figures."""

import dataclasses
import math

from segjax.heap import GPU_SHARE

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Rates:
  """What large programs sustain on one device: measured on an H100, assumed of other chips.

  Attributes:
    products: FLOP/s of matrix products in bfloat16.
    attention: FLOP/s of a fused attention kernel.
    memory: share of the memory's bandwidth.
    link: bytes/s that it sends to devices of its node, or of its slice.
    network: bytes/s that it sends to devices of other nodes.
  """

  products: float
  attention: float
  memory: float
  link: float
  network: float


@dataclasses.dataclass(frozen=True)
class Chip:
  """Specification of one device.

  Attributes:
    memory: bytes that programs may use.
    flops: dense bfloat16 FLOP/s.
    bandwidth: of its memory, bytes/s.
    link: bytes/s that it can send to other devices.
    rates: what programs sustain of it.
  """

  name: str
  memory: float | int
  flops: float
  bandwidth: float
  link: float
  rates: Rates

  @property
  def sustained_bandwidth(self) -> float:
    """Bytes/s that large programs read and write."""
    return self.rates.memory * self.bandwidth


# Measured on one H100 SXM: products are the mean over policy updates of 6 layers of 8B, within the
# power limit (one product alone reaches 800); kernels of `model.flash_kernels` and of cuDNN, both
# ways, in rows of 2,048 tokens; a copy has 89 % of the memory's bandwidth. Not measured: NCCL's
# collectives reach 80 % of NVLink and of a 400 Gb/s InfiniBand port for each GPU.
_HOPPER = Rates(690e12, 380e12, 0.89, 360e9, 40e9)
# FlashAttention-2 (https://arxiv.org/abs/2307.08691, figure 4); a 200 Gb/s port for each GPU.
_AMPERE = Rates(220e12, 170e12, 0.89, 240e9, 20e9)


def _tpu(flops: float, link: float) -> Rates:
  """Returns what programs sustain of a TPU with this FLOP/s, and bytes/s one way on one link."""
  # Products near the compiler's own estimates of cycles (scoring: 80 % of peak on v5e, 89 % on
  # v5p), and half of it in an attention kernel. A ring along one axis of the torus uses the links
  # in both directions (https://jax-ml.github.io/scaling-book/sharded has one-way bandwidths).
  return Rates(0.8 * flops, 0.4 * flops, 1.0, 2 * link, 2 * link)


# TPU: cloud.google.com/tpu/docs/v5p, v5e, v6e; memory as the compiler reports it.
# GPU: the vendor's data sheets (SXM, dense), and the share of the memory that runs take.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v5e', 15.75 * GIB, 197e12, 0.819e12, 0.2e12, _tpu(197e12, 45e9)),
    Chip('v5p', 95.74 * GIB, 459e12, 2.765e12, 0.6e12, _tpu(459e12, 90e9)),
    Chip('v6e', 31.25 * GIB, 918e12, 1.64e12, 0.448e12, _tpu(918e12, 90e9)),
    Chip('A100-80GB', GPU_SHARE * 80e9, 312e12, 2.039e12, 0.3e12, _AMPERE),
    Chip('H100-80GB', GPU_SHARE * 80e9, 989e12, 3.35e12, 0.45e12, _HOPPER),
    Chip('H200-141GB', GPU_SHARE * 141e9, 989e12, 4.8e12, 0.45e12, _HOPPER),
    Chip('cpu', math.inf, *[math.nan] * 3, Rates(*[math.nan] * 5)),
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
