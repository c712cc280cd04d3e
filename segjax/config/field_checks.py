"""Checks of one value by type, choices and minimum, for settings and for files of settings."""

import difflib
import math
import types
import typing
from typing import Any

from segjax.errors import UserError


def typed(key: str, value: Any, kind: Any) -> Any:
  """Returns the value as `kind`; the names of a tuple may also come joined by commas.

  An integer is also a float; a bool is neither.

  Args:
    key: names the value in errors.
    value: the value.
    kind: str, bool, int, float, a tuple of str, or one of them or None.

  Raises:
    UserError: the value has another type, or is not finite.
  """
  if isinstance(kind, types.UnionType):  # `X | None`
    if value is None:
      return None
    kind = next(member for member in typing.get_args(kind) if member is not types.NoneType)
  if typing.get_origin(kind) is tuple:
    parts = value if isinstance(value, tuple | list) else [value]
    # The command line reads 0,1 as numbers.
    names = (name.strip() for part in parts for name in str(part).split(','))
    return tuple(name for name in names if name)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = _as_float(key, value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise UserError(f'{key}={value!r} must be of type {kind.__name__}.')
  if kind is float and not math.isfinite(value):
    raise UserError(f'{key}={value!r} must be finite.')
  return value


def _as_float(key: str, value: int) -> float:
  try:
    return float(value)
  except OverflowError:
    raise UserError(f'{key} is an integer of {value.bit_length()} bits, too large.') from None


def check_choice(key: str, value: str, names: tuple[str, ...]) -> None:
  """Raises UserError, with the nearest name, unless `value` is one of the names."""
  if value not in names:
    near = difflib.get_close_matches(value, names, n=1)
    hint = f'; did you mean {near[0]!r}?' if near else '.'
    listed = ', '.join(name or "''" for name in names)
    raise UserError(f'{key}={value!r} is not one of {listed}{hint}')


def check_minimum(key: str, value: int | float, minimum: int | float) -> None:
  """Raises UserError unless `value` is at least `minimum`."""
  if value < minimum:
    raise UserError(f'{key}={value} must be at least {minimum}.')
