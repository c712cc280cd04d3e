"""The device mesh: its axes, its sizes, and what must divide over it.

Axes: `data` replicates the weights, `fsdp` splits weights and batch, `tensor` splits heads, MLP
width and vocabulary. The batch is split over data and fsdp together. Where arrays live on the mesh
is `sharding`.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh

from segjax.errors import UserError

# By rising traffic: `jax.make_mesh` gives the last axis the closest devices. Tensor exchanges
# activations in every layer, data little more than gradients.
AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')
WEIGHT_AXES = ('fsdp', 'tensor')  # all but data, which holds copies


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
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


class MeshSizes(NamedTuple):
  """Number of devices along each axis."""

  data: int
  fsdp: int
  tensor: int


def mesh_sizes(mesh: Mesh) -> MeshSizes:
  """Returns the number of devices along each axis of the mesh."""
  return MeshSizes(*(mesh.shape[axis] for axis in AXES))


def batch_devices(mesh: Mesh) -> int:
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
