"""Parameters in an Orbax checkpoint, written and read piece by piece.

Orbax itself takes whole arrays only, so that a save holds the model in host memory. Here a leaf is
a promise of pieces. What lies on disk is an ordinary Orbax checkpoint, uncompressed: anybody's
CheckpointManager restores it. What the arrays mean is the caller's business.
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

from segjax.errors import UserError

STEP = 0  # of the CheckpointManager's directory
ITEM = 'default'  # CheckpointManager's name for an only item
THREADS = min(4, 2 * (os.cpu_count() or 1))  # half of them wait for the disk
_MOST_ELEMENTS = 1 << 28  # read at once, unless a single chunk is larger

_WRITING = {'file_io_sync': False}  # the caller syncs all files in the end

Index = tuple[slice, ...]
Done = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class StreamedArray:
  """An array to be written.

  Attributes:
    pieces: slices that partition it, each as large as the first but at the upper edges.
    read: gives one of the pieces; called from several threads. What it gives may be overwritten by
      the thread's next call.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  pieces: Sequence[Index]
  read: Callable[[Index], np.ndarray]

  @property
  def num_bytes(self) -> int:
    """Of the array."""
    return math.prod(self.shape) * self.dtype.itemsize


def write(
  directory: Path, leaves: dict[str, StreamedArray], done: Done = lambda num_bytes: None
) -> None:
  """Writes leaves by path ('a/b/c') as step 0 of a CheckpointManager's directory.

  Args:
    done: called with the bytes of each piece that is written.
  """
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    place = tree
    for parent in parents:
      place = place.setdefault(parent, {})
    place[name] = leaf
  options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
  with ocp.CheckpointManager(directory, options=options, item_handlers=_handler(done)) as manager:
    manager.save(STEP, args=ocp.args.PyTreeSave(tree))


def open_arrays(directory: Path) -> dict[str, tensorstore.TensorStore]:
  """The arrays of an Orbax checkpoint by path; nothing of them is read yet.

  Args:
    directory: a CheckpointManager's, of one of its steps, or of an item.

  Raises:
    ValueError: where it is none of these.
  """
  item = _item(directory)
  with ocp.Checkpointer(_handler()) as checkpointer:
    tree = checkpointer.restore(item, args=ocp.args.PyTreeRestore())
  return dict(_flat(tree))


def read(
  jobs: Sequence[tuple[Callable[[Index, np.ndarray], int], tensorstore.TensorStore, Index]],
  done: Done = lambda num_bytes: None,
) -> None:
  """Reads slices of open arrays, several at once, and calls sink(index, array) with each.

  Args:
    jobs: (sink, array, index); a sink returns the bytes it has made of the slice.
    done: called with these.
  """
  largest = max((math.prod(array.chunk_layout.read_chunk.shape) for _, array, _ in jobs), default=1)
  threads = max(1, min(THREADS, _MOST_ELEMENTS // largest))
  _for_each(lambda sink, array, index: done(sink(index, _take(array, index))), jobs, threads)


def _for_each(function: Callable[..., None], jobs: Sequence[tuple], threads: int) -> None:
  """Calls function(*job) for all jobs; the first error ends it."""
  with ThreadPoolExecutor(threads) as pool:
    try:
      for done in [pool.submit(function, *job) for job in jobs]:
        done.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _item(directory: Path) -> Path:
  """The directory of the item: of its newest step, where there are steps."""
  if not directory.is_dir():
    raise UserError(f'no directory {directory}.')
  steps = sorted((int(p.name), p) for p in directory.iterdir() if p.name.isdecimal())
  step = steps[-1][1] if steps else directory
  for found in (step, step / ITEM):
    if (found / '_METADATA').is_file():
      return found
  items = ', '.join(sorted(p.parent.name for p in step.glob('*/_METADATA')))
  raise UserError(
    f'{step} is no complete Orbax checkpoint of one tree'
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
  registry.add(jax.Array, ours, func=lambda kind: issubclass(kind, jax.Array | StreamedArray))
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


class _PieceHandler(type_handlers.ArrayHandler):
  """Writes leaves as Orbax writes a jax.Array, and reads these as open, unread arrays."""

  def __init__(self, done: Done) -> None:
    super().__init__(array_metadata_store=None)
    self._done = done

  async def serialize(self, values, infos, args=None):
    del args
    stores, context = (
      [],
      tensorstore.Context(tensorstore.Context.Spec(_WRITING), infos[0].ts_context),
    )
    for leaf, info in zip(values, infos, strict=True):
      await info.await_path_creation()
      first = tuple(part.stop - part.start for part in leaf.pieces[0])
      spec = type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        global_shape=leaf.shape,
        local_shape=first,
        dtype=leaf.dtype,
        process_index=0,
      )
      stores.append(
        await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=context)
      )
    jobs = [(s, leaf, i) for s, leaf in zip(stores, values, strict=True) for i in leaf.pieces]
    _for_each(lambda *job: self._done(_write(*job)), jobs, THREADS)
    return [future.NoopFuture()]

  async def deserialize(self, infos, args=None):
    del args
    found = []
    for info in infos:
      spec = type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
      found.append(
        await tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context)
      )
    return found


def _take(array: tensorstore.TensorStore, index: Index) -> np.ndarray:
  return array[index].read().result()


def _write(store: tensorstore.TensorStore, leaf: StreamedArray, index: Index) -> int:
  """Writes one piece; returns its bytes."""
  host = leaf.read(index)
  # No copy is made: once the result is there all is written, and nothing is read back from here.
  store[index].write(host, can_reference_source_data_indefinitely=True).result()
  return host.nbytes
