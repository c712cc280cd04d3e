import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segjax.data.packing_plan import packing_efficiency, plan_packing

WIDTH = 32
LENGTHS = st.lists(st.integers(0, WIDTH), min_size=2, max_size=40)


@given(LENGTHS, st.integers(2, 6), st.sampled_from([1, 2]))
def test_every_sequence_has_a_slot_of_its_own(lengths, rows, group):
  lengths = np.array(lengths[: len(lengths) // group * group])
  packing = plan_packing(lengths, rows, WIDTH, group)
  slots, token_owner, seen = packing.pieces, {}, []
  for piece, slot in np.argwhere(slots.sequence >= 0):
    sequence = slots.sequence[piece, slot]
    seen.append(sequence)
    assert slots.length[piece, slot] == lengths[sequence]
    begin = slots.offset[piece, slot]
    assert 0 <= slots.row[piece, slot] < rows
    assert begin + lengths[sequence] <= WIDTH
    for token in range(begin, begin + lengths[sequence]):
      assert token_owner.setdefault((piece, slots.row[piece, slot], token), sequence) == sequence
  assert sorted(seen) == list(range(len(lengths)))
  assert len(token_owner) == lengths.sum()  # no two tokens share a position
  assert np.all(slots.length[slots.sequence < 0] == 0)
  assert np.all(slots.sequence[packing.count :] == -1)
  # Sequences of a group are in adjacent slots.
  first = slots.sequence[:, ::group]
  for k in range(1, group):
    np.testing.assert_array_equal(slots.sequence[:, k::group], np.where(first < 0, -1, first + k))


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


def test_too_long_and_too_few_rows():
  with pytest.raises(ValueError, match='sequence 1 has 33 tokens, but packed rows have 32'):
    plan_packing(np.array([3, 33]), 2, 32)
  with pytest.raises(ValueError, match='micro_batch_size=1 is less than the 2 sequences'):
    plan_packing(np.array([3, 3]), 1, 32, group=2)
