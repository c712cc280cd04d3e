"""Converts config.json of an HF Llama to LlamaConfig and back.

Names and shapes of tensors are mapped by `tensor_names`.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from segjax.errors import UserError
from segjax.hf import checkpoint
from segjax.hf.tensor_names import HEADS, SCORE
from segjax.model.llama import LlamaConfig
from segjax.model.rope import RopeScaling

_ROPE_TYPES = ('default', 'linear', 'llama3')
_REQUIRED = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
)
# Larger values are of a damaged file. Positions are counted in int32.
_MAX = {
  'vocab_size': 1 << 24,
  'hidden_size': 1 << 20,
  'intermediate_size': 1 << 24,
  'num_hidden_layers': 4096,
  'num_attention_heads': 1 << 16,
  'num_key_value_heads': 1 << 16,
  'head_dim': 1 << 16,
  'max_position_embeddings': (1 << 31) - 1,
  'original_max_position_embeddings': (1 << 31) - 1,
}
# The key of the number of experts in Mixtral's, Qwen's and DeepSeek's configs.
_EXPERTS = ('num_local_experts', 'num_experts', 'n_routed_experts')


def config_from_hf(source: dict[str, Any] | str | Path, **runtime: Any) -> LlamaConfig:
  """Returns the network that a config.json describes; missing keys have HF Llama's defaults.

  Args:
    source: the parsed JSON, a config.json, or the directory that holds it.
    runtime: fields of LlamaConfig that are not in the file: dtype, remat, attention.

  Raises:
    ValueError: the model is not a Llama, or not one that this network computes exactly.
  """
  location, raw = 'config', source
  if not isinstance(source, dict):
    file = Path(source)
    file = file / checkpoint.CONFIG if file.is_dir() else file
    location, raw = str(file), checkpoint.read_json(file)
  _check_supported(location, raw)
  heads = raw['num_attention_heads']
  head_dim = _size(location, raw, 'head_dim', raw['hidden_size'] // heads)
  kv_heads = _size(location, raw, 'num_key_value_heads', heads)
  if heads % kv_heads or head_dim % 2 or (not raw.get('head_dim') and raw['hidden_size'] % heads):
    raise UserError(
      f'{location}: hidden_size={raw["hidden_size"]}, num_attention_heads={heads}, '
      f'num_key_value_heads={kv_heads}, head_dim={head_dim} do not fit: heads are a multiple of '
      'key/value heads, head_dim is even, and without head_dim heads divide hidden_size.'
    )
  longest = _size(location, raw, 'max_position_embeddings', 2048)
  rope = checkpoint.rope_parameters(raw, location)
  fields = {key: int(raw[key]) for key in _REQUIRED} | {
    'num_key_value_heads': kv_heads,
    'head_dim': head_dim,
    'max_position_embeddings': longest,
    'rms_norm_eps': _number(location, raw, 'rms_norm_eps', 1e-6),
    'rope_theta': _number(location, rope, 'rope_theta'),
    'rope_scaling': _rope_scaling(location, rope, longest),
    'tie_word_embeddings': _flag(location, raw, 'tie_word_embeddings'),
    'attention_bias': _flag(location, raw, 'attention_bias'),
    'mlp_bias': _flag(location, raw, 'mlp_bias'),
    'initializer_range': _number(location, raw, 'initializer_range', 0.02),
  }
  return LlamaConfig(**(fields | runtime))


def head_name(raw: dict[str, Any]) -> str:
  """Returns the name of the scalar head's module by a raw config.json; 'score' by default."""
  name = raw.get('value_head_prefix') or SCORE
  if not isinstance(name, str) or not re.fullmatch(r'[\w.]+', name):
    raise UserError(
      f'{checkpoint.CONFIG}: value_head_prefix is {name!r}, not the name of a module.'
    )
  return name


def _size(location: str, raw: dict[str, Any], key: str, default: int) -> int:
  """Returns the positive integer raw[key]; `default` if it is absent, null or 0."""
  value = raw.get(key) or default
  if not _is_number(value) or not 0 < value <= _MAX[key] or value != int(value):
    raise UserError(f'{location}: {key} is {value!r}; it must be an integer from 1 to {_MAX[key]}.')
  return int(value)


def _number(location: str, raw: dict[str, Any], key: str, default: float | None = None) -> float:
  """Returns the positive number raw[key]; `default`, if provided, if it is absent or null."""
  value = default if raw.get(key) is None else raw[key]
  if not _is_number(value) or not 0 < value < math.inf:
    raise UserError(f'{location}: {key} is {value!r}; it must be a positive number.')
  return float(value)


