"""HF checkpoints to Orbax and back, piece by piece: memory holds a few pieces, not the model.

An imported checkpoint is a directory with params/ (what an Orbax CheckpointManager restores, step
0), hf/ (config.json, tokenizer files and the like of the source, byte for byte) and segjax.json
(what the model is). Arrays that are on devices already are `writer`'s business.
"""

import dataclasses
import math
import shutil
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
from segjax.hf import model_card as cards
from segjax.hf import orbax_stream, reader, shards, tensor_names, writer
from segjax.hf.checkpoint import CONFIG, read_json, resolve_checkpoint
from segjax.hf.tensor_slices import DTYPES, SliceReader, describe_not_finite, transpose_into

DESCRIPTION, PARAMS, SOURCE = 'segjax.json', 'params', 'hf'
Progress = Callable[[int, int], None]  # bytes that are done just now, of how many; from any thread
HEADS = {'policy': 'language', 'reward': 'scalar', 'critic': 'scalar'}  # by role
PIECE_BYTES = 1 << 24

_VERSION = 1
_STRIP_BYTES = 1 << 20  # transposed and written while it is in a core's cache


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
  """Converts an HF checkpoint (directory or hub id) to Orbax.

  Args:
    role: policy, reward or critic. A critic may be made from a language model.
    dtype: of the parameters; '' keeps the file's, so that an export gives the same bits.
    seed: for the scalar head of a critic, where the source has none.
    strict: refuse NaN and infinity among the weights, of which a warning is logged otherwise.
    overwrite: replace an imported checkpoint that is at `out`.
    piece_bytes: of a tensor, converted at once; also the size of the chunks that are stored.
    progress: called with each piece.

  Returns:
    The directory.

  Raises:
    ValueError: where `out` is no place to write to, or the checkpoint is not one we read.
  """
  head = _head(role)
  _check_dtype(dtype)
  out = Path(out).expanduser().absolute()
  origin = resolve_checkpoint(source)
  storage.check_target(out, (DESCRIPTION, PARAMS, SOURCE), overwrite=overwrite, source=origin)
  config = reader.load_config(origin)
  checkpoint, entries = reader.open_model(origin, config, head)
  files = SliceReader(checkpoint)
  leaves = {
    entry.path: _leaf(files, entry, reader.dtype_of(checkpoint, entry, dtype), piece_bytes)
    for entry in entries
  }
  for entry in tensor_names.tensor_mappings(config, head)[
    len(entries) :
  ]:  # the scalar head, or nothing
    leaves[entry.path] = _drawn_head(origin, entry, leaves['backbone/embedding'].dtype, role, seed)
  total = sum(leaf.num_bytes for leaf in leaves.values())
  storage.check_space(out, total)
  if strict and (found := reader.find_not_finite(checkpoint, entries)):
    raise UserError(f'{found}; without --strict they are converted all the same.')
  with storage.atomic_directory(out) as partial:
    orbax_stream.write(partial / PARAMS, leaves, lambda done: progress(done, total))
    _describe(partial, source, origin, role)
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
  """Converts a checkpoint of ours to an HF checkpoint.

  Args:
    checkpoint: what `import_checkpoint` wrote, or an item of a training run's checkpoints
      (checkpoints/STEP/policy), whose parameters alone are taken.
    dtype: of the files; '' keeps the parameters'.
    overwrite: replace a checkpoint that is at `out`.
    card: for README.md; what it does not say of base model and licence, the source does.
    source: of a training run's item, the HF checkpoint that it was trained from.
    role: likewise, what it is.
    progress: called with each piece.

  Returns:
    The directory.

  Raises:
    ValueError: where `out` is no place to write to, or `checkpoint` is none of ours.
  """
  _check_dtype(dtype)
  checkpoint, out = (Path(path).expanduser().absolute() for path in (checkpoint, out))
  place, origin, role, known = _described(checkpoint, source, role)
  head = _head(role)
  storage.check_target(out, writer.REPLACEABLE, overwrite=overwrite, source=origin)
  config = reader.load_config(origin)
  entries = tensor_names.tensor_mappings(config, head)
  arrays = _parameters(place, entries, head)
  words = [writer.NUMPY_TO_SAFETENSORS[dtype or arrays[entry.path].dtype.name] for entry in entries]
  planned = shards.plan_shards(list(zip(entries, words, strict=True)), max_shard_bytes)
  total = shards.num_bytes(planned)
  storage.check_space(out, total)
  described = writer.Description(
    config, head, writer.one_dtype(words), origin, card=cards.merge(known, card or cards.Card())
  )
  with storage.atomic_directory(out) as partial:
    with shards.ShardWriter(partial, planned) as files:
      jobs = [
        (_export_piece(files, entry, word), arrays[entry.path], index)
        for entry, word in zip(entries, words, strict=True)
        for index in _boxes(entry, arrays[entry.path].chunk_layout.read_chunk.shape)
      ]
      orbax_stream.read(jobs, lambda done: progress(done, total))
    if role == 'reward' and (origin / writer.REWARD_SPEC_FILE).is_file():
      shutil.copyfile(origin / writer.REWARD_SPEC_FILE, partial / writer.REWARD_SPEC_FILE)
    if origin == checkpoint / SOURCE:  # else it is what this was trained from, of another record
      _copy_provenance(origin, partial)
    writer.write_metadata(partial, described, out.name)
  return out


