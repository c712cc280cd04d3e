"""Saves our parameter tree as an HF checkpoint: safetensors, config.json, tokenizer files.

One HF tensor at a time is gathered and written, so that host memory does not grow with the model.
Tensor names are mapped by `tensor_names`; checkpoints on disk are converted by `convert`.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from segjax import storage
from segjax.errors import UserError
from segjax.hf import model_card as cards
from segjax.hf import shards, tensor_names
from segjax.hf.checkpoint import CONFIG, INDEX, read_json, resolve_checkpoint
from segjax.hf.config import config_to_hf
from segjax.hf.tensor_slices import DTYPES, transpose_into
from segjax.model.llama import LlamaConfig
from segjax.model.sharding import path_name

TOKENIZER_FILES = (
  'LICENSE',
  'LICENSE.md',
  'LICENSE.txt',
  'NOTICE',
  'USE_POLICY.md',
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
REWARD_SPEC_FILE = 'segment_reward.json'  # see `train.reward_spec`
NUMPY_TO_SAFETENSORS = {numpy: safetensors for safetensors, numpy in DTYPES.items()}
# A directory that holds other files is more than a checkpoint and is not replaced.
REPLACEABLE = (*TOKENIZER_FILES, CONFIG, INDEX, REWARD_SPEC_FILE, *cards.DOC_FILES)

_GENERATION = 'generation_config.json'
_TEMPLATES = ('chat_template.jinja', 'chat_template.json', 'additional_chat_templates')


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
  """

  config: LlamaConfig
  head: str
  dtype: str
  origin: Path | None = None
  extra: dict[str, Any] | None = None
  card: cards.Card | None = None


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
) -> Path:
  """Writes a checkpoint that transformers loads, atomically.

  With several processes all must call it: each takes part in gathering, the first writes. An
  earlier checkpoint in `directory` is replaced, a directory with any other file in it is not.
  Takes nine parameters: four that define the model and five that most callers leave out.

  Args:
    directory: directory to write.
    params: possibly sharded, with the shapes of `tensor_names.tensor_mappings(config, head)`.
    config: the network.
    head: 'language' or 'scalar'.
    dtype: dtype to cast to; '' keeps the parameters'.
    source: checkpoint (local or hub id) that the metadata comes from, see `Metadata.origin`.
    max_shard_bytes: maximum size of a safetensors file.
    extra_config: further keys for config.json, such as pad_token_id.
    card: fields of README.md; missing base model and licence are those of `source`.

  Returns:
    The directory.

  Raises:
    ValueError: params and config do not agree, or `directory` must not be replaced.
  """
  check_dtype(dtype)
  directory = Path(directory).expanduser().absolute()
  origin = None if source is None else resolve_checkpoint(source)
  storage.check_target(directory, REPLACEABLE, overwrite=True, source=origin)
  leaves = _leaves(params, config, head)
  dtypes = [NUMPY_TO_SAFETENSORS[dtype or jnp.dtype(leaf.dtype).name] for _, leaf in leaves]
  entries = [entry for entry, _ in leaves]
  planned = shards.plan_shards(list(zip(entries, dtypes, strict=True)), max_shard_bytes)
  by_path = {entry.path: leaf for entry, leaf in leaves}
  if card is not None and origin is not None:
    card = cards.merge(cards.from_source(source, origin), card)
  metadata = Metadata(config, head, common_dtype(dtypes), origin, extra_config, card)
  tensors = [tensor for shard in planned for tensor in shard]
  if jax.process_index():
    for tensor in tensors:
      _gather(tensor, by_path[tensor.entry.path])  # a collective: the first process waits for it
  else:
    with storage.atomic_directory(directory) as partial:
      with shards.ShardWriter(partial, planned) as files:
        for tensor in tensors:
          files.write(tensor.name, 0, _gather(tensor, by_path[tensor.entry.path]))
      write_metadata(partial, metadata, directory.name)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('saved')  # not the path, which may differ between hosts
  return directory


def check_dtype(dtype: str) -> None:
  """Raises ValueError unless weights can be written in `dtype`; '' keeps their own."""
  if dtype and dtype not in NUMPY_TO_SAFETENSORS:
    raise UserError(f"dtype={dtype!r} is not one of {', '.join(NUMPY_TO_SAFETENSORS)} or ''.")


def write_metadata(directory: Path, metadata: Metadata, name: str) -> None:
  """Writes everything but the weights; config.json, without which nothing loads, comes last."""
  written = config_to_hf(
    metadata.config,
    metadata.head,
    dtype=metadata.dtype,
    base_config=None if metadata.origin is None else read_json(metadata.origin / CONFIG),
    extra=metadata.extra,
  )
  if metadata.origin is not None:
    copy_tokenizer(metadata.origin, directory)
  if metadata.head == 'language' and not (directory / _GENERATION).exists():
    ids = {key: written[key] for key in written if key.endswith('token_id')}
    shards.write_json(directory / _GENERATION, {'_from_model_config': True} | ids)
  if metadata.card is not None:
    has_template = _has_template(directory)
    cards.write_card(
      directory, metadata.card, name=name, head=metadata.head, with_template=has_template
    )
  shards.write_json(directory / CONFIG, written)


def _has_template(directory: Path) -> bool:
  """Returns whether a chat template is in a file of its own or in tokenizer_config.json."""
  file = directory / 'tokenizer_config.json'
  in_config = file.exists() and bool(read_json(file).get('chat_template'))
  return in_config or any((directory / name).exists() for name in _TEMPLATES)


def common_dtype(names: list[str]) -> str:
  """Returns the only dtype of these (safetensors' names); '' if there are several."""
  return DTYPES[names[0]] if len(set(names)) == 1 else ''


def copy_tokenizer(source: Path, target: Path) -> None:
  """Copies tokenizer files, templates, generation_config.json and licence, byte for byte."""
  for name in TOKENIZER_FILES:
    if (source / name).is_dir():
      shutil.copytree(source / name, target / name)
    elif (source / name).is_file():
      shutil.copyfile(source / name, target / name)


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


@jax.jit
def _layer(leaf: jax.Array, layer: int | jax.Array) -> jax.Array:
  """Returns leaf[layer]; compiled once per shape, where indexing would compile per layer."""
  return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _gather(tensor: shards.HFTensor, leaf: Any) -> np.ndarray:
  """Returns one complete HF tensor on the host, in the file's dtype and orientation."""
  entry = tensor.entry
  if entry.stacked:
    leaf = _layer(leaf, tensor.layer) if isinstance(leaf, jax.Array) else leaf[tensor.layer]
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  host = np.asarray(jax.device_get(leaf))
  out = np.empty(entry.hf_shape, jnp.dtype(DTYPES[tensor.dtype]))
  if entry.transposed:
    transpose_into(host, out)
  else:
    out[...] = host
  return out
