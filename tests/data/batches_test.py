import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segjax import types
from segjax.data.batches import (
  batch_indices,
  endless_batch_indices,
  eval_batches,
  select,
  split_holdout,
  stream_rows,
)
from segjax.data.limits import Limits
from segjax.data.ragged import Ragged, pad_rows
from segjax.data.sources import Rows
from segjax.data.tokenize import tokenize_conversations, tokenize_pairs, tokenize_prompts

LIMITS = Limits(max_length=128, max_prompt_length=64)
# Seven prompts, three pairs to each.
ROWS = Rows(
  [{'prompt': f'hello {i % 7}', 'chosen': f'one {i}', 'rejected': f'two {i}'} for i in range(21)],
  'rows',
)
ENCODERS = [tokenize_conversations, tokenize_pairs, tokenize_prompts]


@pytest.mark.parametrize('rows', [[[1, 2, 3], [], [4]], [], [[]]])
def test_ragged_is_its_rows(rows):
  ragged = Ragged.from_rows(rows, np.int32)
  assert [ragged[i].tolist() for i in range(len(rows))] == rows
  assert ragged.values.dtype == np.int32


def test_ragged_pad_and_take():
  ragged = Ragged.from_rows([[1, 2, 3], [], [4]], np.int32)
  indices = np.array([2, 0, 1, 2])
  padded, mask = ragged.pad(indices, 4, 9)
  assert padded.tolist() == [[4, 9, 9, 9], [1, 2, 3, 9], [9, 9, 9, 9], [4, 9, 9, 9]]
  assert mask.sum(axis=1).tolist() == ragged.lengths[indices].tolist() == [1, 3, 0, 1]
  assert ragged[-1].tolist() == [4]
  assert ragged.pad(np.array([-3]), 3, 9)[0].tolist() == [[1, 2, 3]]
  selected = ragged.take(np.array([2, 0]))
  assert [selected[i].tolist() for i in range(2)] == [[4], [1, 2, 3]]
  assert selected.lengths.tolist() == [1, 3]


def test_pad_rows():
  padded, mask = pad_rows([[1, 2], [], np.array([3])], 3, 7)
  assert padded.tolist() == [[1, 2, 7], [7, 7, 7], [3, 7, 7]]
  assert mask.tolist() == [[True, True, False], [False] * 3, [True, False, False]]
  assert (padded.dtype, mask.dtype) == (np.int32, bool)
  assert pad_rows([], 3, 0)[0].shape == (0, 3)
  assert pad_rows([[0.5]], 2, 0, np.float32)[0].dtype == np.float32
  with pytest.raises(ValueError):
    pad_rows([[1, 2, 3]], 2, 0)


def test_to_device_is_called_with_every_array(llama3):
  seen = []

  def to_device(array):
    seen.append((array.dtype, array.shape))
    return jnp.asarray(array)

  data = tokenize_pairs(ROWS, llama3, LIMITS)
  batch = data.gather(np.arange(4), to_device)
  assert isinstance(batch, types.PreferenceBatch)
  side = [(np.int32, (4, data.length)), (bool, (4, data.length)), (bool, (4,))]
  assert seen == side * 2
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))


@pytest.mark.parametrize('encode', ENCODERS)
def test_batches_spread_over_devices(llama3, encode):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.NamedSharding(mesh, jax.P('data'))
  data = encode(ROWS, llama3, LIMITS)
  here = data.gather(np.arange(8), lambda array: jax.device_put(array, sharding))
  after = jax.tree.map(lambda array: jax.device_put(array, sharding), data.gather(np.arange(8)))
  assert jax.tree.structure(here) == jax.tree.structure(after)
  for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(after), strict=True):
    assert a.sharding == b.sharding == sharding
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('encode', ENCODERS)
def test_order_within_a_batch_moves_rows_only(llama3, encode):
  data = encode(ROWS, llama3, LIMITS)
  order = np.array([3, 0, 2])
  straight, permuted = data.gather(np.arange(4)), data.gather(order)
  for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(permuted), strict=True):
    np.testing.assert_array_equal(np.asarray(a)[order], b)


