"""Our parameter tree as an HF checkpoint: sharded safetensors, config.json, tokenizer files.

One HF tensor at a time is gathered and written, so that host memory stays small however large the
model is. What the tensors are called is `layout`'s business, what is on disk already `convert`'s.
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
REWARD_SPEC_FILE = 'segment_reward.json'  # how a reward model's scores are read; written by `train`
NUMPY_TO_SAFETENSORS = {
  name: word for word, name in DTYPES.items()
}  # numpy's dtype to safetensors'
# What a directory may hold for us to replace it: what we write, and what stands beside it.
REPLACEABLE = (*TOKENIZER_FILES, CONFIG, INDEX, REWARD_SPEC_FILE, *cards.DOC_FILES)

_GENERATION = 'generation_config.json'
_TEMPLATES = ('chat_template.jinja', 'chat_template.json', 'additional_chat_templates')


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint holds beside its weights.

  Attributes:
    dtype: of the weights; '' where they have several.
    origin: directory whose tokenizer files, chat template and generation config are copied byte
      for byte, and whose unknown config.json keys are kept.
    extra: further keys for config.json, such as pad_token_id.
    card: for README.md; None for no such file.
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
  """Writes a checkpoint that transformers loads; all of it appears at once, or nothing does.

  With several processes all must call it: each takes part in gathering, the first writes. An
  earlier checkpoint in `directory` is replaced, a directory with anything else in it is not.

  Args:
    params: possibly sharded, of the shapes of `layout.entries(config, head)`.
    head: 'language' or 'scalar'.
    dtype: to cast to; '' keeps what the parameters have.
    source: checkpoint (local or hub id) that the description comes from, see `Description`.
    extra_config: further keys for config.json, such as pad_token_id.
    card: for README.md; what it does not say of base model and licence, that of `source` does.

  Returns:
    The directory.

  Raises:
    ValueError: where params and config do not agree, or `directory` is not ours to replace.
  """
  if dtype and dtype not in NUMPY_TO_SAFETENSORS:
    raise UserError(f"dtype={dtype!r} is not one of {', '.join(NUMPY_TO_SAFETENSORS)} or ''.")
  directory = Path(directory).expanduser().absolute()
  origin = None if source is None else resolve_checkpoint(source)
  storage.check_target(directory, REPLACEABLE, overwrite=True, source=origin)
  leaves = _leaves(params, config, head)
  words = [NUMPY_TO_SAFETENSORS[dtype or jnp.dtype(leaf.dtype).name] for _, leaf in leaves]
  planned = shards.plan_shards(
    [(entry, word) for (entry, _), word in zip(leaves, words, strict=True)], max_shard_bytes
  )
  by_path = {entry.path: leaf for entry, leaf in leaves}
  if card is not None and origin is not None:
    card = cards.merge(cards.from_source(source, origin), card)
  described = Description(config, head, one_dtype(words), origin, extra_config, card)
  if jax.process_index():
    for piece in _pieces(planned):
      _gathered(piece, by_path[piece.entry.path])
  else:
    with storage.atomic_directory(directory) as partial:
      with shards.ShardWriter(partial, planned) as files:
        for piece in _pieces(planned):
          files.write(piece.name, 0, _gathered(piece, by_path[piece.entry.path]))
      write_metadata(partial, described, directory.name)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('saved')  # the directory may have other names elsewhere
  return directory


def write_metadata(directory: Path, what: Description, name: str) -> None:
  """Writes all but the weights; config.json, without which nothing loads, comes last."""
  written = config_to_hf(
    what.config,
    what.head,
    dtype=what.dtype,
    base_config=None if what.origin is None else read_json(what.origin / CONFIG),
    extra=what.extra,
  )
  if what.origin is not None:
    copy_tokenizer(what.origin, directory)
  if what.head == 'language' and not (directory / _GENERATION).exists():
    ids = {key: written[key] for key in written if key.endswith('token_id')}
    shards.write_json(directory / _GENERATION, {'_from_model_config': True} | ids)
  if what.card is not None:
    with_template = any((directory / file).exists() for file in _TEMPLATES) or (
      (directory / 'tokenizer_config.json').exists()
      and bool(read_json(directory / 'tokenizer_config.json').get('chat_template'))
    )
    cards.write_card(directory, what.card, name=name, head=what.head, with_template=with_template)
  shards.write_json(directory / CONFIG, written)


def one_dtype(words: list[str]) -> str:
  """The dtype that all of these (safetensors' words) are; '' where there are several."""
  return DTYPES[words[0]] if len(set(words)) == 1 else ''


def copy_tokenizer(source: Path, target: Path) -> None:
  """Copies tokenizer files, templates, generation_config.json and licence, byte for byte."""
  for name in TOKENIZER_FILES:
    if (source / name).is_dir():
      shutil.copytree(source / name, target / name)
    elif (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def _pieces(planned: list[shards.ShardPlan]) -> list[shards.HFTensor]:
  return [piece for shard in planned for piece in shard]


def _leaves(
  params: dict[str, Any], config: LlamaConfig, head: str
) -> list[tuple[tensor_names.TensorMapping, Any]]:
  """The table's entries with our tensors; ValueError unless they agree."""
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  given = {path_name(path): leaf for path, leaf in flat}
  check_tensors(given, tensor_names.tensor_mappings(config, head), head)
  return [(entry, given[entry.path]) for entry in tensor_names.tensor_mappings(config, head)]


def check_tensors(
  given: dict[str, Any],
  entries: tuple[tensor_names.TensorMapping, ...],
  head: str,
  where: str = 'params',
) -> None:
  """ValueError unless `given`, by path, are the tensors of the table: anything with a shape."""
  odd = sorted({entry.path for entry in entries} ^ set(given))
  if odd:
    what = 'is not one of them' if odd[0] in given else 'is missing'
    raise UserError(f'{where} are not those of this {head} model: {odd[0]} {what}.')
  for entry in entries:
    leaf = given[entry.path]
    name = jnp.dtype(leaf.dtype).name
    if tuple(leaf.shape) != entry.shape or name not in NUMPY_TO_SAFETENSORS:
      raise UserError(
        f'{where}: {entry.path} is {name}{list(leaf.shape)}, but by the config it is a float '
        f'tensor of shape {list(entry.shape)}; save with the config that the model was made with.'
      )


@jax.jit
def _layer(leaf: jax.Array, layer: int | jax.Array) -> jax.Array:
  """leaf[layer], compiled once per shape and not once per layer."""
  return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _gathered(piece: shards.HFTensor, leaf: Any) -> np.ndarray:
  """One HF tensor on the host, whole, in the file's dtype and orientation."""
  entry = piece.entry
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
