"""Reads the ratings of a pair's answers, under any of the names that data sets have for them."""

from typing import Any

from segjax.data.json_rows import Row
from segjax.errors import UserError, excerpt

# The keys of a pair's ratings, chosen and rejected; the first two that a row has are read.
_RATINGS = (
  ('chosen_rating', 'rejected_rating'),
  ('chosen-rating', 'rejected-rating'),
  ('chosen_score', 'rejected_score'),
)
_LARGEST_RATING = 1e38  # the difference of two is finite in float32


def rating_gap(row: Row, location: str) -> float | None:
  """Returns the chosen answer's rating minus the rejected one's, None if the row has none.

  Raises:
    UserError: one rating without the other, or a rating that is not a finite number.
  """
  for keys in _RATINGS:
    missing = [key for key in keys if row.get(key) is None]
    if len(missing) == 1:
      both = ' and '.join(f'`{key}`' for key in keys)
      raise UserError(f'{location}: `{missing[0]}` is missing; provide both {both} or neither.')
    if not missing:
      chosen, rejected = (_rating(row[key], key, location) for key in keys)
      return chosen - rejected
  return None


def _rating(value: Any, key: str, location: str) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not abs(value) <= _LARGEST_RATING:
    raise UserError(f'{location}: `{key}` must be a finite number, not {excerpt(value)}.')
  return float(value)
