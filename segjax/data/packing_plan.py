"""Which sequences share a row: a plan for packing ragged sequences into rows of a fixed length.

The plan is made on the host from lengths alone; `model.packed` carries it out. All its arrays have
shapes that depend on how many sequences there are and not on their lengths, so that nothing is
compiled anew; how many pieces are in use is a number.
"""

import math

import numpy as np

from segjax.errors import UserError
from segjax.types import PackingPlan, PackingSlots

_MOST = 16  # sequences per packed row, on average over a piece


def plan_packing(lengths: np.ndarray, rows: int, width: int, group: int = 1) -> PackingPlan:
  """Deals sequences out to pieces of `rows` rows of `width` tokens: first fit, longest first.

  Args:
    lengths: tokens of each sequence, [N].
    rows: of a piece, which goes through the network at once.
    width: tokens of a row.
    group: so many sequences that follow each other stay in one piece, side by side: 2 for pairs.

  Raises:
    ValueError: a sequence is longer than a row, or a group needs more rows than there are.
  """
  lengths = np.asarray(lengths)
  if lengths.max(initial=0) > width:
    raise UserError(
      f'sequence {int(lengths.argmax())} has {lengths.max()} tokens, and packed rows have {width}; '
      'raise packed_length.'
    )
  if rows < group:
    raise UserError(f'{group} sequences that stay together need micro_batch={group} or more.')
  groups = lengths.reshape(-1, group)
  size = max(min(len(groups), _MOST * rows // group), 1)  # groups in a piece
  # A piece turns a group down only when it holds at least rows // group of them.
  pieces = [_Piece(rows, width, size) for _ in range(math.ceil(len(groups) / (rows // group)) or 1)]
  for index in np.argsort(-groups.sum(axis=1), kind='stable'):
    next(piece for piece in pieces if piece.takes(int(index), groups[index]))
  used = max(sum(bool(piece.groups) for piece in pieces), 1)
  sequence = np.full((len(pieces), size * group), -1, np.int32)
  row, offset, length = (np.zeros_like(sequence) for _ in range(3))
  for i, piece in enumerate(pieces):
    for j, (index, places) in enumerate(piece.groups):
      at = slice(j * group, (j + 1) * group)
      sequence[i, at] = index * group + np.arange(group)
      row[i, at], offset[i, at] = zip(*places, strict=True)
      length[i, at] = groups[index]
  return PackingPlan(
    PackingSlots(sequence, row, offset, length, rows, width, group), np.int32(used)
  )


class _Piece:
  """Rows being filled."""

  def __init__(self, rows: int, width: int, size: int):
    self._filled = np.zeros(rows, int)
    self._width, self._size = width, size
    self.groups: list[tuple[int, list[tuple[int, int]]]] = []

  def takes(self, index: int, lengths: np.ndarray) -> bool:
    """Puts the group into the first rows with room for its sequences, if all of them find one."""
    if len(self.groups) == self._size:
      return False
    filled, places = self._filled.copy(), []
    for length in lengths:
      fitting = np.flatnonzero(filled + length <= self._width)
      if not len(fitting):
        return False
      places.append((int(fitting[0]), int(filled[fitting[0]])))
      filled[fitting[0]] += length
    self._filled = filled
    self.groups.append((index, places))
    return True


def packing_efficiency(packing: PackingPlan) -> float:
  """The share of the packed tokens that are real."""
  pieces = packing.pieces
  return float(pieces.length.sum() / (packing.count * pieces.rows * pieces.width))
