"""Converts the RoPE parameters of config.json to `RopeScaling` and back.

Their forms in config.json are brought into one by `checkpoint.rope_parameters`.
"""

import dataclasses
from typing import Any

from segjax.errors import UserError
from segjax.hf.config_fields import is_positive, size
from segjax.model.rope import RopeScaling

_ROPE_TYPES = ('default', 'linear', 'llama3')


def read_scaling(location: str, rope: dict[str, Any], longest: int) -> RopeScaling | None:
  """Returns the scaling of normalized RoPE parameters; None for plain RoPE.

  Args:
    location: the file, for errors.
    rope: see `checkpoint.rope_parameters`.
    longest: positions of the network.

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


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
  """Returns rope_scaling of config.json in a form that transformers 4 and 5 both read."""
  if scaling is None:
    return None
  if scaling.kind == 'linear':
    return {'rope_type': 'linear', 'factor': scaling.factor}
  fields = dataclasses.asdict(scaling)
  return {'rope_type': fields.pop('kind'), **fields}