@pytest.mark.parametrize('encode', ENCODERS)
def test_holdout_splits_by_prompt(llama3, encode):
  data = encode(ROWS, llama3, LIMITS)
  train_set, held_out = split_holdout(data, 0.2, seed=0)
  assert not set(train_set.group) & set(held_out.group)
  assert len(train_set) + len(held_out) == len(data)
  # 0.2 of 21 rows is 4.2; three rows a prompt, so two prompts.
  assert len(held_out) == 6
  assert train_set.length == held_out.length == data.length
  row = data.gather(np.flatnonzero(data.group == held_out.group[0])[:1])
  for a, b in zip(
    jax.tree.leaves(row), jax.tree.leaves(held_out.gather(np.array([0]))), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_ratings_follow_their_rows(llama3):
  # The first prompt has no ratings, nor has every other row of the rest.
  rows = [
    row if i % 2 or i % 7 == 0 else dict(row, chosen_rating=i + 0.7, rejected_rating=0)
    for i, row in enumerate(ROWS)
  ]
  data = tokenize_pairs(Rows(rows, 'rows'), llama3, LIMITS)
  expected = np.float32([np.nan if i % 2 or i % 7 == 0 else i + 0.7 for i in range(21)])
  assert data.rating_gap.dtype == np.float32
  np.testing.assert_array_equal(data.rating_gap, expected)
  order = np.array([4, 3, 0, 18])
  gap = data.gather(order).rating_gap
  assert gap.dtype == jnp.float32
  np.testing.assert_array_equal(gap, expected[order])
  np.testing.assert_array_equal(select(data, order).rating_gap, expected[order])
  for part in split_holdout(data, 0.3, seed=0):
    np.testing.assert_array_equal(part.rating_gap, expected[part.row])
  # Rows without ratings among others that have some are NaN; none at all is None.
  np.testing.assert_array_equal(data.gather(np.array([1, 3])).rating_gap, [np.nan] * 2)
  assert select(data, np.array([1, 3])).gather(np.array([0])).rating_gap is None
  assert tokenize_pairs(ROWS, llama3, LIMITS).gather(order).rating_gap is None


def test_ratings_spread_over_devices(llama3):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.NamedSharding(mesh, jax.P('data'))
  rows = Rows([dict(row, chosen_score=1, rejected_score=0.3) for row in ROWS], 'rows')
  data = tokenize_pairs(rows, llama3, LIMITS)
  batch = data.gather(np.arange(8), lambda array: jax.device_put(array, sharding))
  assert batch.rating_gap.sharding == sharding
  np.testing.assert_array_equal(batch.rating_gap, np.full(8, np.float32(0.7)))
  again = jax.jit(lambda tree: tree)(batch)
  assert isinstance(again, types.PreferenceBatch)
  assert jax.tree.structure(again) == jax.tree.structure(batch)


def test_holdout_depends_on_prompts_and_seed_only(llama3):
  data = tokenize_prompts(ROWS, llama3, LIMITS)
  reversed_data = select(data, np.arange(len(data))[::-1])
  held_out = [set(split_holdout(d, 0.3, seed=1)[1].group) for d in (data, reversed_data)]
  assert held_out[0] == held_out[1]
  others = [set(split_holdout(data, 0.3, seed=seed)[1].group) for seed in range(5)]
  assert any(other != held_out[0] for other in others)
  # Messages follow their rows.
  train_set, _ = split_holdout(data, 0.3, seed=1)
  for index in range(len(train_set)):
    ids = llama3.prompt_ids(train_set.messages(index))
    assert train_set.tokens[index].tolist() == ids


def test_holdout_edges(llama3):
  data = tokenize_prompts(ROWS, llama3, LIMITS)
  train_set, held_out = split_holdout(data, 0.0, seed=0)
  assert (len(train_set), len(held_out)) == (21, 0)
  single_prompt = select(data, np.flatnonzero(data.group == data.group[0]))
  with pytest.raises(ValueError, match='1 distinct prompts leaves none'):
    split_holdout(single_prompt, 0.5, seed=0)
  with pytest.raises(ValueError, match=r'holdout_fraction=1\.0 must be'):
    split_holdout(data, 1.0, seed=0)


@given(num_rows=st.integers(1, 60), seed=st.integers(0, 9), data=st.data())
def test_each_epoch_takes_each_row_once(num_rows, seed, data):
  batch = data.draw(st.integers(1, num_rows))
  epoch = data.draw(st.integers(0, 3))
  steps = num_rows // batch
  rows = [batch_indices(num_rows, batch, seed, epoch * steps + i) for i in range(steps)]
  assert all(len(r) == batch for r in rows)
  flat = np.concatenate(rows).tolist()
  assert len(set(flat)) == len(flat) == steps * batch > num_rows - batch
  assert set(flat) <= set(range(num_rows))


def test_order_has_no_state():
  forward = [batch_indices(50, 8, 3, step).tolist() for step in range(20)]
  backward = [batch_indices(50, 8, 3, step).tolist() for step in reversed(range(20))]
  assert forward == backward[::-1]
  assert forward[:6] != forward[6:12]  # six steps an epoch: the second is another order
  assert forward != [batch_indices(50, 8, 4, step).tolist() for step in range(20)]
  batch_indices(50, 8, 3, 0)[:] = -1  # the caller's copy
  assert batch_indices(50, 8, 3, 0).tolist() == forward[0]


@pytest.mark.parametrize('batch', [0, 11])
def test_batch_must_fit(batch):
  with pytest.raises(ValueError, match=rf'batch_size={batch} rows .* from 10 rows; use'):
    batch_indices(10, batch, 0, 0)


@pytest.mark.parametrize(
  'num_rows, batch, expected',
  [
    (5, 2, [([0, 1], 2), ([2, 3], 2), ([4, 4], 1)]),
    (2, 4, [([0, 1, 1, 1], 2)]),
    (4, 2, [([0, 1], 2), ([2, 3], 2)]),
    (0, 2, []),
  ],
)
def test_chunks(num_rows, batch, expected):
  assert [(i.tolist(), real) for i, real in eval_batches(num_rows, batch)] == expected


def test_rows_of_a_stream_are_those_of_its_batches():
  """Positions may come in any order, and from any epoch."""
  batches = np.concatenate([endless_batch_indices(7, 3, 5, step) for step in range(8)])
  order = np.random.default_rng(0).permutation(24)
  assert stream_rows(7, 5, order).tolist() == batches[order].tolist()
  assert [sorted(batches[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
