"""Converts config.json of an HF Llama to LlamaConfig and back.

Names and shapes of tensors are mapped by `tensor_names`.
"""

import re
from pathlib import Path
from typing import Any

from segjax.errors import UserError
from segjax.hf import checkpoint
from segjax.hf.config_fields import MAX, flag, number, size
from segjax.hf.families import FAMILIES, find_family, with_defaults
from segjax.hf.rope_config import read_scaling, scaling_to_hf
from segjax.hf.tensor_names import HEADS, SCORE
from segjax.model.llama import LlamaConfig

_REQUIRED = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
)
# The key of the number of experts in Mixtral's, Qwen's and DeepSeek's configs.
_EXPERTS = ('num_local_experts', 'num_experts', 'n_routed_experts')


def config_from_hf(source: dict[str, Any] | str | Path, **runtime: Any) -> LlamaConfig:
  """Returns the network that a config.json describes; missing keys have transformers' defaults.

  A network whose tokens see only a window of those before them is read with as many positions as
  that window: up to there every token sees all before it. One with 'longrope' is read with its
  original positions, for which the short factors are.

  Args:
    source: the parsed JSON, a config.json, or the directory that holds it.
    runtime: fields of LlamaConfig that are not in the file: dtype, remat, attention.

  Raises:
    ValueError: the model is not of a family that is read, or not one that this network computes
      exactly.
  """
  location, raw = 'config', source
  if not isinstance(source, dict):
    file = Path(source)
    file = file / checkpoint.CONFIG if file.is_dir() else file
    location, raw = str(file), checkpoint.read_json(file)
  family = find_family(location, raw)
  raw = with_defaults(family, raw)
  _check_supported(location, raw)
  heads = raw['num_attention_heads']
  head_dim = size(location, raw, 'head_dim', raw['hidden_size'] // heads)
  kv_heads = size(location, raw, 'num_key_value_heads', heads)
  if heads % kv_heads or head_dim % 2 or (not raw.get('head_dim') and raw['hidden_size'] % heads):
    raise UserError(
      f'{location}: hidden_size={raw["hidden_size"]}, num_attention_heads={heads}, '
      f'num_key_value_heads={kv_heads}, head_dim={head_dim} do not fit: heads are a multiple of '
      'key/value heads, head_dim is even, and without head_dim heads divide hidden_size.'
    )
  longest, window = _positions(location, raw)
  rope = checkpoint.rope_parameters(raw, location)
  theta = number(location, rope, 'rope_theta')
  scaling = read_scaling(location, rope, longest, head_dim)
  if scaling and scaling.kind == 'longrope':
    window = min(window, scaling.original_max_position_embeddings)
  bias = flag(location, raw, 'attention_bias')
  fields = {key: int(raw[key]) for key in _REQUIRED} | {
    'family': family,
    'num_key_value_heads': kv_heads,
    'head_dim': head_dim,
    'max_position_embeddings': min(longest, window),
    'rms_norm_eps': number(location, raw, 'rms_norm_eps', 1e-6),
    'rope_theta': theta,
    'rope_scaling': scaling,
    'tie_word_embeddings': flag(location, raw, 'tie_word_embeddings'),
    'attention_bias': bias,
    'output_bias': bias,
    'mlp_bias': flag(location, raw, 'mlp_bias'),
    'initializer_range': number(location, raw, 'initializer_range', 0.02),
  }
  return LlamaConfig(**(fields | FAMILIES[family].fixed | runtime))


def _positions(location: str, raw: dict[str, Any]) -> tuple[int, int]:
  """Returns a network's positions, and how many tokens a token sees, itself included."""
  longest = size(location, raw, 'max_position_embeddings', 2048)
  if raw.get('sliding_window') is None or not raw.get('use_sliding_window', True):
    return longest, longest
  return longest, size(location, raw, 'sliding_window', longest)


def head_name(raw: dict[str, Any]) -> str:
  """Returns the name of the scalar head's module by a raw config.json; 'score' by default."""
  name = raw.get('value_head_prefix') or SCORE
  if not isinstance(name, str) or not re.fullmatch(r'[\w.]+', name):
    raise UserError(
      f'{checkpoint.CONFIG}: value_head_prefix is {name!r}, not the name of a module.'
    )
  return name


def _check_supported(location: str, raw: dict[str, Any]) -> None:
  """Raises ValueError unless the model is one that this network computes."""
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
  for key in _EXPERTS:
    if (raw.get(key) or 1) != 1:
      raise UserError(
        f'{location}: {key} is {raw[key]!r}; mixtures of experts are not computed, only one MLP is.'
      )
  for key in _REQUIRED:
    if raw.get(key) is None:
      raise UserError(f'{location}: {key} is missing; it must be an integer from 1 to {MAX[key]}.')
    size(location, raw, key, 0)


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

  RoPE is written as rope_theta and rope_scaling, the only form that both read; a scalar head as a
  ...ForSequenceClassification with one label.

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
  family = FAMILIES[config.family]
  base = {k: v for k, v in (base_config or {}).items() if k not in _DROPPED}
  written = _network_to_hf(config)
  longest, window = _positions(checkpoint.CONFIG, with_defaults(config.family, base))
  if base_config is None and 'sliding_window' in family.defaults:
    written['sliding_window'] = None
  elif base_config and min(longest, window) == config.max_position_embeddings:
    written['max_position_embeddings'] = longest  # the window, which is copied, limits them
  if head == 'scalar':
    written |= {
      'architectures': [f'{family.classes}ForSequenceClassification'],
      'id2label': {'0': 'LABEL_0'},
      'label2id': {'LABEL_0': 0},
      'value_head_prefix': SCORE,
    }
  base_dtype = (base_config or {}).get('dtype') or base.get('torch_dtype')
  if dtype or base_dtype:
    written['torch_dtype'] = dtype or base_dtype
  return dict.fromkeys(_SPECIAL_IDS) | base | written | (extra or {})


def _network_to_hf(config: LlamaConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a language model of this network."""
  family, scaling = FAMILIES[config.family], config.rope_scaling
  others = ('architectures', 'hidden_act', 'model_type', 'rope_scaling', *family.fixed)
  written = {
    'architectures': [f'{family.classes}ForCausalLM'],
    'model_type': config.family,
    'hidden_act': 'silu',
    'rope_scaling': scaling_to_hf(scaling),
    **{key: getattr(config, key) for key in _OWNED if key not in others},
  }
  if scaling and scaling.kind == 'longrope':
    original = scaling.original_max_position_embeddings
    written['original_max_position_embeddings'] = original
    written['max_position_embeddings'] = round(scaling.factor * original)
  return written
