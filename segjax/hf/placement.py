"""Our tensors onto their devices, slice by slice as the devices hold them.

What a checkpoint must hold, and which tensors there are, is `reader`'s business.
"""

import collections
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.hf.tensor_names import TensorMapping
from segjax.hf.tensor_slices import Index, SliceReader
from segjax.model import sharding

PIECE_BYTES = 1 << 24  # of a tensor, read and placed at once
THREADS = min(4, os.cpu_count() or 1)

_ALIGNMENT = 64  # bytes


def place(
  files: SliceReader, entry: TensorMapping, mesh: Mesh | None, dtype: np.dtype, pool: Executor
) -> jax.Array:
  """One of our tensors on its devices; devices that hold the same slice share one reading."""
  whole = (slice(None),) * len(entry.shape)
  if mesh is None:
    return _shards(files, entry, whole, [None], dtype, pool)[0]
  place = sharding.parameter_sharding(entry.path, entry.shape, mesh)
  holders: dict[tuple, list[jax.Device]] = {}
  for device, index in place.addressable_devices_indices_map(entry.shape).items():
    holders.setdefault(tuple((part.start, part.stop) for part in index), []).append(device)
  shards = []
  for bounds, devices in holders.items():
    index = tuple(slice(*bound) for bound in bounds)
    shards += _shards(files, entry, index, devices, dtype, pool)
  return jax.make_array_from_single_device_arrays(entry.shape, place, shards)


def _shards(
  files: SliceReader,
  entry: TensorMapping,
  index: Index,
  devices: list[jax.Device | None],
  dtype: np.dtype,
  pool: Executor,
) -> list[jax.Array]:
  """The slice `index` on each of `devices`; None is the default device, without a commitment.

  Devices of their own memory get it piece by piece, so that the host holds a few pieces only. The
  host's own devices share one buffer, which is filled in place.
  """
  pieces = entry.pieces(index, dtype.itemsize, PIECE_BYTES)
  origin, shape = _origin_and_shape(index, entry.shape)
  if len(pieces) == 1 or not _has_own_memory(devices[0]):
    out = _aligned(shape, dtype)

    def fill(piece: Index) -> None:
      files.read(entry, piece, dtype, out=out[_relative(piece, origin)])

    list(pool.map(fill, pieces))
    return [jax.device_put(out, device) for device in devices]
  shards = [_zeros(shape, dtype, device) for device in devices]
  for piece, host in _prefetch(pool, lambda piece: files.read(entry, piece, dtype), pieces):
    start = tuple(part.start for part in _relative(piece, origin))
    shards = [
      _write(shard, jax.device_put(host, device), start)
      for shard, device in zip(shards, devices, strict=True)
    ]
    jax.block_until_ready(shards)  # or the pieces queue up in host memory
  return shards


def _has_own_memory(device: jax.Device | None) -> bool:
  return (device or jax.local_devices()[0]).platform != 'cpu'


def _origin_and_shape(
  index: Index, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
  return tuple(a for a, _, _ in bounds), tuple(b - a for a, b, _ in bounds)


def _relative(piece: Index, origin: tuple[int, ...]) -> Index:
  """`piece` as an index into the slice that begins at `origin`."""
  return tuple(slice(p.start - o, p.stop - o) for p, o in zip(piece, origin, strict=True))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An empty array at an address that XLA on CPU takes over without a copy."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  begin = -raw.ctypes.data % _ALIGNMENT
  return raw[begin : begin + size].view(dtype).reshape(shape)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: jax.Device | None) -> jax.Array:
  place = None if device is None else jax.sharding.SingleDeviceSharding(device)
  return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=place)()


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, piece: jax.Array, start: tuple) -> jax.Array:
  return jax.lax.dynamic_update_slice(shard, piece, start)


def _prefetch(pool: Executor, read: Callable, pieces: Sequence[Index]) -> Iterator[tuple]:
  """(piece, read(piece)) in order, the next ones being read meanwhile."""
  waiting = collections.deque()
  for piece in pieces:
    waiting.append((piece, pool.submit(read, piece)))
    if len(waiting) > THREADS:
      piece, future = waiting.popleft()
      yield piece, future.result()
  for piece, future in waiting:
    yield piece, future.result()
