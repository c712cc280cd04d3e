"""Our parameter tree as an HF checkpoint: sharded safetensors, config.json, tokenizer files.

One HF tensor at a time is gathered and written, so that host memory stays small however large the
model is. What the tensors are called is `layout`'s business.
"""

import dataclasses
import json
import math
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from segjax.hf import layout
from segjax.hf.config import config_to_hf
from segjax.hf.headers import CONFIG, INDEX, ITEM_SIZE, WEIGHTS, read_json, resolve
from segjax.hf.reader import DTYPES
from segjax.hf.transpose import transpose_into
from segjax.model.llama import LlamaConfig
from segjax.model.sharding import path_name

COPIED = (
  'added_tokens.json',
  'additional_chat_templates',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
  'merges.txt',
  'special_tokens_map.json',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'vocab.json',
)

_WORDS = {name: word for word, name in DTYPES.items()}  # numpy's dtype to safetensors'
# What a directory may hold for us to replace it: what we write, and what stands beside it.
_REPLACEABLE = (*COPIED, CONFIG, INDEX, 'segment_reward.json', 'README.md')


def save_checkpoint(
  directory: str | Path,
  params: dict[str, Any],
  config: LlamaConfig,
  head: str,
  *,
  dtype: str = '',
  source: str | Path | None = None,
  max_shard_bytes: int = 5 * 10**9,
  extra_config: dict[str, Any] | None = None,
) -> Path:
  """Writes a checkpoint that transformers loads; all of it appears at once, or nothing does.

  With several processes all must call it: each takes part in gathering, the first writes. An
  earlier checkpoint in `directory` is replaced, a directory with anything else in it is not.

  Args:
    params: possibly sharded, of the shapes of `layout.entries(config, head)`.
    head: 'language' or 'scalar'.
    dtype: to cast to; '' keeps what the parameters have.
    source: checkpoint (local or hub id) whose tokenizer files, chat template and generation
      config are copied byte for byte, and whose unknown config.json keys are kept.
    extra_config: further keys for config.json, such as pad_token_id.

  Returns:
    The directory.

  Raises:
    ValueError: where parameters and config do not agree, or `directory` is not ours to replace.
  """
  if dtype and dtype not in _WORDS:
    raise ValueError(f"dtype={dtype!r} is not one of {', '.join(_WORDS)} or ''.")
  directory = Path(directory).expanduser().absolute()
  origin = None if source is None else resolve(source)
  _check_replaceable(directory, origin)
  shards = _plan(_leaves(params, config, head), dtype, max_shard_bytes)
  dtypes = {piece.dtype for shard in shards for piece in shard}
  described = config_to_hf(
    config,
    head,
    dtype=DTYPES[dtypes.pop()] if len(dtypes) == 1 else '',
    base_config=None if origin is None else read_json(origin / CONFIG),
    extra=extra_config,
  )
  if jax.process_index():
    _write_weights(None, shards)
  else:
    partial = directory.parent / f'.{directory.name}.partial-{os.getpid()}'
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
      _write_weights(partial, shards)
      _write_json(partial / CONFIG, described)
      if origin is not None:
        copy_tokenizer(origin, partial)
      _rename(partial, directory)
    finally:
      shutil.rmtree(partial, ignore_errors=True)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'saved {directory}')
  return directory


