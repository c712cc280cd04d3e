"""Sizes of the decode programs, rounded up to few values, and whether prompts have room.

How many responses and pages there are follows from the memory (`decode_memory`).
"""

from typing import NamedTuple

import numpy as np

from segjax.errors import UserError
from segjax.model.decode import DecodeConfig

_PREFILL_TOKENS = 512  # of a chunk of prompts, over all groups of rows
_MIN_PREFILL_TOKENS = 128  # of a group
_STEP = 8  # pages; up to it sizes are powers of two, then multiples of it
_SHRINK = 4  # factor by which the rows of a chunk of steps shrink
_MIN_SHRINK = 16  # rows; a program for fewer would not pay for its compilation


class PoolSize(NamedTuple):
  """Sizes of the pools of pages.

  Attributes:
    slots: responses decoded at once, over all groups of rows.
    pages: of each group and layer, page 0 included.
    columns: pages of the longest row.
  """

  slots: int
  pages: int
  columns: int


def chunk_rows(live: int, max_live: int, decoder: DecodeConfig) -> int:
  """Returns the rows of a group in a chunk of steps, for at most `live` responses in a group.

  A kernel skips free rows; elsewhere they cost as much as others, so that programs for fewer rows
  are worth their compilation.
  """
  rows = max_live
  while decoder.paged_attention == 'xla' and rows > _MIN_SHRINK and live <= -(-rows // _SHRINK):
    rows = -(-rows // _SHRINK)
  return rows


def table_columns(pages: int, columns: int, decoder: DecodeConfig) -> int:
  """Returns the columns of a chunk's table of pages, for rows of at most `pages` pages.

  A kernel reads by lengths; elsewhere all columns are read.
  """
  return columns if decoder.paged_attention != 'xla' else min(_bucket(pages), columns)


def max_columns(longest: int, decoder: DecodeConfig) -> int:
  """Returns the pages of the longest row, for prompts of up to `longest` tokens."""
  pages = -(-(longest + decoder.sampling.max_new_tokens) // decoder.page_size)
  return _bucket(pages)  # few values: prompts of a conversation grow from turn to turn


def full_pool(slots: int, groups: int, longest: int, decoder: DecodeConfig) -> PoolSize:
  """Returns pools in which every row has the pages of its full length."""
  columns = max_columns(longest, decoder)
  return PoolSize(slots, slots // groups * columns + 1, columns)


def prefill_size(tokens: int, groups: int, decoder: DecodeConfig) -> int:
  """Returns the tokens of a group in a chunk of prompts, of which all have `tokens` together."""
  if decoder.paged_attention == 'xla':
    # Each token is multiplied with all keys of the chunk, those of other prompts too.
    return min(max(_next_power_of_two(tokens), 16), _MIN_PREFILL_TOKENS)
  # One program: to read the weights from memory takes as long as to multiply with the padding.
  return max(_PREFILL_TOKENS // groups, _MIN_PREFILL_TOKENS)


def check_prompts(length: np.ndarray, decoder: DecodeConfig) -> None:
  """Raises UserError unless every prompt has a token and leaves room for a response.

  Args:
    length: tokens of each prompt, [N].
  """
  if not (length > 0).all():
    raise UserError(f'prompt {int(np.argmin(length))} is empty; leave it out.')
  max_new_tokens = decoder.sampling.max_new_tokens
  room = decoder.config.max_position_embeddings - max_new_tokens  # no further position was trained
  if length.max() > room:
    row = int(np.argmax(length))
    raise UserError(
      f'prompt {row} has {length[row]} tokens; with max_new_tokens={max_new_tokens} the network '
      f'has positions for {room}; shorten the prompt or lower max_new_tokens.'
    )


def round_up(size: int, multiple: int) -> int:
  """Rounds up to a multiple."""
  return -(-size // multiple) * multiple


def _bucket(size: int) -> int:
  # Powers of two throughout would read up to twice the positions that are filled.
  return round_up(size, _STEP) if size > _STEP else _next_power_of_two(size)


def _next_power_of_two(size: int) -> int:
  return 1 << max(int(size) - 1, 0).bit_length()
