"""Plans which sequences share a row when ragged sequences are packed into rows of fixed length.

The plan is made on the host from lengths alone and carried out by `model.packed`. The shapes of its
arrays depend on the number of sequences and not on their lengths, so that no program is compiled
again; the number of pieces in use is an array too.
"""

import math

import numpy as np

from segjax.errors import UserError
from segjax.types import PackingPlan, PackingSlots

# Bounds the slots: each is unpacked to a row of the full length, whether used or not.
_MAX_PER_ROW = 16  # sequences per packed row, on average over a piece


def plan_packing(lengths: np.ndarray, rows: int, width: int, group: int = 1) -> PackingPlan:
  """Packs sequences into pieces of `rows` rows of `width` tokens by first fit, longest first.

  Args:
    lengths: tokens of each sequence, [N].
    rows: rows of a piece, which goes through the network at once.
    width: tokens per row.
    group: number of consecutive sequences that must be in one piece, in adjacent slots; 2 for
      pairs.

  Raises:
    ValueError: a sequence is longer than a row, or a group has more sequences than a piece has
      rows.
  """
  lengths = np.asarray(lengths)
  if lengths.max(initial=0) > width:
    raise UserError(
      f'sequence {int(lengths.argmax())} has {lengths.max()} tokens, but packed rows have {width}; '
      'raise packing_length.'
    )
  if rows < group:
    raise UserError(
      f'micro_batch_size={rows} is less than the {group} sequences that stay together; use at '
      f'least {group}.'
    )
  groups = lengths.reshape(-1, group)
  size = max(min(len(groups), _MAX_PER_ROW * rows // group), 1)  # groups in a piece
  # A piece has room for rows // group groups even of the longest sequences, so this many pieces
  # are enough. Their number depends on N alone: shapes must not depend on lengths.
  pieces = [_Piece(rows, width, size) for _ in range(math.ceil(len(groups) / (rows // group)) or 1)]
  # Longest first: short sequences fill the gaps that long ones leave. Stable: every process has to
  # make the same plan.
  for index in np.argsort(-groups.sum(axis=1), kind='stable'):
    next(piece for piece in pieces if piece.try_add(int(index), groups[index]))
  used = max(sum(bool(piece.groups) for piece in pieces), 1)
  sequence = np.full((len(pieces), size * group), -1, np.int32)  # -1: an empty slot
  row, offset, length = (np.zeros_like(sequence) for _ in range(3))
  for i, piece in enumerate(pieces):
    for j, (index, slots) in enumerate(piece.groups):
      columns = slice(j * group, (j + 1) * group)
      sequence[i, columns] = index * group + np.arange(group)
      row[i, columns], offset[i, columns] = zip(*slots, strict=True)
      length[i, columns] = groups[index]
  return PackingPlan(
    PackingSlots(sequence, row, offset, length, rows, width, group), np.int32(used)
  )


class _Piece:
  """The rows of one piece while they are filled; `groups` lists (index, [(row, offset)])."""

  def __init__(self, rows: int, width: int, size: int):
    self._filled = np.zeros(rows, int)
    self._width, self._size = width, size
    self.groups: list[tuple[int, list[tuple[int, int]]]] = []

  def try_add(self, index: int, lengths: np.ndarray) -> bool:
    """Adds a group, each sequence to the first row with room; returns whether all of them fit."""
    if len(self.groups) == self._size:
      return False  # slots are arrays of a fixed size
    # On a copy: a group is added as a whole or not at all.
    filled, slots = self._filled.copy(), []
    for length in lengths:
      fitting = np.flatnonzero(filled + length <= self._width)
      if not len(fitting):
        return False
      slots.append((int(fitting[0]), int(filled[fitting[0]])))
      filled[fitting[0]] += length
    self._filled = filled
    self.groups.append((index, slots))
    return True


def packing_efficiency(packing: PackingPlan) -> float:
  """Returns the fraction of the packed tokens that are real."""
  pieces = packing.pieces
  # Pieces beyond `count` are empty and do not run.
  return float(pieces.length.sum() / (packing.count * pieces.rows * pieces.width))
