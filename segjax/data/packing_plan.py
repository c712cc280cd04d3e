"""Plans which sequences share a row when ragged sequences are packed into pieces of rows.

The plan is made on the host from lengths alone and carried out by `model.packed`. Pieces are level:
all pieces, and all rows of a piece, have about the same number of tokens, so that no device waits
for another and little is padding.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from segjax.errors import UserError
from segjax.types import PackingPlan, PackingSlots

# Bounds the slots: each is unpacked to a row of the full length, whether used or not.
_MAX_PER_ROW = 16  # sequences per packed row, on average over a piece
_STEPS = 8  # widths of rows are multiples of the packing length / 8
_ALIGNMENT = 128  # tokens; attention kernels read long rows in blocks of this many


@dataclasses.dataclass(frozen=True)
class PieceBound:
  """The most tokens of a piece, whose rows are split over devices.

  Attributes:
    devices: over which rows are split; those of the tensor axis share rows.
    tokens: of a piece per device of these.
    packing_length: tokens of a row, about; no sequence is longer.
    widens: whether rows may be wider, so that fewer pieces do; not where attention costs the square
      of a row.
  """

  devices: int
  tokens: int
  packing_length: int
  widens: bool = True

  @property
  def step(self) -> int:
    """The widths of rows are multiples of it."""
    step = math.ceil(self.packing_length / _STEPS)
    return step if step < _ALIGNMENT else _round_up(step, _ALIGNMENT)

  def rows(self, group: int) -> int:
    """Returns the fewest rows of a piece per device: sequences of a group have their own."""
    return math.ceil(group / self.devices)

  def needed(self, longest: int, group: int) -> int:
    """Returns the least that `tokens` must be for groups of sequences of this length."""
    return self.rows(group) * _round_up(longest, self.step)

  @property
  def widest(self) -> int:
    """The most tokens of a row."""
    return self.tokens if self.widens else _round_up(self.packing_length, self.step)

  def row_counts(self, level: float, group: int) -> range:
    """Returns how many rows `level` tokens of a device may be cut into, the preferred first."""
    fewest = self.rows(group)
    if self.widens:  # then fewer and wider rows
      return range(max(int(level // self.packing_length), fewest), fewest - 1, -1)
    first = max(math.ceil(level / self.packing_length), fewest)
    return range(first, max(self.tokens // self.packing_length, fewest) + 1)


def plan_packing(lengths: np.ndarray, rows: int, width: int, group: int = 1) -> PackingPlan:
  """Packs sequences into as few pieces of `rows` rows of `width` tokens as are needed.

  The shapes depend on the number of sequences alone, so that other lengths compile nothing: there
  are as many pieces as the longest sequences would need, and how many are in use is an array.

  Args:
    lengths: tokens of each sequence, [N].
    rows: rows of a piece, which goes through the network at once.
    width: tokens per row.
    group: number of consecutive sequences that must be in one piece, in adjacent slots; 2 for
      pairs.

  Raises:
    UserError: a sequence is longer than a row, or a group has more sequences than a piece has
      rows.
  """
  lengths = np.asarray(lengths)
  _check_lengths(lengths, width)
  if rows < group:
    raise UserError(
      f'micro_batch_size={rows} is less than the {group} sequences that stay together; use at '
      f'least {group}.'
    )
  most = math.ceil(len(lengths) / group / (rows // group)) or 1
  fewest = math.ceil(lengths.sum() / (rows * width)) or 1
  shapes = ((count, rows, width) for count in itertools.count(fewest))
  return _first_fit(lengths.reshape(-1, group), shapes, most)


def plan_level_packing(lengths: np.ndarray, bound: PieceBound, group: int = 1) -> PackingPlan:
  """Packs sequences into as few pieces as the bound allows, in rows as narrow as they fit in.

  Rows are about packing_length wide and no wider than the tokens need, so the shapes depend on the
  lengths: on how many pieces there are, rows per device and the width, a multiple of
  packing_length / 8. For rows per device r a width is between packing_length and its
  (1 + 1 / r)-fold, so a number of pieces has at most 8 / r + 2 shapes for each r, and the spread of
  a batch's tokens leaves few of them: of 128 UltraFeedback-like responses 2 to 6. Where rows must
  not be wider than packing_length, there are more of them, or more pieces.

  Args:
    lengths: tokens of each sequence, [N].
    bound: of a piece.
    group: as in `plan_packing`.

  Raises:
    UserError: a sequence is longer than packing_length, or a piece is too small for a group.
  """
  lengths = np.asarray(lengths)
  _check_lengths(lengths, bound.packing_length)
  if bound.tokens < (needed := bound.needed(int(lengths.max(initial=1)), group)):
    raise UserError(
      f'micro_batch_tokens leaves {bound.tokens} tokens to each of the {bound.devices} devices '
      f'that split rows, and sequences of {lengths.max()} tokens need {needed}; make it larger.'
    )
  return _first_fit(lengths.reshape(-1, group), _shapes(lengths, bound, group))


def largest_packing(sequences: int, bound: PieceBound, group: int = 1) -> PackingPlan:
  """Returns an empty plan of the largest pieces that the bound allows, for the memory they need.

  There are two, as a sum over pieces needs more memory than a batch of one.

  Args:
    sequences: of the batch.
    bound: of a piece.
    group: as in `plan_packing`.
  """
  rows = max(bound.tokens // bound.packing_length, bound.rows(group))
  width = min(bound.tokens // rows // bound.step * bound.step, bound.widest)
  groups = np.zeros((sequences // group, group), int)
  return _make_plan(groups, rows * bound.devices, width, [[], []], [np.zeros((2, 0))] * 2)


def _shapes(lengths: np.ndarray, bound: PieceBound, group: int) -> Iterator[tuple[int, int, int]]:
  """Yields (pieces, rows of a piece, tokens of a row): few pieces first, then short rows."""
  total, longest = int(lengths.sum()), int(lengths.max(initial=1))
  for count in itertools.count(math.ceil(total / bound.devices / bound.tokens) or 1):
    level = total / count / bound.devices  # tokens of a piece per device
    for rows in bound.row_counts(level, group):
      width = _round_up(max(level / rows, longest), bound.step)
      # Of many sequences, level rows fit into the first or the second.
      for wider in range(width, min(bound.tokens // rows, bound.widest) + 1, bound.step):
        yield count, rows * bound.devices, wider


def _first_fit(
  groups: np.ndarray, shapes: Iterable[tuple[int, int, int]], most: int | None = None
) -> PackingPlan:
  """Returns the plan in the first of the shapes that the groups [G, g] fit into.

  Args:
    shapes: (pieces, rows of a piece, tokens of a row).
    most: see `_make_plan`.
  """
  for count, rows, width in shapes:
    # If no level pieces fit, those do in which each sequence has a row of its own.
    for limit in (_groups_per_piece(groups, rows), rows // groups.shape[1]):
      pieces = _level_pieces(groups, count, limit)
      slots = [_fill_rows(groups[piece], rows, width) for piece in pieces]
      if pieces and all(slot is not None for slot in slots):
        return _make_plan(groups, rows, width, pieces, slots, most)
  raise AssertionError('shapes go on until the groups fit')


def _make_plan(
  groups: np.ndarray,
  rows: int,
  width: int,
  pieces: list[list[int]],
  slots: list[Any],
  most: int | None = None,
) -> PackingPlan:
  """Returns the plan with these groups in each piece, and (row, offset) of their sequences.

  Args:
    most: pieces of the plan's arrays, of which a number is used that is an array too; None for
      those in use.
  """
  size = groups.shape[1]
  shape = most or len(pieces), _groups_per_piece(groups, rows) * size
  sequence = np.full(shape, -1, np.int32)  # -1: an empty slot
  row, offset, length = (np.zeros_like(sequence) for _ in range(3))
  for i, (piece, placed) in enumerate(zip(pieces, slots, strict=True)):
    used = slice(len(piece) * size)
    sequence[i, used] = (np.array(piece, int)[:, None] * size + np.arange(size)).reshape(-1)
    length[i, used] = groups[piece].reshape(-1)
    row[i, used], offset[i, used] = placed
  filled = PackingSlots(sequence, row, offset, length, rows, width, size)
  return PackingPlan(filled, np.int32(len(pieces)) if most else None)


def _groups_per_piece(groups: np.ndarray, rows: int) -> int:
  """Returns the groups that a piece has slots for; all shapes depend on their number alone."""
  return max(min(len(groups), _MAX_PER_ROW * rows // groups.shape[1]), 1)


def _level_pieces(groups: np.ndarray, count: int, limit: int) -> list[list[int]]:
  """Returns the groups of each piece: the longest first, each to the piece of the fewest tokens.

  Empty if they are more than `limit` groups for each piece.
  """
  if len(groups) > count * limit:
    return []
  tokens = groups.sum(axis=1)
  pieces: list[list[int]] = [[] for _ in range(count)]
  heap = [(0, piece) for piece in range(count)]
  # Stable, and ties in the heap by index: every process has to make the same plan.
  for index in np.argsort(-tokens, kind='stable'):
    filled, piece = heapq.heappop(heap)
    pieces[piece].append(int(index))
    if len(pieces[piece]) < limit:  # slots are arrays of a fixed size
      heapq.heappush(heap, (filled + int(tokens[index]), piece))
  return pieces


def _fill_rows(groups: np.ndarray, rows: int, width: int) -> np.ndarray | None:
  """Returns (row, offset) of each sequence of a piece, [2, G g]; None if they do not fit.

  The longest first, each to the emptiest row. Where that leaves no room, each to the fullest row
  that has room, of rows as level as possible: from the mean of their tokens to the width in steps.
  """
  lengths = groups.reshape(-1)
  mean = max(lengths.sum() / rows, lengths.max(initial=0))
  if mean > width:
    return None
  attempts = [(True, width), *((False, room) for room in np.linspace(mean, width, _STEPS).round())]
  for to_emptiest, room in attempts:
    slots, filled = np.zeros((2, len(lengths)), np.int32), np.zeros(rows, int)
    for index in np.argsort(-lengths, kind='stable'):
      if to_emptiest:
        row = int(filled.argmin())
      else:
        row = int(np.where(filled + lengths[index] <= room, filled, -1).argmax())
      slots[:, index] = row, filled[row]
      filled[row] += lengths[index]
      if filled[row] > room:
        break
    else:
      return slots
  return None


def _check_lengths(lengths: np.ndarray, width: int) -> None:
  if lengths.max(initial=0) > width:
    raise UserError(
      f'sequence {int(lengths.argmax())} has {lengths.max()} tokens, but packed rows have {width}; '
      'raise packing_length.'
    )


def _round_up(number: float | int, step: int) -> int:
  return math.ceil(number / step) * step


def packing_efficiency(packing: PackingPlan) -> float:
  """Returns the fraction of the packed tokens that are real."""
  pieces = packing.pieces
  # Pieces that are not in use are empty and do not run.
  return float(pieces.length.sum() / (packing.num_pieces * pieces.rows * pieces.width))
