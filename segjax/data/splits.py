"""Splits of a data set by name and slice, in the notation of `datasets`: 'train[:90%]+test'."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from segjax.errors import UserError

Part = TypeVar('Part')


def split_names(spec: str) -> list[str]:
  """Returns the names in a specification, without slices: 'a[:9]+b' has a and b."""
  return [re.split(r'[\[(]', part)[0].strip() for part in spec.split('+')]


def is_sliced(spec: str) -> bool:
  """Returns whether a specification is more than the name of a split."""
  return '[' in spec or '(' in spec


def check_names(spec: str, names: Sequence[str], path: str) -> None:
  """Raises UserError unless all splits of a specification are among `names`."""
  for name in split_names(spec):
    if name not in names:
      raise UserError(f'{path}: no split {name!r}; it has {", ".join(sorted(names))}.')


def find_slices(spec: str, sizes: Mapping[str, int], path: str) -> list[tuple[str, int, int]]:
  """Returns (split, first row, last row + 1) of each part of a specification.

  Args:
    spec: names with slices, each in rows or percent: 'train[100:200]', 'train[-10%:]'.
    sizes: number of rows of each split.
    path: the data set, for errors.

  Raises:
    UserError: the specification cannot be read, or a slice has no rows.
  """
  import datasets

  try:
    parts = datasets.ReadInstruction.from_spec(spec).to_absolute(dict(sizes))
  except (ValueError, AssertionError) as error:
    raise UserError(
      f'{path}: data.split={spec!r} cannot be read ({error}); write train, train[:90%] or '
      'train[100:200], joined by +.'
    ) from error
  for part in parts:
    if part.from_ >= part.to:
      raise UserError(
        f'{path}: data.split={spec!r} selects no row of the {sizes[part.splitname]} in '
        f'{part.splitname!r}; change the slice.'
      )
  return [(part.splitname, part.from_, part.to) for part in parts]


def cut(parts: Sequence[Part], first: int, last: int, cut_part: Callable) -> list[Part]:
  """Returns the rows from `first` to `last` - 1 of several parts in a row.

  Args:
    parts: sequences of rows.
    first: first row, counted over all parts.
    last: last row + 1.
    cut_part: (part, first row, last row + 1) -> these rows of a part.
  """
  pieces, start = [], 0
  for part in parts:
    low, high = max(first - start, 0), min(last - start, len(part))
    if low < high:
      pieces.append(cut_part(part, low, high))
    start += len(part)
  return pieces
