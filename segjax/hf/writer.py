"""Saves our parameter tree as an HF checkpoint: safetensors, config.json, tokenizer files.

One HF tensor at a time is gathered and written, so that host memory does not grow with the model;
several processes share the writing, see `process_shares`.
Tensor names are mapped by `tensor_names`; checkpoints on disk are converted by `convert`.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax import storage
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.hf import model_card as cards
from segjax.hf import process_shares, shards, tensor_names, tokenizer_writer
from segjax.hf.adapter_config import config_directory
from segjax.hf.checkpoint import (
  ADAPTER,
  ADAPTER_WEIGHTS,
  CONFIG,
  INDEX,
  read_json,
  resolve_checkpoint,
)
from segjax.hf.config import config_to_hf
from segjax.hf.tensor_slices import DTYPES, transpose_into
from segjax.model.llama import LlamaConfig
from segjax.model.sharding import path_name

REWARD_SPEC_FILE = 'segment_reward.json'  # see `train.reward_spec`
NUMPY_TO_SAFETENSORS = {numpy: safetensors for safetensors, numpy in DTYPES.items()}
# A directory that holds other files is more than a checkpoint and is not replaced.
REPLACEABLE = (
  *(*tokenizer_writer.FILES, CONFIG, INDEX, REWARD_SPEC_FILE, *cards.DOC_FILES),
  *(ADAPTER, ADAPTER_WEIGHTS),
)


@dataclasses.dataclass(frozen=True)
class Metadata:
  """Content of a checkpoint apart from its weights.

  Attributes:
    config: the network.
    head: 'language' or 'scalar'.
    dtype: dtype of the weights; '' if they have several.
    origin: directory whose tokenizer files, chat template and generation config are copied byte
      for byte, and whose unknown config.json keys are kept.
    extra: further keys for config.json, such as pad_token_id.
    card: fields of README.md; None writes no such file.
    tokenizer: the tokenizer that the model was trained with: its chat template and special ids are
      written; None keeps the origin's.
  """

  config: LlamaConfig
  head: str
  dtype: str
  origin: Path | None = None
  extra: dict[str, Any] | None = None
  card: cards.Card | None = None
  tokenizer: ChatTokenizer | None = None


def save_checkpoint(
  directory: str | Path,
  params: dict[str, Any],
  config: LlamaConfig,
  head: str,
  *,
  dtype: str = '',
  source: str | Path | None = None,
  max_shard_bytes: int = shards.MAX_SHARD_BYTES,
  extra_config: dict[str, Any] | None = None,
  card: cards.Card | None = None,
  tokenizer: ChatTokenizer | None = None,
) -> Path:
  """Writes a checkpoint that transformers loads, atomically; returns its directory.

  All processes must call it: each gathers, and writes its share where all see the directory. A
  checkpoint in `directory` is replaced, a directory with other files is not. Takes ten parameters:
  four define the model, most callers leave out the others.

  Args:
    directory: directory to write.
    params: may be sharded; shapes as in `tensor_names.tensor_mappings(config, head)`.
    config: the network.
    head: 'language' or 'scalar'.
    dtype: dtype to cast to, '' for none.
    source: checkpoint (local or hub id) that the metadata comes from, see `Metadata.origin`.
    max_shard_bytes: maximum size of a safetensors file.
    extra_config: further keys for config.json, such as pad_token_id.
    card: fields of README.md; missing base model and licence are those of `source`.
    tokenizer: see `Metadata`.

  Raises:
    ValueError: params and config do not agree, or `directory` must not be replaced.
  """
  check_dtype(dtype)
  directory = Path(directory).expanduser().absolute()
  origin = None if source is None else resolve_checkpoint(source)
  storage.check_target(directory, REPLACEABLE, overwrite=True, source=origin)
  leaves = _leaves(params, config, head)
  dtypes = [NUMPY_TO_SAFETENSORS[dtype or jnp.dtype(leaf.dtype).name] for _, leaf in leaves]
  by_path = {entry.path: leaf for entry, leaf in leaves}
  typed = [(entry, name) for (entry, _), name in zip(leaves, dtypes, strict=True)]
  planned = shards.plan_shards(typed, max_shard_bytes)
  if card is not None and origin is not None:
    card = cards.merge(cards.from_source(source, origin), card)
  metadata = Metadata(config, head, common_dtype(dtypes), origin, extra_config, card, tokenizer)
  _write_files(directory, planned, by_path, metadata)
  return directory


def check_dtype(dtype: str) -> None:
  """Raises ValueError unless weights can be written in `dtype`; '' keeps their own."""
  if dtype and dtype not in NUMPY_TO_SAFETENSORS:
    raise UserError(f"dtype={dtype!r} is not one of {', '.join(NUMPY_TO_SAFETENSORS)} or ''.")


def write_metadata(directory: Path, metadata: Metadata, name: str) -> None:
  """Writes everything but the weights; config.json, without which nothing loads, comes last."""
  origin, extra = metadata.origin, dict(metadata.extra or {})
  if metadata.tokenizer is not None:
    size = metadata.config.vocab_size
    extra |= tokenizer_writer.special_ids(metadata.tokenizer, size, metadata.head)
  written = config_to_hf(
    metadata.config,
    metadata.head,
    dtype=metadata.dtype,
    base_config=None if origin is None else read_json(config_directory(origin) / CONFIG),
    extra=extra,
  )
  if origin is not None:
    tokenizer_writer.copy_tokenizer(origin, directory)
  if metadata.tokenizer is not None:
    tokenizer_writer.write_template(directory, metadata.tokenizer.chat_template)
  has_ids = metadata.tokenizer is None and (directory / tokenizer_writer.GENERATION).exists()
  if metadata.head == 'language' and not has_ids:
    ids = {key: written[key] for key in written if key.endswith('token_id')}
    tokenizer_writer.write_generation_config(directory, ids)
  elif metadata.tokenizer is not None:
    tokenizer_writer.write_pad_token(directory, metadata.tokenizer, written['pad_token_id'])
  if metadata.card is not None:
    has_template = tokenizer_writer.has_template(directory)
    cards.write_card(
      directory, metadata.card, name=name, head=metadata.head, with_template=has_template
    )
  shards.write_json(directory / CONFIG, written)


def common_dtype(names: list[str]) -> str:
  """Returns the only dtype of these (safetensors' names); '' if there are several."""
  return DTYPES[names[0]] if len(set(names)) == 1 else ''


def _leaves(
  params: dict[str, Any], config: LlamaConfig, head: str
) -> list[tuple[tensor_names.TensorMapping, Any]]:
  """Returns the table's entries with our tensors; ValueError unless they agree."""
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  by_path = {path_name(path): leaf for path, leaf in flat}
  entries = tensor_names.tensor_mappings(config, head)
  check_tensors(by_path, entries, head)
  return [(entry, by_path[entry.path]) for entry in entries]


def check_tensors(
  tensors: dict[str, Any],
  entries: tuple[tensor_names.TensorMapping, ...],
  head: str,
  name: str = 'params',
) -> None:
  """Raises ValueError unless `tensors`, by path, have the paths, shapes and dtypes of the table.

  Args:
    tensors: anything with shape and dtype.
    entries: the table.
    head: 'language' or 'scalar', for the error.
    name: name of `tensors` in the error.
  """
  differing = sorted({entry.path for entry in entries} ^ set(tensors))
  if differing:
    path = differing[0]
    problem = 'is not one of them' if path in tensors else 'is missing'
    raise UserError(f'{name} are not those of this {head} model: {path} {problem}.')
  for entry in entries:
    tensor = tensors[entry.path]
    dtype = jnp.dtype(tensor.dtype).name
    if tuple(tensor.shape) != entry.shape or dtype not in NUMPY_TO_SAFETENSORS:
      raise UserError(
        f'{name}: {entry.path} is {dtype}{list(tensor.shape)}, but by the config it is a float '
        f'tensor of shape {list(entry.shape)}; save with the config of the model.'
      )


def _write_files(
  directory: Path, planned: list[shards.ShardPlan], by_path: dict[str, Any], metadata: Metadata
) -> None:
  """Writes all files of a checkpoint; every process must call it."""
  tensors = [
    (tensor, functools.partial(_device_tensor, tensor, by_path[tensor.entry.path]))
    for shard in planned
    for tensor in shard
  ]
  with process_shares.shared_directory(directory) as (partial, writers):
    if not jax.process_index():
      with shards.ShardWriter(partial, planned) as files:
        process_shares.barrier('created')
        process_shares.write_shares(tensors, functools.partial(_write, files), writers)
        process_shares.barrier('written')  # before the index
      write_metadata(partial, metadata, directory.name)
    else:
      process_shares.barrier('created')
      with contextlib.ExitStack() as stack:
        files = None
        if writers > 1:
          files = stack.enter_context(shards.ShardWriter(partial, planned, creates=False))
        process_shares.write_shares(tensors, functools.partial(_write, files), writers)
      process_shares.barrier('written')
  process_shares.barrier('saved')


@jax.jit
def _layer(leaf: jax.Array, layer: int | jax.Array) -> jax.Array:
  """Returns leaf[layer]; compiled once per shape, where indexing would compile per layer."""
  return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _device_tensor(tensor: shards.HFTensor, leaf: Any) -> Any:
  """Returns an HF tensor in our orientation, split over the devices as our tensor is."""
  if not tensor.entry.stacked:
    return leaf
  return _layer(leaf, tensor.layer) if isinstance(leaf, jax.Array) else leaf[tensor.layer]


def _write(files: shards.ShardWriter, tensor: shards.HFTensor, host: np.ndarray) -> None:
  """Writes a tensor in the file's dtype and orientation."""
  out = np.empty(tensor.entry.part_shape, jnp.dtype(DTYPES[tensor.dtype]))
  if tensor.entry.transposed:
    transpose_into(host, out)
  else:
    out[...] = host
  files.write(tensor.name, tensor.first_byte, out)
