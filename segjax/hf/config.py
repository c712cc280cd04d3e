"""config.json of an HF Llama against LlamaConfig, both ways.

The names and shapes of tensors are `layout`'s.
"""

import dataclasses
from pathlib import Path
from typing import Any

from segjax.hf import headers
from segjax.hf.layout import HEADS, SCORE
from segjax.model.llama import LlamaConfig, RopeScaling

_ROPE_TYPES = ('default', 'linear', 'llama3')
_REQUIRED = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
)


def config_from_hf(source: dict[str, Any] | str | Path, **runtime: Any) -> LlamaConfig:
  """The network that a config.json describes; what the file leaves out is HF Llama's default.

  Args:
    source: the parsed JSON, a config.json, or the directory that holds it.
    runtime: fields of LlamaConfig that the file does not decide: dtype, remat, attention.

  Raises:
    ValueError: where the model is no Llama, or one that this network does not compute exactly.
  """
  where, raw = 'config', source
  if not isinstance(source, dict):
    file = Path(source)
    file = file / headers.CONFIG if file.is_dir() else file
    where, raw = str(file), headers.read_json(file)
  _check_supported(where, raw)
  heads = raw['num_attention_heads']
  head_dim = raw.get('head_dim') or raw['hidden_size'] // heads
  kv_heads = raw.get('num_key_value_heads') or heads
  if heads % kv_heads or head_dim % 2 or (not raw.get('head_dim') and raw['hidden_size'] % heads):
    raise ValueError(
      f'{where}: hidden_size={raw["hidden_size"]}, num_attention_heads={heads}, '
      f'num_key_value_heads={kv_heads}, head_dim={head_dim} do not fit: heads are a multiple of '
      'key/value heads, head_dim is even, and without head_dim heads divide hidden_size.'
    )
  longest = _get(raw, 'max_position_embeddings', 2048)
  rope = headers.rope_parameters(raw)
  fields = {key: raw[key] for key in _REQUIRED} | {
    'num_key_value_heads': kv_heads,
    'head_dim': head_dim,
    'max_position_embeddings': longest,
    'rms_norm_eps': float(_get(raw, 'rms_norm_eps', 1e-6)),
    'rope_theta': float(rope['rope_theta']),
    'rope_scaling': _rope_scaling(where, rope, longest),
    'tie_word_embeddings': bool(raw.get('tie_word_embeddings')),
    'attention_bias': bool(raw.get('attention_bias')),
    'mlp_bias': bool(raw.get('mlp_bias')),
    'initializer_range': float(_get(raw, 'initializer_range', 0.02)),
  }
  return LlamaConfig(**(fields | runtime))


def head_name(raw: dict[str, Any]) -> str:
  """What a raw config.json calls the scalar head's module; 'score' unless it says otherwise."""
  return str(raw.get('value_head_prefix') or SCORE)


def _get(raw: dict[str, Any], key: str, default: Any) -> Any:
  """raw[key], `default` where it is absent or null."""
  return default if raw.get(key) is None else raw[key]


def _check_supported(where: str, raw: dict[str, Any]) -> None:
  kind = raw.get('model_type')
  if kind != 'llama':
    raise ValueError(f'{where}: model_type is {kind!r}; only llama models are read.')
  if raw.get('quantization_config'):
    method = raw['quantization_config'].get('quant_method', 'unknown')
    raise ValueError(
      f'{where}: quantization_config ({method}): quantized weights are not read; use the '
      'unquantized checkpoint.'
    )
  activation = raw.get('hidden_act') or 'silu'
  if activation != 'silu':
    raise ValueError(f'{where}: hidden_act is {activation!r}; only silu (SwiGLU) is computed.')
  for key in _REQUIRED:
    value = raw.get(key)
    if not isinstance(value, int) or value <= 0:
      found = f'is {value!r}' if key in raw else 'is missing'
      raise ValueError(f'{where}: {key} {found}; it must be a positive integer.')


def _rope_scaling(where: str, rope: dict[str, Any], longest: int) -> RopeScaling | None:
  """The scaling of normalised RoPE parameters; None for plain RoPE."""
  kind = rope['rope_type']
  if kind not in _ROPE_TYPES:
    raise ValueError(f'{where}: rope type {kind!r} is not computed; {", ".join(_ROPE_TYPES)} are.')
  if rope['partial_rotary_factor'] != 1:
    raise ValueError(
      f'{where}: partial_rotary_factor={rope["partial_rotary_factor"]} is not computed; only 1, '
      'the rotation of the whole head, is.'
    )
  if kind == 'default':
    return None
  needed = ['factor'] + ['low_freq_factor', 'high_freq_factor'] * (kind == 'llama3')
  for key in needed:
    if not isinstance(rope.get(key), int | float) or rope[key] <= 0:
      raise ValueError(
        f'{where}: rope type {kind!r} needs {key}, a positive number; found {rope.get(key)!r}.'
      )
  if kind == 'linear':
    return RopeScaling('linear', float(rope['factor']))
  return RopeScaling(
    'llama3',
    float(rope['factor']),
    float(rope['low_freq_factor']),
    float(rope['high_freq_factor']),
    _get(rope, 'original_max_position_embeddings', longest),
  )


# What config_to_hf writes: these keys of a base config.json are replaced, all others are kept.
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
# Left out of a base: a second spelling of what is written, code that is not copied, another head.
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
  """The config.json of a model, which transformers 4 and 5 both read.

  RoPE is written as rope_theta and rope_scaling, the one form that both know; a scalar head as
  LlamaForSequenceClassification with one label.

  Args:
    dtype: of the weights; '' says nothing about it (torch_dtype of the base is kept).
    base_config: the raw config.json that the model came from; keys unknown here are kept.
    extra: further keys, such as the ids of special tokens, which are null without base and extra.

  Raises:
    ValueError: where `extra` contradicts what the config decides.
  """
  if head not in HEADS:
    raise ValueError(f'head={head!r} is not one of {HEADS}.')
  wrong = sorted(set(extra or ()) & {*_OWNED, *_DROPPED})
  if wrong:
    raise ValueError(f'extra config key {wrong[0]!r} is decided by the model; leave it out.')
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
  kept_dtype = (base_config or {}).get('dtype') or base.get('torch_dtype')
  if dtype or kept_dtype:
    written['torch_dtype'] = dtype or kept_dtype
  return dict.fromkeys(_SPECIAL_IDS) | base | written | (extra or {})


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  if scaling.kind == 'linear':
    return {'rope_type': 'linear', 'factor': scaling.factor}
  fields = dataclasses.asdict(scaling)
  return {'rope_type': fields.pop('kind'), **fields}
