"""Limits the length of rows, and counts what was truncated and dropped.

Tokens come from `segjax.data.tokenize`, which applies the limits.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from segjax.data.rows import NoRowsLeftError, Rows
from segjax.errors import UserError

_DROPPED = ('dropped_overlong', 'dropped_identical', 'dropped_empty')
_ROUND = 8  # lengths are rounded up to a multiple of this


@dataclasses.dataclass(frozen=True)
class Limits:
  """How long rows may be, in tokens, and what happens to longer ones.

  Attributes:
    max_length: limit of prompt and response together.
    max_prompt_length: limit of a pair's prompt if the pair must be truncated; of a prompt without
      response always.
    overlong_policy: 'truncate_left' truncates prompts and conversations at their beginning, 'drop'
      leaves the row out, 'error' raises.
  """

  max_length: int
  max_prompt_length: int
  overlong_policy: str = 'truncate_left'

  def __post_init__(self):
    from segjax.config.choices import OVERLONG_POLICIES  # imports jax, which workers do without

    if self.overlong_policy not in OVERLONG_POLICIES:
      raise UserError(
        f'data.overlong_policy={self.overlong_policy!r} is unknown; choose one of '
        f'{", ".join(OVERLONG_POLICIES)}.'
      )
    if not 0 < self.max_prompt_length <= self.max_length:
      raise UserError(
        f'data.max_prompt_length={self.max_prompt_length} must be at least 1 and at most '
        f'data.max_length={self.max_length}.'
      )


def pair_lengths(prompt: int, chosen: int, rejected: int, limits: Limits) -> tuple[int, int, int]:
  """Returns how many tokens of a pair are kept: the LAST of the prompt, the FIRST of the responses.

  Nothing is truncated if the prompt and the longer response fit into max_length. Otherwise the
  prompt is truncated to max_prompt_length and, if that is not enough, both responses to the rest.
  """
  if prompt + max(chosen, rejected) <= limits.max_length:
    return prompt, chosen, rejected
  prompt = min(prompt, limits.max_prompt_length)
  room = limits.max_length - prompt
  return prompt, min(chosen, room), min(rejected, room)


def truncate_response(ids: np.ndarray, length: int, stop_id: int | None) -> tuple[np.ndarray, bool]:
  """Returns the first `length` tokens of a response and whether they end in a stop token.

  With `stop_id`, the last token of a truncated response is overwritten by it.
  """
  is_complete = length == len(ids)
  if is_complete or stop_id is None or not length:
    return ids[:length], is_complete
  return np.append(ids[: length - 1], np.int32(stop_id)), True


def new_counts(num_rows: int) -> dict[str, int]:
  """Returns the counts of a dataset before any row is truncated or dropped."""
  return {'rows': num_rows, 'truncated': 0, **dict.fromkeys(_DROPPED, 0)}


def describe_counts(counts: Mapping[str, int]) -> str:
  """Returns the counts that are not zero as text: '12 rows, 3 truncated, 1 dropped empty'."""
  return ', '.join(f'{count} {name.replace("_", " ")}' for name, count in counts.items() if count)


def is_dropped(location: str, length: str, limits: Limits, counts: dict[str, int]) -> bool:
  """Returns whether an overlong row is dropped, and counts it.

  Args:
    location: file and row, for the error.
    length: the row's length in words, for the error.
    limits: the limits that the row exceeds.
    counts: its 'dropped_overlong' is incremented.

  Raises:
    ValueError: the policy is 'error'.
  """
  if limits.overlong_policy == 'error':
    raise UserError(
      f'{location}: {length} exceed data.max_length={limits.max_length} (prompt '
      f'{limits.max_prompt_length}); raise them, or set data.overlong_policy to truncate_left or '
      'drop.'
    )
  counts['dropped_overlong'] += limits.overlong_policy == 'drop'
  return limits.overlong_policy == 'drop'


def fixed_length(longest: int, limit: int, rows: Rows, counts: Mapping[str, int]) -> int:
  """Returns the length of the longest row, rounded up so that other data reuse the programs.

  Args:
    longest: tokens of the longest row; 0 if there is none.
    limit: of the length.
    rows: where the rows come from, for the error.
    counts: what became of them, for the error.

  Raises:
    ValueError: no row is left.
  """
  if not longest:
    raise NoRowsLeftError(
      f'{rows.name}: none of its {len(rows)} rows is left ({describe_counts(counts)}); raise '
      'data.max_length or check the rows.'
    )
  return min(limit, -(-longest // _ROUND) * _ROUND)
