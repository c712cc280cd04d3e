"""Writes and reads the parameters of an Orbax checkpoint piece by piece.

Orbax itself saves complete arrays only, so that a save holds the model in host memory. Here a leaf
is read in pieces when it is written. The result is an ordinary Orbax checkpoint, uncompressed, that
any CheckpointManager restores.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import future, type_handlers

from segjax.errors import UserError, system_cause

STEP = 0  # the only step of the CheckpointManager's directory
ITEM = 'default'  # CheckpointManager's name of a single item
THREADS = min(4, 2 * (os.cpu_count() or 1))  # half of the threads wait for the disk
_MAX_ELEMENTS = 1 << 28  # elements read at once, unless a single chunk is larger

# The caller syncs all files at the end; a sync per chunk would stall the writing threads.
_WRITING = {'file_io_sync': False}

Index = tuple[slice, ...]
Done = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class StreamedArray:
  """An array that is read in pieces when it is written.

  Attributes:
    shape: shape of the array.
    dtype: dtype of the array.
    pieces: slices that partition it, each as large as the first except at the upper edges.
    read: returns a piece; called from several threads. The thread's next call may overwrite it.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  pieces: Sequence[Index]
  read: Callable[[Index], np.ndarray]

  @property
  def num_bytes(self) -> int:
    """Number of bytes of the array."""
    return math.prod(self.shape) * self.dtype.itemsize


def write(
  directory: Path, leaves: dict[str, StreamedArray], done: Done = lambda num_bytes: None
) -> None:
  """Writes leaves by path ('a/b/c') as step 0 of a CheckpointManager's directory.

  Args:
    directory: directory to write.
    leaves: arrays by path.
    done: called with the bytes of each written piece.
  """
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    subtree = tree
    for parent in parents:
      subtree = subtree.setdefault(parent, {})
    subtree[name] = leaf
  # Not asynchronous: the caller renames the directory as soon as the save returns.
  options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
  with ocp.CheckpointManager(directory, options=options, item_handlers=_handler(done)) as manager:
    try:
      manager.save(STEP, args=ocp.args.PyTreeSave(tree))
    except ValueError as error:  # tensorstore's class for errors of the system
      if isinstance(error, UserError):
        raise
      raise UserError(
        f'{directory.parent} cannot be written ({system_cause(error)}); make room on its disk.'
      ) from error


def open_arrays(directory: Path) -> dict[str, tensorstore.TensorStore]:
  """Opens the arrays of an Orbax checkpoint by path, without reading them.

  Args:
    directory: directory of a CheckpointManager, of one of its steps, or of an item.

  Raises:
    ValueError: the directory is none of these.
  """
  item = _find_item(directory)
  with ocp.Checkpointer(_handler()) as checkpointer:
    tree = checkpointer.restore(item, args=ocp.args.PyTreeRestore())
  return dict(_flat(tree))


def read(
  jobs: Sequence[tuple[Callable[[Index, np.ndarray], int], tensorstore.TensorStore, Index]],
  done: Done = lambda num_bytes: None,
) -> None:
  """Reads slices of open arrays, several at once, and calls sink(index, array) with each.

  Args:
    jobs: (sink, array, index); a sink returns the number of bytes it wrote.
    done: called with that number.
  """
  largest = max((math.prod(array.chunk_layout.read_chunk.shape) for _, array, _ in jobs), default=1)
  # A chunk is read as a whole, and in checkpoints that Orbax wrote a chunk is a whole array or
  # shard: with more threads memory would hold several of the largest.
  threads = max(1, min(THREADS, _MAX_ELEMENTS // largest))
  _for_each(lambda sink, array, index: done(sink(index, _read_slice(array, index))), jobs, threads)


def _for_each(function: Callable[..., None], jobs: Sequence[tuple], threads: int) -> None:
  """Calls function(*job) for all jobs; the first error cancels the rest."""
  with ThreadPoolExecutor(threads) as pool:
    try:
      for done in [pool.submit(function, *job) for job in jobs]:
        done.result()
    except BaseException:
      # Leaving the pool would otherwise run every job that still waits, as after a full disk.
      pool.shutdown(cancel_futures=True)
      raise


def _find_item(directory: Path) -> Path:
  """Returns the directory of the item, of the newest step if there are steps."""
  if not directory.is_dir():
    raise UserError(f'no directory {directory}.')
  # Unfinished and damaged steps have names that are not numbers.
  steps = sorted((int(p.name), p) for p in directory.iterdir() if p.name.isdecimal())
  step = steps[-1][1] if steps else directory
  for item in (step, step / ITEM):
    if (item / '_METADATA').is_file():
      return item
  items = ', '.join(sorted(p.parent.name for p in step.glob('*/_METADATA')))
  raise UserError(
    f'{step} is not a complete Orbax checkpoint of one tree'
    + (f'; name one of the items in it: {items}.' if items else ': it has no _METADATA.')
  )


def _flat(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  if isinstance(tree, tensorstore.TensorStore):
    yield path, tree
  elif isinstance(tree, dict | list | tuple):
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
      yield from _flat(value, f'{path}/{name}'.lstrip('/'))


def _handler(done: Done = lambda num_bytes: None) -> ocp.PyTreeCheckpointHandler:
  registry = type_handlers.create_type_handler_registry(
    (int, type_handlers.ScalarHandler()),
    (float, type_handlers.ScalarHandler()),
    (str, type_handlers.StringHandler()),
    (np.ndarray, type_handlers.NumpyHandler()),
  )
  ours = _PieceHandler(done)
  # Leaves are recorded as jax.Array, so that Orbax restores them without this module.
  registry.add(jax.Array, ours, func=lambda kind: issubclass(kind, jax.Array | StreamedArray))
  # Weights hardly compress: zstd saves a fifth of the bytes and more than doubles the time.
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


class _PieceHandler(type_handlers.ArrayHandler):
  """Writes leaves as Orbax writes a jax.Array, and reads these as open, unread arrays."""

  def __init__(self, done: Done) -> None:
    super().__init__(array_metadata_store=None)
    self._done = done

  async def serialize(self, values, infos, args=None):
    del args
    stores = []
    context = tensorstore.Context(tensorstore.Context.Spec(_WRITING), infos[0].ts_context)
    for leaf, info in zip(values, infos, strict=True):
      await info.await_path_creation()  # Orbax creates directories in the background
      # One chunk per piece: no two threads write to the same chunk, which tensorstore would have to
      # read again and merge.
      first = tuple(part.stop - part.start for part in leaf.pieces[0])
      spec = type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        global_shape=leaf.shape,
        local_shape=first,
        dtype=leaf.dtype,
        process_index=0,  # a single process converts
      )
      stores.append(
        await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=context)
      )
    jobs = [(s, leaf, i) for s, leaf in zip(stores, values, strict=True) for i in leaf.pieces]
    _for_each(lambda *job: self._done(_write(*job)), jobs, THREADS)
    return [future.NoopFuture()]  # everything is written already

  async def deserialize(self, infos, args=None):
    del args
    arrays = []
    for info in infos:
      spec = type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
      arrays.append(
        await tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context)
      )
    return arrays


def _read_slice(array: tensorstore.TensorStore, index: Index) -> np.ndarray:
  return array[index].read().result()


def _write(store: tensorstore.TensorStore, leaf: StreamedArray, index: Index) -> int:
  """Writes one piece; returns its bytes."""
  host = leaf.read(index)
  # Writes without a copy: `host` is not needed once the write has finished.
  # The next piece of this thread overwrites it, hence the wait.
  store[index].write(host, can_reference_source_data_indefinitely=True).result()
  return host.nbytes
