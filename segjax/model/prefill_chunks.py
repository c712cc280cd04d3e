"""Packs the prompts that are about to be read into chunks of one size, on the host."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from segjax.model.decode_cache import PrefillChunk
from segjax.model.paged_attention import PrefillRows

_MEAN_TOKENS = 16  # of a prompt, at least: a chunk has room for the pages of so many rows


class Read(NamedTuple):
  """Tokens whose keys and values are to be written to pages.

  Attributes:
    ids: the tokens, from position 0.
    pages: their pages.
  """

  ids: np.ndarray
  pages: list[int]


def prefill_chunks(reads: list[list[Read]], columns: int, size: int) -> Iterator[PrefillChunk]:
  """Yields chunks that read all of `reads`, in order.

  A chunk has tokens of several prompts in turn; a prompt is cut only where the chunk ends. So only
  the first prompt of a chunk may have begun in an earlier one.

  Args:
    reads: of each group of rows.
    columns: of the tables of pages.
    size: tokens of a group in a chunk.
  """
  pending = [list(group)[::-1] for group in reads]  # the next one is the last
  begin = [0] * len(pending)  # tokens of the next one that earlier chunks have read
  while any(pending):
    groups = [_Group(size, columns) for _ in pending]
    for i, (reading, group) in enumerate(zip(groups, pending, strict=True)):
      while group and reading.has_room:
        begin[i] = reading.add(group[-1], begin[i])
        if begin[i] == len(group[-1].ids):
          group.pop()
          begin[i] = 0
    yield PrefillChunk(
      np.stack([group.ids for group in groups]),
      np.stack([group.position for group in groups]),
      PrefillRows(*map(np.stack, zip(*(group.rows() for group in groups), strict=True))),
    )


class _Group:
  """One group's part of a chunk."""

  def __init__(self, size: int, columns: int):
    self.ids = np.zeros(size, np.int32)
    self.position = np.zeros(size, np.int32)
    self._max_rows = max(size // _MEAN_TOKENS, 1)
    self._segment = np.zeros(size, np.int32)
    self._table = np.zeros((self._max_rows, columns), np.int32)
    self._length = np.zeros(self._max_rows, np.int32)
    self._start = np.zeros(self._max_rows + 1, np.int32)
    self._count = 0

  @property
  def has_room(self) -> bool:
    return self._count < self._max_rows and self._end < len(self.ids)

  @property
  def _end(self) -> int:
    return int(self._start[self._count])

  def add(self, read: Read, begin: int) -> int:
    """Adds a row with the tokens from `begin` on; returns how many have been read after it."""
    row, start = self._count, self._end
    end = min(begin + len(self.ids) - start, len(read.ids))
    part = slice(start, start + end - begin)
    self.ids[part] = read.ids[begin:end]
    self.position[part] = np.arange(begin, end)
    self._segment[part] = row + 1
    self._table[row, : len(read.pages)] = read.pages
    self._length[row] = end
    self._start[row + 1 :] = part.stop
    self._count += 1
    return end

  def rows(self) -> PrefillRows:
    return PrefillRows(self._segment, self._table, self._length, self._start, np.int32(self._count))
