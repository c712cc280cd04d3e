"""Converts the RoPE parameters of config.json to `RopeScaling` and back.

Their forms in config.json are brought into one by `checkpoint.rope_parameters`.
"""

import math
from typing import Any

from segjax.errors import UserError, excerpt
from segjax.hf.config_fields import is_positive, number, size
from segjax.model.rope import RopeScaling

_ROPE_TYPES = ('default', 'linear', 'llama3', 'longrope', 'su')  # su: the last, by its old name


def read_scaling(
  location: str, rope: dict[str, Any], longest: int, head_dim: int
) -> RopeScaling | None:
  """Returns the scaling of normalized RoPE parameters; None for plain RoPE.

  Args:
    location: the file, for errors.
    rope: see `checkpoint.rope_parameters`.
    longest: positions of the network.
    head_dim: width of a head.

  Raises:
    UserError: it is not one that is computed here.
  """
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
  if kind in ('longrope', 'su'):
    return _read_longrope(location, rope, longest, head_dim)
  needed = ['factor'] + ['low_freq_factor', 'high_freq_factor'] * (kind == 'llama3')
  for key in needed:
    if not is_positive(rope.get(key)):
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
  original = size(location, rope, 'original_max_position_embeddings', longest)
  return RopeScaling('llama3', float(rope['factor']), low, high, original)


def _read_longrope(location: str, rope: dict[str, Any], longest: int, head_dim: int) -> RopeScaling:
  factors = {}
  for key in ('short_factor', 'long_factor'):
    value = rope.get(key)
    is_list = isinstance(value, list) and all(map(is_positive, value))
    if not is_list or len(value) != head_dim // 2:
      raise UserError(
        f"{location}: rope type 'longrope' needs {key}, {head_dim // 2} positive numbers for a "
        f'head_dim of {head_dim}; it is {excerpt(value)}.'
      )
    factors[key] = tuple(map(float, value))
  original = size(location, rope, 'original_max_position_embeddings', longest)
  ratio = longest / original
  attention = _attention_factor(number(location, rope, 'factor', ratio), original)
  return RopeScaling(
    'longrope',
    ratio,
    original_max_position_embeddings=original,
    attention_factor=number(location, rope, 'attention_factor', attention),
    **factors,
  )


def _attention_factor(factor: float, original: int) -> float:
  """Returns √(1 + ln factor / ln original), that of transformers where the config has none."""
  return 1.0 if min(factor, original) <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
  """Returns rope_scaling of config.json in a form that transformers 4 and 5 both read."""
  if scaling is None:
    return None
  if scaling.kind == 'linear':
    return {'rope_type': 'linear', 'factor': scaling.factor}
  if scaling.kind == 'longrope':
    # transformers 4 reads these three keys, and no others beside them.
    written = {'type': 'longrope', 'short_factor': list(scaling.short_factor)}
    written['long_factor'] = list(scaling.long_factor)
    own, original = scaling.attention_factor, scaling.original_max_position_embeddings
    is_default = own == _attention_factor(scaling.factor, original)
    return written if is_default else written | {'attention_factor': own}
  names = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
  return {'rope_type': scaling.kind, **{name: getattr(scaling, name) for name in names}}