def _flag(location: str, raw: dict[str, Any], key: str) -> bool:
  """Returns raw[key]; False if it is absent or null. A text such as "false" would count as true."""
  value = raw.get(key)
  if value is not None and not isinstance(value, bool):
    raise UserError(f'{location}: {key} is {value!r}; it must be true or false.')
  return bool(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _check_supported(location: str, raw: dict[str, Any]) -> None:
  """Raises ValueError unless the model is a Llama that this network computes."""
  kind = raw.get('model_type')
  if kind != 'llama':
    raise UserError(f'{location}: model_type is {kind!r}; only llama models are read.')
  quantization = raw.get('quantization_config')
  if quantization:
    method = quantization.get('quant_method') if isinstance(quantization, dict) else None
    raise UserError(
      f'{location}: quantization_config ({method or "unknown"}): quantized weights are not read; '
      'use the unquantized checkpoint.'
    )
  activation = raw.get('hidden_act') or 'silu'
  if activation not in ('silu', 'swish'):
    raise UserError(f'{location}: hidden_act is {activation!r}; only silu (SwiGLU) is computed.')
  window = raw.get('sliding_window')
  if window is not None and raw.get('use_sliding_window', True):
    raise UserError(
      f'{location}: sliding_window is {window!r}; only attention to all earlier tokens is computed.'
    )
  for key in _EXPERTS:
    if (raw.get(key) or 1) != 1:
      raise UserError(
        f'{location}: {key} is {raw[key]!r}; mixtures of experts are not computed, only one MLP is.'
      )
  for key in _REQUIRED:
    if raw.get(key) is None:
      raise UserError(f'{location}: {key} is missing; it must be an integer from 1 to {_MAX[key]}.')
    _size(location, raw, key, 0)


def _rope_scaling(location: str, rope: dict[str, Any], longest: int) -> RopeScaling | None:
  """Returns the scaling of normalized RoPE parameters; None for plain RoPE."""
  kind = rope['rope_type']
  if kind not in _ROPE_TYPES:
    raise UserError(
      f'{location}: rope type {kind!r} is not computed; {", ".join(_ROPE_TYPES)} are.'
    )
  nested = [key for key, value in rope.items() if isinstance(value, dict)]
  if nested:
    raise UserError(
      f'{location}: RoPE of its own for {nested[0]!r} layers is not computed; only one for all is.'
    )
  if rope['partial_rotary_factor'] != 1:
    raise UserError(
      f'{location}: partial_rotary_factor={rope["partial_rotary_factor"]} is not computed; only 1, '
      'the rotation of the whole head, is.'
    )
  if kind == 'default':
    return None
  needed = ['factor'] + ['low_freq_factor', 'high_freq_factor'] * (kind == 'llama3')
  for key in needed:
    if not _is_number(rope.get(key)) or not 0 < rope[key] < math.inf:
      raise UserError(
        f'{location}: rope type {kind!r} needs {key}, a positive number; it is {rope.get(key)!r}.'
      )
  if kind == 'linear':
    return RopeScaling('linear', float(rope['factor']))
  low, high = float(rope['low_freq_factor']), float(rope['high_freq_factor'])
  if low >= high:
    raise UserError(
      f"{location}: rope type 'llama3' needs low_freq_factor below high_freq_factor; found {low:g} "
      f'and {high:g}.'
    )
  original = _size(location, rope, 'original_max_position_embeddings', longest)
  return RopeScaling('llama3', float(rope['factor']), low, high, original)


# Keys of a base config.json that config_to_hf replaces; others are copied.
_OWNED = (
  *_REQUIRED,
  'architectures',
  'attention_bias',
  'head_dim',
  'hidden_act',
  'initializer_range',
  'max_position_embeddings',
  'mlp_bias',
  'model_type',
  'num_key_value_heads',
  'rms_norm_eps',
  'rope_scaling',
  'rope_theta',
  'tie_word_embeddings',
)
# Keys of a base that are dropped: other spellings of replaced ones, code that is not copied, heads.
_DROPPED = (
  'rope_parameters',
  'dtype',
  'auto_map',
  '_name_or_path',
  'num_labels',
  'value_head_prefix',
  'id2label',
  'label2id',
  'problem_type',
)
_SPECIAL_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def config_to_hf(
  config: LlamaConfig,
  head: str,
  *,
  dtype: str = '',
  base_config: dict[str, Any] | None = None,
  extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the config.json of a model, in a form that transformers 4 and 5 both read.

  RoPE is written as rope_theta and rope_scaling, the only form that both read; a scalar head as
  LlamaForSequenceClassification with one label.

  Args:
    config: the network.
    head: 'language' or 'scalar'.
    dtype: dtype of the weights; '' keeps the base's torch_dtype.
    base_config: raw config.json of the model's source, whose other keys are copied.
    extra: further keys, such as the ids of special tokens, which are null without base and extra.

  Raises:
    ValueError: `extra` has a key that the network determines.
  """
  if head not in HEADS:
    raise UserError(f'head={head!r} is not one of {HEADS}.')
  conflicting = sorted(set(extra or ()) & {*_OWNED, *_DROPPED})
  if conflicting:
    raise UserError(
      f'extra config key {conflicting[0]!r} is determined by the model; leave it out.'
    )
  base = {k: v for k, v in (base_config or {}).items() if k not in _DROPPED}
  fields = {
    key: getattr(config, key)
    for key in _OWNED
    if key not in ('architectures', 'hidden_act', 'model_type', 'rope_scaling')
  }
  written = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'hidden_act': 'silu',
    'rope_scaling': _rope_to_hf(config.rope_scaling),
    **fields,
  }
  if head == 'scalar':
    written |= {
      'architectures': ['LlamaForSequenceClassification'],
      'id2label': {'0': 'LABEL_0'},
      'label2id': {'LABEL_0': 0},
      'value_head_prefix': SCORE,
    }
  base_dtype = (base_config or {}).get('dtype') or base.get('torch_dtype')
  if dtype or base_dtype:
    written['torch_dtype'] = dtype or base_dtype
  return dict.fromkeys(_SPECIAL_IDS) | base | written | (extra or {})


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  if scaling.kind == 'linear':
    return {'rope_type': 'linear', 'factor': scaling.factor}
  fields = dataclasses.asdict(scaling)
  return {'rope_type': fields.pop('kind'), **fields}
