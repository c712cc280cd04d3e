"""Converts HF checkpoints to Orbax and back in pieces: memory holds a few pieces, not the model.

The layout of an imported checkpoint is defined in `imported`. Arrays that are already on devices
are saved by `writer`.
"""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from segjax import storage
from segjax.errors import UserError
from segjax.hf import imported, orbax_stream, reader, shards, tensor_names, writer
from segjax.hf import model_card as cards
from segjax.hf.checkpoint import resolve_checkpoint
from segjax.hf.tensor_slices import DTYPES, SliceReader, describe_not_finite, transpose_into

Progress = Callable[[int, int], None]  # (bytes of a finished piece, total bytes); from any thread
PIECE_BYTES = 1 << 24

_STRIP_BYTES = 1 << 20  # small enough to stay in a core's cache between transpose and write


def import_checkpoint(
  source: str | Path,
  out: str | Path,
  *,
  role: str = 'policy',
  dtype: str = '',
  seed: int = 0,
  strict: bool = False,
  overwrite: bool = False,
  piece_bytes: int = PIECE_BYTES,
  progress: Progress = lambda done, total: None,
) -> Path:
  """Converts an HF checkpoint to Orbax.

  Takes nine parameters because most of them are flags of `segjax convert import`.

  Args:
    source: directory or hub id.
    out: directory to write.
    role: policy, reward or critic. A critic may be imported from a language model.
    dtype: dtype of the parameters; '' keeps the file's, so that an export gives the same bits.
    seed: seed of the scalar head of a critic, if the source has none.
    strict: refuse NaN and infinity among the weights, instead of logging a warning.
    overwrite: replace an imported checkpoint at `out`.
    piece_bytes: bytes of a tensor that are converted at once; also the size of the stored chunks.
    progress: called with each piece.

  Returns:
    The directory.

  Raises:
    ValueError: `out` must not be written to, or the checkpoint cannot be read.
  """
  head = _head(role)
  writer.check_dtype(dtype)
  out = Path(out).expanduser().absolute()
  origin = resolve_checkpoint(source)
  own = (imported.DESCRIPTION, imported.PARAMS, imported.SOURCE)
  storage.check_target(out, own, overwrite=overwrite, source=origin)
  config = reader.load_config(origin)
  checkpoint, entries = reader.open_model(origin, config, head)
  files = SliceReader(checkpoint)
  leaves = {
    entry.path: _leaf(files, entry, reader.resolve_dtype(checkpoint, entry, dtype), piece_bytes)
    for entry in entries
  }
  # Only the scalar head, which comes last, may be missing from the checkpoint.
  for entry in tensor_names.tensor_mappings(config, head)[len(entries) :]:
    leaves[entry.path] = _random_head(origin, entry, leaves['backbone/embedding'].dtype, role, seed)
  total = sum(leaf.num_bytes for leaf in leaves.values())
  storage.check_space(out, total)
  if strict and (message := reader.find_not_finite(checkpoint, entries)):
    raise UserError(f'{message}; without --strict they are converted with a warning.')
  with storage.atomic_directory(out) as partial:
    orbax_stream.write(partial / imported.PARAMS, leaves, lambda done: progress(done, total))
    imported.write_description(partial, source, origin, role)
  if files.not_finite:
    logging.warning('%s', describe_not_finite(files.not_finite))
  return out


def export_checkpoint(
  checkpoint: str | Path,
  out: str | Path,
  *,
  dtype: str = '',
  max_shard_bytes: int = shards.MAX_SHARD_BYTES,
  overwrite: bool = False,
  card: cards.Card | None = None,
  source: str | Path = '',
  role: str = '',
  progress: Progress = lambda done, total: None,
) -> Path:
  """Converts a segjax checkpoint to an HF checkpoint; returns its directory.

  Takes nine parameters because most of them are flags of `segjax convert export`.

  Args:
    checkpoint: output of `import_checkpoint`, or an item of a training run's checkpoints
      (checkpoints/STEP/policy), of which only the parameters are exported.
    out: directory to write.
    dtype: dtype of the files; '' keeps the parameters'.
    max_shard_bytes: maximum size of a safetensors file.
    overwrite: replace a checkpoint at `out`.
    card: fields of README.md; missing base model and licence are those of the source.
    source: for a training run's item, the HF checkpoint that it was trained from.
    role: for a training run's item, its role.
    progress: called with each piece.

  Raises:
    ValueError: `out` must not be written to, or `checkpoint` cannot be read.
  """
  writer.check_dtype(dtype)
  checkpoint, out = (Path(path).expanduser().absolute() for path in (checkpoint, out))
  exported = imported.read_description(checkpoint, source, role)
  origin, head = exported.origin, _head(exported.role)
  storage.check_target(out, writer.REPLACEABLE, overwrite=overwrite, source=origin)
  config = reader.load_config(origin)
  entries = tensor_names.tensor_mappings(config, head)
  arrays = _open_params(exported.params, entries, head)
  names = [dtype or arrays[entry.path].dtype.name for entry in entries]
  dtypes = [writer.NUMPY_TO_SAFETENSORS[name] for name in names]
  planned = shards.plan_shards(list(zip(entries, dtypes, strict=True)), max_shard_bytes)
  total = shards.num_bytes(planned)
  storage.check_space(out, total)
  card = cards.merge(exported.card, card or cards.Card())
  tokenizer = imported.load_trained_tokenizer(exported)
  metadata = writer.Metadata(
    config, head, writer.common_dtype(dtypes), origin, card=card, tokenizer=tokenizer
  )
  with storage.atomic_directory(out) as partial:
    with shards.ShardWriter(partial, planned) as files:
      jobs = []
      for entry, name in zip(entries, dtypes, strict=True):
        array = arrays[entry.path]
        slices = _chunk_slices(entry, array.chunk_layout.read_chunk.shape)
        jobs += [(_make_sink(files, entry, name), array, index) for index in slices]
      orbax_stream.read(jobs, lambda done: progress(done, total))
    imported.copy_own_files(exported, partial)
    writer.write_metadata(partial, metadata, out.name)
  return out


