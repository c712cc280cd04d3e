"""Summarizes an HF checkpoint or adapter as text, from its config and tensor headers only.

Whether it can be loaded is checked by `reader`. jax is not imported.
"""

import collections
from pathlib import Path
from typing import Any

from segjax.hf.adapter_config import is_adapter, read_adapter
from segjax.hf.checkpoint import (
  ADAPTER_WEIGHTS,
  CONFIG,
  Checkpoint,
  open_checkpoint,
  read_header,
  read_json,
  resolve_checkpoint,
  rope_parameters,
)

_GENERATION = 'generation_config.json'
_SPECIAL_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
_SIZES = (
  'num_hidden_layers',
  'hidden_size',
  'intermediate_size',
  'num_attention_heads',
  'num_key_value_heads',
  'head_dim',
  'vocab_size',
  'max_position_embeddings',
)
_SCORES = ('value_head_prefix', 'normalize_reward', 'mean', 'std')  # of reward models


def inspect(path: str | Path) -> str:
  """Returns names, dtypes and shapes of the tensors of a directory or hub id, and a summary.

  Raises:
    ValueError: files are missing or invalid; see `checkpoint.open_checkpoint`.
  """
  directory = resolve_checkpoint(path)
  if is_adapter(directory):
    return _describe_adapter(directory)
  checkpoint = open_checkpoint(directory)
  raw = read_json(checkpoint.directory / CONFIG)
  rows = {
    'model': f'{raw.get("model_type")} ({_join(raw.get("architectures")) or "no architecture"})',
    'sizes': _select(raw, _SIZES),
    'rope': _rope(raw),
    'embeddings': 'tied' if raw.get('tie_word_embeddings') else 'untied',
    'special ids': _special_ids(checkpoint.directory, raw),
    'scores': _select(raw, _SCORES),
    'quantization': _quantization(raw),
    'other files': _other_files(checkpoint.directory),
    'weights': _weights(checkpoint),
  }
  return _table(checkpoint, rows)


def _describe_adapter(directory: Path) -> str:
  adapter = read_adapter(directory)
  lora = adapter.lora
  checkpoint = Checkpoint(directory, read_header(directory / ADAPTER_WEIGHTS))
  rows = {
    'adapter': f'rank {lora.rank} of {", ".join(lora.targets)}',
    'scale': f'alpha {lora.alpha:g} / {"√" if lora.rs else ""}rank = {lora.scale:g}',
    'base': adapter.base,
    'scores': 'scalar head' if adapter.has_score else '',
    'vocabulary': 'a head of its own' if lora.train_head else '',
    'other files': _other_files(directory),
    'weights': _weights(checkpoint),
  }
  return _table(checkpoint, rows)


def _table(checkpoint: Checkpoint, rows: dict[str, str]) -> str:
  width = max(map(len, checkpoint.tensors), default=0)
  lines = [
    f'{name:{width}}  {tensor.dtype:4}  {list(tensor.shape)}'
    for name, tensor in checkpoint.tensors.items()
  ]
  return '\n'.join([*lines, '', *(f'{name:12}  {row}' for name, row in rows.items() if row)])


def _join(values: Any) -> str:
  return ', '.join(map(str, values)) if isinstance(values, list) else str(values or '')


def _select(raw: dict[str, Any], keys: tuple[str, ...]) -> str:
  return ', '.join(f'{key} {raw[key]}' for key in keys if raw.get(key) is not None)


def _rope(raw: dict[str, Any]) -> str:
  rope = rope_parameters(raw)
  kind, theta = rope.pop('rope_type'), rope.pop('rope_theta')
  if rope.get('partial_rotary_factor') == 1:
    rope.pop('partial_rotary_factor')
  more = ''.join(f', {key} {value}' for key, value in rope.items())
  return f'{kind}, theta {theta:g}{more}' if isinstance(theta, int | float) else f'{kind}{more}'


def _special_ids(directory: Path, raw: dict[str, Any]) -> str:
  """Returns the special ids of config.json, and those of generation_config.json that differ."""
  generation = {}
  if (directory / _GENERATION).is_file():
    generation = read_json(directory / _GENERATION)
  parts = []
  for key in _SPECIAL_IDS:
    own, other = raw.get(key), generation.get(key)
    text = f'{key.removesuffix("_token_id")} {"none" if own is None else _join_ids(own)}'
    if other is not None and other != own:
      text += f' ({_GENERATION}: {_join_ids(other)})'
    parts.append(text)
  return ', '.join(parts)


def _join_ids(ids: Any) -> str:
  return ' '.join(map(str, ids)) if isinstance(ids, list) else str(ids)


def _quantization(raw: dict[str, Any]) -> str:
  config = raw.get('quantization_config')
  return str(config.get('quant_method', config) if isinstance(config, dict) else config or '')


def _other_files(directory: Path) -> str:
  """Returns the names of the files that define tokens, chat template and scores."""
  names = ('tokenizer.json', 'tokenizer.model', 'chat_template.jinja', 'segment_reward.json')
  return ', '.join(name for name in names if (directory / name).is_file())


def _weights(checkpoint: Checkpoint) -> str:
  tensors = checkpoint.tensors.values()
  dtypes = collections.Counter()
  for tensor in tensors:
    dtypes[tensor.dtype] += tensor.size
  parts = ', '.join(f'{dtype} {size:,}' for dtype, size in dtypes.most_common())
  files = len({tensor.file for tensor in tensors})
  num_bytes = sum(tensor.num_bytes for tensor in tensors)
  return (
    f'{checkpoint.num_parameters():,} parameters in {len(tensors)} tensors, '
    f'{files} file{"" if files == 1 else "s"}, {num_bytes / 1e9:.3f} GB ({parts})'
  )