def copy_tokenizer(source: Path, target: Path) -> None:
  """Copies tokenizer files, chat templates and generation_config.json, byte for byte."""
  for name in COPIED:
    if (source / name).is_dir():
      shutil.copytree(source / name, target / name)
    elif (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def _check_replaceable(directory: Path, origin: Path | None) -> None:
  if not directory.exists():
    return
  if not directory.is_dir():
    raise ValueError(f'{directory} is a file; name a directory to write to.')
  if origin is not None and origin.resolve() == directory.resolve():
    raise ValueError(f'{directory} is also the source of the tokenizer; write to another one.')
  for file in sorted(directory.iterdir()):
    weights = file.suffix == '.safetensors' and file.name.startswith('model')
    if file.name not in _REPLACEABLE and not weights:
      raise ValueError(
        f'{directory} holds {file.name}, so it is more than a checkpoint and is not replaced; '
        'write to a new directory.'
      )


def _leaves(
  params: dict[str, Any], config: LlamaConfig, head: str
) -> list[tuple[layout.Entry, Any]]:
  """The table's entries with our tensors; ValueError unless they agree."""
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  given = {path_name(path): leaf for path, leaf in flat}
  entries = layout.entries(config, head)
  odd = sorted({entry.path for entry in entries} ^ set(given))
  if odd:
    what = 'is not one of them' if odd[0] in given else 'is missing'
    raise ValueError(f'params are not those of this {head} model: {odd[0]} {what}.')
  for entry in entries:
    leaf = given[entry.path]
    if leaf.shape != entry.shape or jnp.dtype(leaf.dtype).name not in _WORDS:
      raise ValueError(
        f'params: {entry.path} is {leaf.dtype}{list(leaf.shape)}, but by the config it is a float '
        f'tensor of shape {list(entry.shape)}; save with the config that the model was made with.'
      )
  return [(entry, given[entry.path]) for entry in entries]


@dataclasses.dataclass(frozen=True)
class _Piece:
  """One HF tensor to be written: layer `layer` of our tensor `leaf`, or all of it."""

  entry: layout.Entry
  layer: int
  leaf: Any
  dtype: str  # safetensors' word

  @property
  def name(self) -> str:
    return self.entry.hf_name(self.layer)

  @property
  def num_bytes(self) -> int:
    return math.prod(self.entry.hf_shape) * ITEM_SIZE[self.dtype]


_Shard = list[_Piece]


def _plan(leaves: list[tuple[layout.Entry, Any]], dtype: str, max_shard_bytes: int) -> list[_Shard]:
  """Which HF tensors go into which file, in the order in which they are written.

  Files are filled from the embedding through the layers to the head; inside one, wider dtypes come
  first, which keeps every tensor aligned, then names in order, as the safetensors library does.
  """
  before, layers, after = [], [], []
  for entry, leaf in leaves:
    word = _WORDS[dtype or jnp.dtype(leaf.dtype).name]
    group = layers if entry.stacked else after if layers else before
    group += [_Piece(entry, i, leaf, word) for i in range(len(entry.hf_names()))]
  shards: list[_Shard] = [[]]
  size = 0
  for piece in before + sorted(layers, key=lambda piece: piece.layer) + after:
    if shards[-1] and size + piece.num_bytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(piece)
    size += piece.num_bytes
  return [sorted(shard, key=lambda p: (-ITEM_SIZE[p.dtype], p.name)) for shard in shards]


def _write_weights(directory: Path | None, shards: list[_Shard]) -> None:
  """Gathers tensor by tensor; writes them, and the index of several files, where told a place."""
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    name = f'model-{number:05d}-of-{len(shards):05d}.safetensors' if len(shards) > 1 else WEIGHTS
    weight_map |= {piece.name: name for piece in shard}
    if directory is None:
      for piece in shard:
        _gathered(piece)
      continue
    with (directory / name).open('wb') as stream:
      stream.write(_header(shard))
      for piece in shard:
        stream.write(memoryview(_gathered(piece).reshape(-1).view(np.uint8)))
  if directory is not None and len(shards) > 1:
    total = sum(piece.num_bytes for shard in shards for piece in shard)
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    _write_json(directory / INDEX, index)


def _header(shard: _Shard) -> bytes:
  """A safetensors header: its length, JSON, and spaces up to a multiple of 8 bytes."""
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  offset = 0
  for piece in shard:
    header[piece.name] = {
      'dtype': piece.dtype,
      'shape': list(piece.entry.hf_shape),
      'data_offsets': [offset, offset + piece.num_bytes],
    }
    offset += piece.num_bytes
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return struct.pack('<Q', len(text)) + text


@jax.jit
def _layer(leaf: jax.Array, layer: int | jax.Array) -> jax.Array:
  """leaf[layer], compiled once per shape and not once per layer."""
  return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _gathered(piece: _Piece) -> np.ndarray:
  """One HF tensor on the host, whole, in the file's dtype and orientation."""
  entry, leaf = piece.entry, piece.leaf
  if entry.stacked:
    leaf = _layer(leaf, piece.layer) if isinstance(leaf, jax.Array) else leaf[piece.layer]
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  host = np.asarray(jax.device_get(leaf))
  out = np.empty(entry.hf_shape, jnp.dtype(DTYPES[piece.dtype]))
  if entry.transposed:
    transpose_into(host, out)
  else:
    out[...] = host
  return out


def _write_json(path: Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def _rename(partial: Path, directory: Path) -> None:
  """Puts `partial` in the place of `directory`."""
  old = None
  if directory.exists():
    old = partial.with_name(partial.name + '.old')
    directory.rename(old)
  partial.rename(directory)
  if old is not None:
    shutil.rmtree(old)
