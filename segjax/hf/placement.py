"""Loads our tensors onto their devices, slice by slice as the devices hold them.

Checkpoints are opened and checked by `reader`.
"""

import collections
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from segjax.errors import UserError
from segjax.hf.checkpoint import Checkpoint
from segjax.hf.tensor_names import TensorMapping
from segjax.hf.tensor_slices import Index, SliceReader, describe_not_finite
from segjax.model import sharding

PIECE_BYTES = 1 << 24  # bytes of a tensor that are read and transferred at once
THREADS = min(4, os.cpu_count() or 1)

# XLA on CPU copies a buffer whose address is not a multiple of it.
_ALIGNMENT = 64  # bytes


def load_tensors(
  checkpoint: Checkpoint,
  entries: Sequence[TensorMapping],
  dtypes: Sequence[np.dtype],
  mesh: Mesh | None,
  strict: bool,
) -> dict[str, Any]:
  """Returns the tree of these tensors of ours on their devices.

  Args:
    checkpoint: holds their HF tensors.
    entries: the tensors.
    dtypes: of each of them.
    mesh: None puts everything on the default device.
    strict: refuse NaN and infinity among the weights, instead of logging a warning.

  Raises:
    UserError: there are such weights.
  """
  tree: dict[str, Any] = {}
  files = SliceReader(checkpoint)
  with ThreadPoolExecutor(THREADS) as pool:
    for entry, dtype in zip(entries, dtypes, strict=True):
      *parents, name = entry.path.split('/')
      place = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
      place[name] = load_tensor(files, entry, mesh, dtype, pool)
      files.release()  # mapped pages count as memory of the process
  if files.not_finite:
    message = describe_not_finite(files.not_finite)
    if strict:
      raise UserError(
        f'{message}; these weights give NaN for every text, use an earlier checkpoint.'
      )
    logging.warning('%s', message)
  return tree


def load_tensor(
  files: SliceReader, entry: TensorMapping, mesh: Mesh | None, dtype: np.dtype, pool: Executor
) -> jax.Array:
  """Returns one of our tensors on its devices; a slice that several devices hold is read once."""
  if mesh is None:
    full = (slice(None),) * len(entry.shape)
    return _load_shards(files, entry, full, [None], dtype, pool)[0]
  target = sharding.parameter_sharding(entry.path, entry.shape, mesh)
  # By bounds, because a slice cannot be hashed before Python 3.12. Addressable devices only: every
  # process reads the slices of its own.
  holders: dict[tuple, list[jax.Device]] = {}
  for device, index in target.addressable_devices_indices_map(entry.shape).items():
    holders.setdefault(tuple((part.start, part.stop) for part in index), []).append(device)
  shards = []
  for bounds, devices in holders.items():
    index = tuple(slice(*bound) for bound in bounds)
    shards += _load_shards(files, entry, index, devices, dtype, pool)
  return jax.make_array_from_single_device_arrays(entry.shape, target, shards)


def _load_shards(
  files: SliceReader,
  entry: TensorMapping,
  index: Index,
  devices: list[jax.Device | None],
  dtype: np.dtype,
  pool: Executor,
) -> list[jax.Array]:
  """Loads the slice `index` onto each of `devices`; None is the default device, uncommitted.

  Devices with their own memory receive it piece by piece, so that the host holds only a few
  pieces. CPU devices share one host buffer, which is filled in place.
  """
  pieces = entry.pieces(index, dtype.itemsize, PIECE_BYTES)
  origin, shape = _origin_and_shape(index, entry.shape)
  if len(pieces) == 1 or not _has_own_memory(devices[0]):
    # device_put takes over an aligned host buffer on CPU: no second copy.
    out = _aligned(shape, dtype)

    def fill(piece: Index) -> None:
      files.read(entry, piece, dtype, out=out[_relative(piece, origin)])

    list(pool.map(fill, pieces))  # waits, and raises the first error
    return [jax.device_put(out, device) for device in devices]
  shards = [_zeros(shape, dtype, device) for device in devices]
  for piece, host in _prefetch(pool, lambda piece: files.read(entry, piece, dtype), pieces):
    start = tuple(part.start for part in _relative(piece, origin))
    shards = [
      _write(shard, jax.device_put(host, device), start)
      for shard, device in zip(shards, devices, strict=True)
    ]
    jax.block_until_ready(shards)  # or pieces would queue up in host memory
  return shards


def _has_own_memory(device: jax.Device | None) -> bool:
  return (device or jax.local_devices()[0]).platform != 'cpu'


def _origin_and_shape(
  index: Index, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
  return tuple(a for a, _, _ in bounds), tuple(b - a for a, b, _ in bounds)


def _relative(piece: Index, origin: tuple[int, ...]) -> Index:
  """Returns `piece` as an index into the slice that begins at `origin`."""
  return tuple(slice(p.start - o, p.stop - o) for p, o in zip(piece, origin, strict=True))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an empty array at an address that XLA on CPU takes over without a copy."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  begin = -raw.ctypes.data % _ALIGNMENT
  return raw[begin : begin + size].view(dtype).reshape(shape)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: jax.Device | None) -> jax.Array:
  target = None if device is None else jax.sharding.SingleDeviceSharding(device)
  # Created on the device: zeros from the host would be transferred like weights.
  return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=target)()


# Donated: each piece is written in place, without a second shard. `start` is an argument, so that
# all pieces of one shape share a program.
@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, piece: jax.Array, start: tuple) -> jax.Array:
  return jax.lax.dynamic_update_slice(shard, piece, start)


def _prefetch(pool: Executor, read: Callable, pieces: Sequence[Index]) -> Iterator[tuple]:
  """Yields (piece, read(piece)) in order while the next pieces are read."""
  waiting = collections.deque()
  for piece in pieces:
    waiting.append((piece, pool.submit(read, piece)))
    if len(waiting) > THREADS:  # bounds the pieces in host memory
      piece, future = waiting.popleft()
      yield piece, future.result()
  for piece, future in waiting:
    yield piece, future.result()
