import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from segjax.data.packing_plan import (
  PieceBound,
  largest_packing,
  packing_efficiency,
  plan_level_packing,
  plan_packing,
)

WIDTH = 32
LENGTHS = st.lists(st.integers(0, WIDTH), min_size=2, max_size=40)


def check_slots(packing, lengths, group):
  """Every sequence has a slot of its own, in its row, and groups are in adjacent slots."""
  slots, token_owner, seen = packing.pieces, {}, []
  for piece, slot in np.argwhere(slots.sequence >= 0):
    sequence = slots.sequence[piece, slot]
    seen.append(sequence)
    assert slots.length[piece, slot] == lengths[sequence]
    begin = slots.offset[piece, slot]
    assert 0 <= slots.row[piece, slot] < slots.rows
    assert begin + lengths[sequence] <= slots.width
    for token in range(begin, begin + lengths[sequence]):
      assert token_owner.setdefault((piece, slots.row[piece, slot], token), sequence) == sequence
  assert sorted(seen) == list(range(len(lengths)))
  assert len(token_owner) == lengths.sum()  # no two tokens share a position
  assert np.all(slots.length[slots.sequence < 0] == 0)
  assert np.all(slots.sequence[packing.num_pieces :] == -1)
  first = slots.sequence[:, ::group]
  for k in range(1, group):
    np.testing.assert_array_equal(slots.sequence[:, k::group], np.where(first < 0, -1, first + k))


@given(LENGTHS, st.integers(2, 6), st.sampled_from([1, 2]))
def test_every_sequence_has_a_slot_of_its_own(lengths, rows, group):
  lengths = np.array(lengths[: len(lengths) // group * group])
  packing = plan_packing(lengths, rows, WIDTH, group)
  assert (packing.pieces.rows, packing.pieces.width) == (rows, WIDTH)
  check_slots(packing, lengths, group)


@given(LENGTHS, st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 2]), st.booleans())
@example([15, 18, 19, 19, 20], 1, 2, 1, True)  # two pieces, of rows that are not quite level
def test_level_pieces_keep_the_bound(lengths, devices, rows, group, widens):
  lengths = np.array(lengths[: len(lengths) // group * group])
  bound = PieceBound(devices, max(rows, group) * WIDTH + 5, WIDTH, widens)
  packing = plan_level_packing(lengths, bound, group)
  pieces = packing.pieces
  check_slots(packing, lengths, group)
  assert pieces.rows % devices == 0 and pieces.width % bound.step == 0
  largest = largest_packing(len(lengths), bound, group).pieces
  assert pieces.rows // devices * pieces.width <= bound.tokens
  assert widens or pieces.width <= WIDTH
  assert largest.rows * largest.width >= pieces.rows * pieces.width - bound.step * pieces.rows
  assert largest.sequence.shape[1] >= pieces.sequence.shape[1] or largest.rows < pieces.rows
  # With more pieces than the tokens need, rows would have been filled worse than by a half.
  assert packing.num_pieces <= max(1, np.ceil(2 * lengths.sum() / (bound.tokens * devices)) + 1)


def test_shapes_do_not_depend_on_lengths():
  shapes = {
    plan_packing(np.full(64, length), 8, 100).pieces.sequence.shape for length in (1, 10, 51, 100)
  }
  assert shapes == {(8, 64)}


def test_ragged_rows_are_well_filled():
  """Exponential lengths, mean a quarter of the row: four sequences in a row, not one."""
  lengths = np.minimum(np.random.default_rng(0).exponential(64, 256).astype(int) + 1, 256)
  packing = plan_packing(lengths, 8, 256)
  assert packing_efficiency(packing) > 0.9
  assert packing.count * 8 <= 256 / 3.5


def chat_lengths(rng, count):
  """Returns tokens of prompts and responses as UltraFeedback's, at most 1,024 of each."""
  prompt = np.clip(rng.lognormal(np.log(130), 0.9, count), 20, 1024)
  response = np.clip(rng.lognormal(np.log(330), 0.7, count), 5, 1024)
  return prompt.astype(int) + response.astype(int)


@pytest.mark.parametrize(
  ('devices', 'tokens', 'num_pieces', 'num_shapes'),
  [(8, 8192, 2, 4), (8, 16_384, 1, 4), (4, 8192, 3, 6), (32, 8192, 1, 4)],
)
def test_pieces_of_chats_are_level(devices, tokens, num_pieces, num_shapes):
  """A hundred minibatches of 128 responses: over 90 % are real tokens, in a few programs."""
  rng, bound = np.random.default_rng(0), PieceBound(devices, tokens, packing_length=2048)
  shapes, real, computed = set(), 0, 0
  for _ in range(100):
    pieces = plan_level_packing(chat_lengths(rng, 128), bound).pieces
    shapes.add((len(pieces.row), pieces.rows, pieces.width))
    filled = np.stack(
      [np.bincount(*row, pieces.rows) for row in zip(pieces.row, pieces.length, strict=True)]
    )
    assert filled.std() < 0.15 * filled.mean()  # a row of each piece may have what is left
    by_piece = filled.sum(axis=1)
    assert by_piece.max() - by_piece.min() < 0.01 * by_piece.mean()
    real, computed = real + filled.sum(), computed + filled.size * pieces.width
  assert real / computed > 0.9
  assert len(shapes) <= num_shapes
  assert {count for count, _, _ in shapes} <= {num_pieces, num_pieces - 1}


def test_rows_that_must_not_widen():
  """Four full rows do not hold these exactly: one row of all does, and so do two pieces."""
  lengths = np.array([20] * 6)
  wide = plan_level_packing(lengths, PieceBound(1, 4 * WIDTH, WIDTH)).pieces
  narrow = plan_level_packing(lengths, PieceBound(1, 4 * WIDTH, WIDTH, widens=False)).pieces
  assert (len(wide.row), wide.rows, wide.width) == (1, 3, 40)
  assert (len(narrow.row), narrow.rows, narrow.width) == (2, 3, 20)


def test_too_long_and_too_few_rows():
  with pytest.raises(ValueError, match='sequence 1 has 33 tokens, but packed rows have 32'):
    plan_packing(np.array([3, 33]), 2, 32)
  with pytest.raises(ValueError, match='micro_batch_size=1 is less than the 2 sequences'):
    plan_packing(np.array([3, 3]), 1, 32, group=2)
  with pytest.raises(ValueError, match=r'leaves 40 tokens .* of 30 tokens need 64;'):
    plan_level_packing(np.array([3, 30]), PieceBound(1, 40, 32), group=2)
