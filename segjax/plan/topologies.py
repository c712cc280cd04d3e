"""Topologies of chips to compile for.

A topology is written `v5p:2x2x2` (TPU), `cuda:8xH100-80GB`, `cuda:8x8xH100-80GB` (eight nodes of
eight), or `cpu:8`. libtpu compiles programs for TPUs without a TPU, and jax's CUDA plugin programs
for GPUs without a GPU.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from segjax.errors import UserError
from segjax.model.chips import CHIPS, GIB, Chip
from segjax.plan import cuda_compiler

_FLAT = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SLICES = {
  'v5e': _FLAT,
  'v6e': _FLAT,
  'v5p': ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8'),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A number of equal chips.

  Attributes:
    name: as a user writes it.
    nodes: over which the chips are spread; between nodes the links are slower.
  """

  name: str
  chip: Chip
  count: int
  nodes: int = 1

  @property
  def is_tpu(self) -> bool:
    """Whether the chips are TPUs."""
    return self.chip.name in _SLICES

  @property
  def is_cuda(self) -> bool:
    """Whether the chips are GPUs."""
    return self.chip.name in cuda_compiler.TARGETS


def parse(name: str) -> Topology:
  """Returns the topology of a name; UserError lists the supported names."""
  kind, _, shape = name.partition(':')
  if kind in _SLICES and shape in _SLICES[kind]:
    return Topology(name, CHIPS[kind], math.prod(map(int, shape.split('x'))))
  if kind == 'cpu' and re.fullmatch('[1-9][0-9]*', shape):
    return Topology(name, CHIPS['cpu'], int(shape))
  match = re.fullmatch(r'(?:([1-9][0-9]*)x)?([1-9][0-9]*)x(.+)', shape)
  if kind == 'cuda' and match and match[3] in cuda_compiler.TARGETS:
    nodes = int(match[1] or 1)
    return Topology(name, CHIPS[match[3]], nodes * int(match[2]), nodes)
  raise UserError(f'topology {name!r} does not exist; use one of\n{_supported()}')


def _supported() -> str:
  lines = []
  for kind, shapes in _SLICES.items():
    sizes = ', '.join(f'{s} ({math.prod(map(int, s.split("x")))})' for s in shapes)
    lines.append(f'  {kind}:{sizes} chips of {CHIPS[kind].memory / GIB:.2f} GiB')
  for name in cuda_compiler.TARGETS:
    lines.append(f'  cuda:Nx{name} N chips of {CHIPS[name].memory / GIB:.1f} GiB')
  return '\n'.join([*lines, '  cpu:N N devices of this machine'])


def prepare(topology: Topology) -> None:
  """Sets what jax reads when it first looks for devices; call it before that.

  Raises:
    UserError: the compiler for these chips is not installed.
  """
  if topology.is_tpu and importlib.util.find_spec('libtpu') is None:
    raise UserError(
      f'{topology.name} needs libtpu, which compiles for TPUs on any machine; '
      "install it by pip install -e '.[plan]'"
    )
  if topology.is_cuda:
    cuda_compiler.check_installed(topology.name)
  import jax

  # The compilers need no device, and jax must not look for one.
  jax.config.update('jax_platforms', 'cpu')
  if topology.is_tpu:
    os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
    os.environ['TPU_ACCELERATOR_TYPE'] = _accelerator_type(topology)
    # libtpu locks the chips of a machine for one process; to compile, none is needed.
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  if topology.is_cuda:
    cuda_compiler.prepare()
  if topology.is_tpu or topology.is_cuda:
    # jax cannot read programs for absent devices back, and would warn about each.
    jax.config.update('jax_enable_compilation_cache', False)
  else:
    flag = f'--xla_force_host_platform_device_count={topology.count}'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()


def _accelerator_type(topology: Topology) -> str:
  cores = 2 if topology.chip.name == 'v5p' else 1
  name = {'v5e': 'v5litepod'}.get(topology.chip.name, topology.chip.name)
  return f'{name}-{topology.count * cores}'


def devices(topology: Topology) -> list[Any]:
  """Returns the devices to compile for, after `prepare`."""
  import jax
  from jax.experimental import topologies

  if topology.is_tpu:
    description = topologies.get_topology_desc(platform='tpu', topology_name=topology.name)
    return list(description.devices)
  if topology.is_cuda:
    per_node = topology.count // topology.nodes
    return cuda_compiler.devices(topology.chip.name, topology.nodes, per_node)
  if len(jax.devices()) < topology.count:
    raise UserError(
      f'{topology.name} needs {topology.count} devices, and jax has {len(jax.devices())}; start '
      'one process per topology.'
    )
  return jax.devices()[: topology.count]
