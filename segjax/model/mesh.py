"""The device mesh: its axes, its sizes, and what must divide over it.

Axes: `data` replicates the weights, `fsdp` splits weights and batch, `tensor` splits heads, MLP
width and vocabulary. The batch is split over data and fsdp together. Where arrays live on the mesh
is `sharding`.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from segjax.errors import UserError

# By rising traffic: `jax.make_mesh` gives the last axis the closest devices. Tensor exchanges
# activations in every layer, data little more than gradients.
AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Any = None) -> Mesh:
  """Makes the device mesh; one axis may be -1 and takes the devices that the others leave.

  Raises:
    UserError: the product of the axes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
    raise UserError(f'mesh={sizes}: axes must be positive, and at most one -1 (the rest).')
  fixed = math.prod(size for size in sizes if size > 0)
  # A remainder is caught by the product below.
  sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
  if math.prod(sizes) != len(devices):
    raise UserError(
      f'mesh data x fsdp x tensor = {" x ".join(map(str, sizes))} does not use the {len(devices)} '
      'devices exactly; set one axis to -1 to take what the others leave.'
    )
  # Not Explicit, the default: it refuses a lookup in a split embedding and split contractions.
  axis_types = (AxisType.Auto,) * 3
  try:
    return jax.make_mesh(tuple(sizes), AXES, axis_types=axis_types, devices=devices)
  except NotImplementedError:
    # No axis is a product of axes of the slice, as 2 on 4x4x8: each lies on a part of one then.
    arranged = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=axis_types)


def over_all_devices(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the first axis of an array over all devices."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def decode_mesh(mesh: Mesh, heads: int, kv_heads: int, tensor: int = 0) -> Mesh:
  """Returns the mesh of a decode loop: the same devices in the same order, without fsdp.

  Each group of `tensor` devices that are next to each other holds one copy of the weights, split by
  heads, MLP width and vocabulary, and decodes its own rows; `data` is the number of groups.

  Args:
    mesh: of training.
    heads: query heads of the network.
    kv_heads: key heads of the network.
    tensor: devices of a group; 0 for as many as divide the key heads, and the devices that hold one
      copy of the weights in training, without leaving a process.

  Raises:
    UserError: heads or devices do not divide by `tensor`; the message names numbers that do.
  """
  sizes = mesh_sizes(mesh)
  shared = math.gcd(heads, kv_heads, sizes.fsdp * sizes.tensor)
  # Weights cross from one mesh to the other in blocks: of the two sizes, one divides the other.
  fits = [
    n for n in range(1, shared + 1) if shared % n == 0 and 0 in (n % sizes.tensor, sizes.tensor % n)
  ]
  if tensor and tensor not in fits:
    raise UserError(
      f'rollout.tensor={tensor} does not divide the {heads} query and {kv_heads} key heads of the '
      f'network and the mesh, fsdp x tensor = {sizes.fsdp} x {sizes.tensor}; use one of '
      f'{", ".join(map(str, fits))}.'
    )
  devices = mesh.devices.reshape(-1)
  if not tensor:
    # Every step sums activations over a group, which is slow between nodes.
    tensor = max(n for n in fits if n == 1 or not _leaves_process(devices.reshape(-1, n)))
  devices = devices.reshape(-1, 1, tensor)
  return Mesh(devices, AXES, axis_types=mesh.axis_types)


def _leaves_process(groups: Any) -> bool:
  """Returns whether a group of devices [G, T] needs the network between nodes."""
  # The chips of a TPU slice are connected, whichever process has them. A process with one device
  # says nothing of its neighbours.
  if groups.flat[0].platform == 'tpu':
    # Devices of a single slice, and those that are only compiled for, have no such index.
    return any(len({getattr(device, 'slice_index', 0) for device in group}) > 1 for group in groups)
  if len({device.process_index for device in groups.flat}) == groups.size:
    return False
  return any(len({device.process_index for device in group}) > 1 for group in groups)


class MeshSizes(NamedTuple):
  """Number of devices along each axis."""

  data: int
  fsdp: int
  tensor: int


def mesh_sizes(mesh: Mesh) -> MeshSizes:
  """Returns the number of devices along each axis of the mesh."""
  return MeshSizes(*(mesh.shape[axis] for axis in AXES))


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
  """Returns over how many devices the batch is split; every global batch is a multiple of it."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(what: str, size: int, mesh: Mesh) -> None:
  """Raises UserError, naming sizes that fit, unless `size` rows divide over the mesh."""
  parts = batch_devices(mesh)
  if size % parts:
    # JAX has no uneven shards: the message names the nearest sizes that fit.
    below = size // parts * parts
    fits = f'{below} or {below + parts}' if below else str(parts)
    raise UserError(
      f'{what} does not divide over the {parts} devices of the mesh axes data and fsdp; use {fits}.'
    )


def check_heads(heads: int, kv_heads: int, mesh: Mesh) -> None:
  """Raises UserError unless query and key heads divide over the tensor axis."""
  parts = mesh.shape['tensor']
  # `sharding` drops axes that do not divide: every device would then compute all heads.
  if heads % parts or kv_heads % parts:
    raise UserError(
      f'mesh.tensor={parts} does not divide the {heads} query and {kv_heads} key heads of '
      f'the network; use a divisor of {math.gcd(heads, kv_heads)}.'
    )
