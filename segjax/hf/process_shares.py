"""The share of each process in writing one checkpoint.

Tensors go round the processes: all gather each tensor on the devices, and one copies it to its host
and writes it, while the others go on to the next. A host holds one tensor at a time, twice: as it
comes from the device, and as the file has it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from segjax import storage
from segjax.model import sharding

_LONGEST_NAME = 255  # bytes, on Linux


@contextlib.contextmanager
def shared_directory(directory: Path) -> Iterator[tuple[Path, int]]:
  """Yields (a new directory that replaces `directory` in the end, how many processes write there).

  The first process makes it, see `storage.atomic_directory`. It alone writes unless all processes
  see the directory.
  """
  first = jax.process_index() == 0
  with storage.atomic_directory(directory) if first else contextlib.nullcontext() as partial:
    if jax.process_count() == 1:
      yield partial, 1
      return
    # The path may differ between hosts.
    name = np.zeros(_LONGEST_NAME, np.uint8)
    if first:
      encoded = partial.name.encode()
      name[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    name = bytes(multihost_utils.broadcast_one_to_all(name)).rstrip(b'\0').decode()
    partial = directory.with_name(name)
    sees = multihost_utils.process_allgather(np.array([partial.is_dir()]))
    yield partial, jax.process_count() if sees.all() else 1


def barrier(name: str) -> None:
  """Waits until all processes have called it."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def write_shares(
  tensors: list[Any], write: Callable[[Any, np.ndarray], None], writers: int
) -> None:
  """Gathers tensors in their order and calls `write` for this process's share of them.

  Every process must call it.

  Args:
    tensors: (what identifies a tensor, a function that returns it, in all processes).
    write: (what identifies a tensor, the tensor on the host).
    writers: the number of processes, from the first, that have a share.
  """
  pending: Future | None = None
  with ThreadPoolExecutor(1) as pool:
    for number, (tensor, make) in enumerate(tensors):
      whole = _gather(make())
      if number % writers != jax.process_index():
        continue
      if pending is not None:
        pending.result()  # one tensor at a time; raises what went wrong
      pending = pool.submit(lambda tensor=tensor, whole=whole: write(tensor, _on_host(whole)))
    if pending is not None:
      pending.result()


def _gather(x: Any) -> Any:
  """Returns the complete tensor on every device; a collective call where processes share it."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return x
  # Waits: processes without a share would else be far ahead, with tensors queued up in memory.
  return jax.block_until_ready(_replicate(x.sharding.mesh)(x))


def _on_host(x: Any) -> np.ndarray:
  is_shared = isinstance(x, jax.Array) and not x.is_fully_addressable
  return np.asarray(x.addressable_data(0) if is_shared else x)


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