def _head(role: str) -> str:
  if role not in imported.HEADS:
    raise UserError(f'role={role!r} is not one of {", ".join(imported.HEADS)}.')
  return imported.HEADS[role]


def _random_head(
  origin: Path, entry: tensor_names.TensorMapping, dtype: np.dtype, role: str, seed: int
) -> orbax_stream.StreamedArray:
  """Returns the scalar head that `origin` lacks; ValueError for a reward model."""
  if role == 'reward':
    raise UserError(
      f'{origin} has no scalar head, so it is not a reward model; train one from it, or import it '
      'as a critic, whose head may be random.'
    )
  logging.warning('%s has no scalar head; a random one is drawn from seed %d', origin, seed)
  kernel = np.asarray(reader.init_scalar_head(jax.random.key(seed), entry.shape[0], dtype))
  return orbax_stream.StreamedArray(entry.shape, dtype, [_full_index(entry)], lambda _: kernel)


def _full_index(entry: tensor_names.TensorMapping) -> orbax_stream.Index:
  return tuple(slice(0, size) for size in entry.shape)


def _leaf(
  files: SliceReader, entry: tensor_names.TensorMapping, dtype: np.dtype, piece_bytes: int
) -> orbax_stream.StreamedArray:
  """Returns a tensor of ours that is read from its HF tensors piece by piece."""
  pieces = entry.pieces(_full_index(entry), dtype.itemsize, piece_bytes)

  def read(index: orbax_stream.Index) -> np.ndarray:
    shape = tuple(part.stop - part.start for part in index)
    host = files.read(entry, index, dtype, out=_buffer(shape, dtype))
    # Otherwise the mapped pages of the model would stay resident.
    if index is pieces[-1]:
      files.release()  # harmless to other threads: pages are mapped again
    return host

  return orbax_stream.StreamedArray(entry.shape, dtype, pieces, read)


# Per thread, because a piece is overwritten as soon as its thread reads the next one.
_buffers = threading.local()


def _buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns a per-thread scratch array, reused to avoid page faults."""
  size = math.prod(shape) * dtype.itemsize
  if not hasattr(_buffers, 'bytes') or _buffers.bytes.size < size:
    # As bytes, because the pieces of a thread differ in shape and dtype.
    _buffers.bytes = np.empty(size, np.uint8)
  return _buffers.bytes[:size].view(dtype).reshape(shape)


def _open_params(
  directory: Path, entries: tuple[tensor_names.TensorMapping, ...], head: str
) -> dict[str, Any]:
  """Opens and checks the arrays of a model by path; of a training state those in params/."""
  arrays = orbax_stream.open_arrays(directory)
  params = {k.removeprefix('params/'): v for k, v in arrays.items() if k.startswith('params/')}
  params = params or arrays
  shaped = {
    path: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
    for path, array in params.items()
  }
  writer.check_tensors(shaped, entries, head, str(directory))
  return params


def _make_sink(
  files: shards.ShardWriter, entry: tensor_names.TensorMapping, safetensors_dtype: str
) -> Callable[[orbax_stream.Index, np.ndarray], int]:
  """Returns a function that writes a slice of a tensor of ours into its HF tensors.

  The function returns the number of bytes written.
  """
  dtype = jnp.dtype(DTYPES[safetensors_dtype])
  row_bytes = dtype.itemsize * math.prod(entry.hf_shape[1:])
  strip = max(1, _STRIP_BYTES // row_bytes)

  def write(index: orbax_stream.Index, host: np.ndarray) -> int:
    layers = range(index[0].start, index[0].stop) if entry.stacked else [0]
    # The HF row at which the slice begins decides the position of its bytes in the file.
    first = entry.row + index[-1 if entry.transposed else int(entry.stacked)].start
    for layer, piece in zip(layers, host if entry.stacked else [host], strict=True):
      # HF rows are our columns: a view, which is transposed strip by strip.
      rows = piece.T if entry.transposed else piece
      for row in range(0, len(rows), strip):
        part = rows[row : row + strip]
        out = _buffer(part.shape, dtype)
        if entry.transposed:
          transpose_into(part.T, out)
        else:
          out[...] = part
        files.write(entry.hf_name(layer), (first + row) * row_bytes, out)
    return host.size * dtype.itemsize

  return write


def _chunk_slices(
  entry: tensor_names.TensorMapping, chunk: tuple[int, ...]
) -> list[orbax_stream.Index]:
  """Returns slices that partition a tensor of ours into full chunks and full HF rows.

  A slice that cut through a chunk would have the chunk read once per slice.
  """
  sizes = list(chunk)
  if len(entry.hf_shape) == 2:
    # Full HF rows are contiguous in the file: one write per strip, not one per row.
    columns = -2 if entry.transposed else -1
    sizes[columns] = entry.shape[columns]
  slices: list[orbax_stream.Index] = [()]
  for size, step in zip(entry.shape, sizes, strict=True):
    parts = [slice(start, min(start + step, size)) for start in range(0, size, step)]
    slices = [(*index, part) for index in slices for part in parts]
  return slices
