"""Rows of unequal length in one array, which may be mapped from a file."""

import dataclasses
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np


def pad_rows(
  rows: Sequence[Any], width: int, fill: int | float, dtype: Any = np.int32
) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows of unequal length on the right to a rectangle.

  Args:
    rows: B lists or arrays of at most `width` elements.
    width: columns of the rectangle, W.
    fill: value of the padding.
    dtype: of the rectangle.

  Returns:
    (the padded rows [B, W], mask bool [B, W] that is True on elements of the rows).

  Raises:
    ValueError: a row is longer than `width`.
  """
  padded = np.full((len(rows), width), fill, dtype)
  mask = np.zeros(padded.shape, bool)
  for index, row in enumerate(rows):
    padded[index, : len(row)] = row
    mask[index, : len(row)] = True  # by length: the id of the padding may be a stop token
  return padded, mask


def round_up_width(length: int) -> int:
  """Returns 64, or a power of 2 times it, from `length` tokens: few widths, few programs."""
  return max(64, 1 << max(length - 1, 0).bit_length())


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Rows of unequal length in one flat array; row i is values[starts[i]:starts[i] + lengths[i]].

  Attributes:
    values: elements of all rows, in memory or mapped from a file, int32 or others [M].
    starts: where each row begins, int64 [N].
    lengths: elements of each row, int32 [N].
  """

  # Padded by batch: all rows at the length of the longest may take several times the memory.
  values: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray

  @classmethod
  def end_to_end(cls, values: np.ndarray, lengths: np.ndarray) -> 'Ragged':
    """Returns rows that follow each other in `values`."""
    return cls(values, np.cumsum(lengths, dtype=np.int64) - lengths, lengths)

  @classmethod
  def from_rows(cls, rows: Sequence[Any], dtype: Any) -> 'Ragged':
    """Concatenates rows."""
    arrays = [np.asarray(row, dtype) for row in rows]
    lengths = np.array([len(row) for row in arrays], np.int32)
    return cls.end_to_end(np.concatenate([np.zeros(0, dtype), *arrays]), lengths)

  def __getitem__(self, index: SupportsIndex) -> np.ndarray:
    start = self.starts[index]
    return self.values[start : start + self.lengths[index]]

  def take(self, indices: np.ndarray) -> 'Ragged':
    """Returns the rows at `indices`, in that order; the values are shared, not copied."""
    return Ragged(self.values, self.starts[indices], self.lengths[indices])

  def pad(
    self, indices: np.ndarray, length: int, fill: int | float
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows at `indices` padded by `pad_rows`, and their mask, [B, length] each."""
    return pad_rows([self[i] for i in indices], length, fill, self.values.dtype)
