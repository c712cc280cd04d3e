"""Reads single values of a raw config.json; what is wrong with one is said in one line."""

import math
from typing import Any

from segjax.errors import UserError

# Larger values are of a damaged file. Positions are counted in int32.
MAX = {
  'vocab_size': 1 << 24,
  'hidden_size': 1 << 20,
  'intermediate_size': 1 << 24,
  'num_hidden_layers': 4096,
  'num_attention_heads': 1 << 16,
  'num_key_value_heads': 1 << 16,
  'head_dim': 1 << 16,
  'sliding_window': (1 << 31) - 1,
  'max_position_embeddings': (1 << 31) - 1,
  'original_max_position_embeddings': (1 << 31) - 1,
}


def size(location: str, raw: dict[str, Any], key: str, default: int) -> int:
  """Returns the positive integer raw[key]; `default` if it is absent, null or 0."""
  value = raw.get(key) or default
  if not is_number(value) or not 0 < value <= MAX[key] or value != int(value):
    raise UserError(f'{location}: {key} is {value!r}; it must be an integer from 1 to {MAX[key]}.')
  return int(value)


def number(location: str, raw: dict[str, Any], key: str, default: float | None = None) -> float:
  """Returns the positive number raw[key]; `default`, if provided, if it is absent or null."""
  value = default if raw.get(key) is None else raw[key]
  if not is_positive(value):
    raise UserError(f'{location}: {key} is {value!r}; it must be a positive number.')
  return float(value)


def flag(location: str, raw: dict[str, Any], key: str) -> bool:
  """Returns raw[key]; False if it is absent or null. A text such as "false" would count as true."""
  value = raw.get(key)
  if value is not None and not isinstance(value, bool):
    raise UserError(f'{location}: {key} is {value!r}; it must be true or false.')
  return bool(value)


def is_number(value: Any) -> bool:
  """Returns whether a value is a number of JSON."""
  return isinstance(value, int | float) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
  """Returns whether a value is a positive, finite number of JSON."""
  return is_number(value) and 0 < value < math.inf