def _head(role: str) -> str:
  if role not in HEADS:
    raise UserError(f'role={role!r} is not one of {", ".join(HEADS)}.')
  return HEADS[role]


def _check_dtype(dtype: str) -> None:
  if dtype and dtype not in writer.NUMPY_TO_SAFETENSORS:
    raise UserError(
      f"dtype={dtype!r} is not one of {', '.join(writer.NUMPY_TO_SAFETENSORS)} or ''."
    )


def _drawn_head(
  origin: Path, entry: tensor_names.TensorMapping, dtype: np.dtype, role: str, seed: int
) -> orbax_stream.StreamedArray:
  """The scalar head that `origin` lacks; ValueError where a random one would mean nothing."""
  if role == 'reward':
    raise UserError(
      f'{origin} has no scalar head, so it is no reward model; train one from it, or import it '
      'as a critic, whose head may be drawn.'
    )
  logging.warning('%s has no scalar head; it is drawn from seed %d', origin, seed)
  kernel = np.asarray(reader.init_scalar_head(jax.random.key(seed), entry.shape[0], dtype))
  return orbax_stream.StreamedArray(entry.shape, dtype, [_whole(entry)], lambda _: kernel)


def _describe(directory: Path, source: str | Path, origin: Path, role: str) -> None:
  """Writes all but the weights of an imported checkpoint."""
  (directory / SOURCE).mkdir()
  for name in (CONFIG, writer.REWARD_SPEC_FILE) if role == 'reward' else (CONFIG,):
    if (origin / name).exists():
      shutil.copyfile(origin / name, directory / SOURCE / name)
  writer.copy_tokenizer(origin, directory / SOURCE)
  _copy_provenance(origin, directory / SOURCE)
  known = {k: v for k, v in vars(cards.from_source(source, origin)).items() if v}
  shards.write_json(directory / DESCRIPTION, {'version': _VERSION, 'role': role} | known)


def _copy_provenance(source: Path, target: Path) -> None:
  """Copies what tells how a model was made, byte for byte; the card itself is written anew."""
  for name in (cards.RECORD, cards.CURVES):
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def _whole(entry: tensor_names.TensorMapping) -> orbax_stream.Index:
  return tuple(slice(0, size) for size in entry.shape)


def _leaf(
  files: SliceReader, entry: tensor_names.TensorMapping, dtype: np.dtype, piece_bytes: int
) -> orbax_stream.StreamedArray:
  """A tensor of ours, to be read from the HF tensors that it is made of."""
  pieces = entry.pieces(_whole(entry), dtype.itemsize, piece_bytes)

  def read(index: orbax_stream.Index) -> np.ndarray:
    shape = tuple(part.stop - part.start for part in index)
    host = files.read(entry, index, dtype, out=_buffer(shape, dtype))
    if index is pieces[-1]:
      files.release()
    return host

  return orbax_stream.StreamedArray(entry.shape, dtype, pieces, read)


