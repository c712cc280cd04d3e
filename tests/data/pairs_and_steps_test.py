"""Rows of both forms in one data set: who reads which, the split, and the rows of an update."""

import numpy as np
import pytest
from fixtures import tokenizers

from segjax.data.batches import batch_indices
from segjax.data.limits import Limits
from segjax.data.pair_rules import PairRules
from segjax.data.pairs_and_steps import PairsAndSteps
from segjax.data.rows import Reading
from segjax.data.sources import Rows
from segjax.data.tokenize import tokenize_pairs, tokenize_steps
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError

LIMITS, RULES = Limits(100, 50), PairRules(skip_labelled=True)


def pair(prompt):
  return {'prompt': prompt, 'chosen': 'one two', 'rejected': 'three', 'steps': None}


def labelled(prompt):
  return {'prompt': prompt, 'response': 'one two', 'steps': [[3, 1], [7, 0]], 'chosen': None}


def stepwise(prompt):
  return {'prompt': prompt, 'completions': ['one', 'two'], 'labels': [True, False]}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return load_tokenizer(tokenizers.write_tokenizer(tmp_path_factory.mktemp('tokenizer')))


def read(rows, tokenizer, **reading):
  rows = Rows(rows, 'rows.jsonl', reading=Reading(**reading))
  pairs = tokenize_pairs(rows, tokenizer, LIMITS, RULES)
  return PairsAndSteps(pairs, tokenize_steps(rows, tokenizer, LIMITS))


def mixed(num_pairs, num_steps, tokenizer, shared=0):
  """Returns pairs and labelled responses, of which the last `shared` of each share prompts."""
  prompts = [f'pair {i}' for i in range(num_pairs - shared)]
  prompts = [*prompts, *(f'both {i}' for i in range(shared))]
  others = [f'step {i}' for i in range(num_steps - shared)]
  others = [*others, *(f'both {i}' for i in range(shared))]
  return read([*map(pair, prompts), *map(labelled, others)], tokenizer)


def test_each_row_is_read_by_its_form(tokenizer):
  rows = [labelled('a'), pair('b'), stepwise('c'), pair('d'), labelled('e')]
  data = read(rows, tokenizer)
  assert data.pairs.row.tolist() == [1, 3] and data.steps.row.tolist() == [0, 2, 4]
  assert data.pairs.counts['with_steps'] == 3 and data.steps.counts['pairs'] == 2
  assert len(data) == 5 and data.row.tolist() == [0, 1, 2, 3, 4] and data.num_labels() == 6
  assert data.describe() == '2 pairs and 3 responses with labelled steps'
  alone = tokenize_pairs(Rows([rows[1], rows[3]], 'r'), tokenizer, LIMITS)
  for index in range(2):
    np.testing.assert_array_equal(data.pairs.chosen[index], alone.chosen[index])
  # A pair with a column of labels is a pair.
  both = pair('a') | {'completions': ['one'], 'labels': [1]}
  assert len(tokenize_pairs(Rows([both], 'r'), tokenizer, LIMITS, RULES)) == 1


@pytest.mark.parametrize('row', [{'prompt': 'a', 'response': 'b'}, {'completions': ['b']}])
def test_a_row_of_neither_form_is_named(tokenizer, row):
  message = r'^rows\.jsonl, row 2: no `chosen` and `rejected` of a pair, and no labelled `steps`'
  with pytest.raises(UserError, match=message) as error:
    read([pair('a'), row, labelled('b')], tokenizer)
  assert '\n' not in str(error.value)


def test_rows_that_cannot_be_read_are_dropped(tokenizer):
  bad = {'prompt': 'b', 'completions': ['one'], 'labels': []}
  data = read([pair('a'), bad, {'prompt': 'x'}, labelled('c')], tokenizer, drop_bad=True)
  assert data.row.tolist() == [0, 3]
  assert data.pairs.counts['dropped_bad'] == 1 and data.steps.counts['dropped_bad'] == 2


def test_a_prompt_is_held_out_of_both_or_of_none(tokenizer):
  data = mixed(20, 12, tokenizer, shared=6)
  train, held_out = data.split_holdout(0.25, seed=3)
  trained = {*train.pairs.group.tolist(), *train.steps.group.tolist()}
  kept = {*held_out.pairs.group.tolist(), *held_out.steps.group.tolist()}
  assert not trained & kept and len(train) + len(held_out) == len(data)
  assert len(held_out.pairs) >= 5 and len(held_out.steps) >= 3
  np.testing.assert_array_equal(np.sort([*train.row, *held_out.row]), data.row)
  # Without shared prompts each part is split as if it were alone.
  data = mixed(20, 12, tokenizer)
  _, held_out = data.split_holdout(0.25, seed=3)
  _, alone = PairsAndSteps(data.pairs).split_holdout(0.25, seed=3)
  np.testing.assert_array_equal(held_out.pairs.row, alone.pairs.row)
  assert len(held_out.steps) == 3
  with pytest.raises(UserError, match='leaves none to train on'):
    mixed(20, 1, tokenizer).split_holdout(0.25, seed=3)


@pytest.mark.parametrize(
  'num_pairs, num_steps, piece, expected',
  [(40, 20, 1, 4), (40, 20, 4, 4), (40, 27, 2, 6), (40, 2, 4, 4), (10, 25, 4, 20)],
)
def test_an_update_has_both_in_proportion(tokenizer, num_pairs, num_steps, piece, expected):
  data = mixed(num_pairs, num_steps, tokenizer)
  pairs, steps = zip(*(data.batch_rows(8, piece, 1, k) for k in range(25)), strict=True)
  assert {len(rows) for rows in steps} == {expected}
  for k, rows in enumerate(pairs):
    np.testing.assert_array_equal(rows, batch_indices(num_pairs, 8, 1, k))
  times = np.bincount(np.concatenate(steps), minlength=num_steps)
  assert times.max() - times.min() <= 1  # an endless stream: all as often
  again = data.batch_rows(8, piece, 1, 24)[1]
  np.testing.assert_array_equal(again, steps[-1])  # a run resumes by the number of the update


def test_updates_of_one_part_alone(tokenizer):
  data = mixed(20, 12, tokenizer)
  pairs, none = PairsAndSteps(data.pairs).batch_rows(8, 1, 0, 1)
  assert none is None and pairs.tolist() == batch_indices(20, 8, 0, 1).tolist()
  none, steps = PairsAndSteps(steps=data.steps).batch_rows(4, 1, 0, 1)
  assert none is None and steps.tolist() == batch_indices(12, 4, 0, 1).tolist()
  assert PairsAndSteps(steps=data.steps).first(5).steps.row.tolist() == [20, 21, 22, 23, 24]
