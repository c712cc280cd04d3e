"""Compiles programs for GPUs on a machine that has none, by the compiler of jax's CUDA plugin.

The compiler asks the driver what a GPU is like. Where there is none, it has to be told: by a
target, and, for the attention of cuDNN, by two functions of jax.
"""

import dataclasses
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from segjax.errors import UserError

_PLUGINS = ('jax_cuda13_plugin', 'jax_cuda12_plugin')
_CUDNN = (9, 12)  # version that programs are compiled for; any with the attention that jax calls


@dataclasses.dataclass(frozen=True)
class Target:
  """What the compiler must know of a GPU, by the vendor's specification.

  Attributes:
    capability: (major, minor) CUDA compute capability.
    cores: streaming multiprocessors.
    lanes: float32 units of each.
    shared_memory: bytes of each; `block_memory` of them for one block.
    cache: bytes of L2 cache.
    clock: GHz.
    memory: bytes.
    bandwidth: of the memory, bytes/s.
  """

  description: str
  capability: tuple[int, int]
  cores: int
  lanes: int
  shared_memory: int
  block_memory: int
  cache: int
  clock: float
  memory: int
  bandwidth: int


_HOPPER = Target(
  'NVIDIA H100 80GB HBM3',
  capability=(9, 0),
  cores=132,
  lanes=128,
  shared_memory=228 * 1024,
  block_memory=227 * 1024,
  cache=50 * 2**20,
  clock=1.98,
  memory=84_978_434_048,
  bandwidth=3_352_320_000_000,
)
TARGETS = {
  'A100-80GB': Target(
    'NVIDIA A100-SXM4-80GB',
    capability=(8, 0),
    cores=108,
    lanes=64,
    shared_memory=164 * 1024,
    block_memory=163 * 1024,
    cache=40 * 2**20,
    clock=1.41,
    memory=85_100_068_864,
    bandwidth=2_039_040_000_000,
  ),
  'H100-80GB': _HOPPER,
  'H200-141GB': dataclasses.replace(
    _HOPPER,
    description='NVIDIA H200',
    memory=151_397_597_184,
    bandwidth=4_800_000_000_000,
  ),
}


def check_installed(topology: str) -> None:
  """Raises UserError unless `is_installed`."""
  if not is_installed():
    raise UserError(
      f"{topology} needs jax's CUDA plugin and ptxas, which compile for GPUs on any Linux machine; "
      "install them by pip install -e '.[plan]'."
    )


def is_installed() -> bool:
  """Returns whether jax's CUDA plugin and the assembler that it calls are installed."""
  return any(importlib.util.find_spec(name) for name in _PLUGINS) and _has_assembler()


def _has_assembler() -> bool:
  spec = importlib.util.find_spec('nvidia')  # a namespace of NVIDIA's packages
  folders = (spec and spec.submodule_search_locations) or ()
  is_packaged = any(list(Path(folder).glob('*/bin/ptxas')) for folder in folders)
  return is_packaged or shutil.which('ptxas') is not None


def prepare() -> None:
  """Sets up jax to compile without a GPU; call it before jax looks for devices."""
  # By default XLA times kernels on the GPU and takes the fastest; 0 leaves it to its cost model.
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_autotune_level=0'.strip()
  # These would ask the driver.
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  major, minor = _CUDNN
  cudnn.check_cudnn_version = lambda: major * 10_000 + minor * 100
  cudnn.check_compute_capability = lambda _: True


def devices(chip: str, nodes: int, per_node: int) -> list[Any]:
  """Returns descriptions of GPUs, node after node."""
  from jax.experimental import topologies

  description = topologies.get_topology_desc(
    platform='cuda',
    topology_name=chip,
    target_config=target_text(TARGETS[chip]),
    topology=f'1x{nodes}x{per_node}',
  )
  return list(description.devices)


def target_text(target: Target) -> str:
  """Returns a target as the text of XLA's message GpuTargetConfigProto."""
  major, minor = target.capability
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_core: {target.shared_memory}
  shared_memory_per_block_optin: {target.block_memory}
  threads_per_core_limit: 2048
  core_count: {target.cores}
  fpus_per_core: {target.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {target.bandwidth}
  l2_cache_size: {target.cache}
  clock_rate_ghz: {target.clock}
  device_memory_size: {target.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{target.description}"
"""