_buffers = threading.local()


def _buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An array of this thread's, the same memory at every call: new pages are dear to touch."""
  size = math.prod(shape) * dtype.itemsize
  if not hasattr(_buffers, 'bytes') or _buffers.bytes.size < size:
    _buffers.bytes = np.empty(size, np.uint8)
  return _buffers.bytes[:size].view(dtype).reshape(shape)


def _parameters(
  place: Path, entries: tuple[tensor_names.TensorMapping, ...], head: str
) -> dict[str, Any]:
  """The arrays of a model by path, opened and checked: all there are, or those in params/."""
  arrays = orbax_stream.open_arrays(place)
  inner = {k.removeprefix('params/'): v for k, v in arrays.items() if k.startswith('params/')}
  found = inner or arrays
  shaped = {
    path: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
    for path, array in found.items()
  }
  writer.check_tensors(shaped, entries, head, str(place))
  return found


def _export_piece(
  files: shards.ShardWriter, entry: tensor_names.TensorMapping, word: str
) -> Callable[[orbax_stream.Index, np.ndarray], int]:
  """Writes slices of a tensor of ours into the HF tensors that it is made of; returns bytes."""
  dtype = jnp.dtype(DTYPES[word])

  row_bytes = dtype.itemsize * math.prod(entry.hf_shape[1:])
  strip = max(1, _STRIP_BYTES // row_bytes)

  def write(index: orbax_stream.Index, host: np.ndarray) -> int:
    layers = range(index[0].start, index[0].stop) if entry.stacked else [0]
    first = index[-1 if entry.transposed else int(entry.stacked)].start
    for layer, piece in zip(layers, host if entry.stacked else [host], strict=True):
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


def _boxes(entry: tensor_names.TensorMapping, chunk: tuple[int, ...]) -> list[orbax_stream.Index]:
  """Slices that partition a tensor of ours: whole chunks, and whole rows of the HF tensors."""
  sizes = list(chunk)
  if entry.transposed:
    sizes[-2] = entry.shape[-2]
  found: list[orbax_stream.Index] = [()]
  for size, step in zip(entry.shape, sizes, strict=True):
    parts = [slice(start, min(start + step, size)) for start in range(0, size, step)]
    found = [(*index, part) for index in found for part in parts]
  return found


def _described(
  checkpoint: Path, source: str | Path, role: str
) -> tuple[Path, Path, str, cards.Card]:
  """Of a checkpoint of ours: where its arrays are, its HF description, its role, its card."""
  file = checkpoint / DESCRIPTION
  if not file.is_file():
    if not checkpoint.is_dir():
      raise UserError(f'no directory {checkpoint}.')
    if not source or not role:
      raise UserError(
        f'{checkpoint} has no {DESCRIPTION}, so it is no imported checkpoint. For one of a '
        'training run name an item of a step (checkpoints/STEP/policy), and with --source and '
        '--role the HF checkpoint it was trained from and what it is.'
      )
    origin = resolve_checkpoint(source)
    return checkpoint, origin, role, cards.from_source(source, origin)
  text = read_json(file)
  if text.get('version') != _VERSION or text.get('role') not in HEADS:
    raise UserError(
      f'{file}: version {text.get("version")!r} with role {text.get("role")!r} is not one that is '
      f'read here (version {_VERSION}; {", ".join(HEADS)}); import the HF checkpoint again.'
    )
  if role and role != text['role']:
    raise UserError(f'{checkpoint} is a {text["role"]}, not a {role}.')
  names = {field.name for field in dataclasses.fields(cards.Card)}
  card = cards.Card(**{k: v for k, v in text.items() if k in names and isinstance(v, str)})
  return checkpoint / PARAMS, checkpoint / SOURCE, text['role'], card
