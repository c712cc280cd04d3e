"""How published code treats pairs, by worked examples; nothing of it is the default."""

import numpy as np
import pytest
from fixtures.tokenizers import system, user

from data.tokenize_test import NONE, WIDE, _pair, _rows
from segjax.data.limits import Limits
from segjax.data.pair_rules import PairRules
from segjax.data.tokenize import tokenize_pairs, tokenize_prompts


def test_forced_stop_ends_truncated_responses(llama3):
  long = 'one two three ' * 9
  rows = _rows(_pair('a', long + 'x', 'two'), _pair('a', 'one', long + 'y'))
  plain = tokenize_pairs(rows, llama3, Limits(32, 24))
  forced = tokenize_pairs(rows, llama3, Limits(32, 24), PairRules(force_stop=True))
  assert forced.counts == plain.counts == {'rows': 2, **NONE, 'truncated': 2}
  assert forced.chosen_finished.all() and forced.rejected_finished.all()
  assert (plain.chosen_finished.tolist(), plain.rejected_finished.tolist()) == (
    [False, True],
    [True, False],
  )
  stop = llama3.stop_ids[0]
  # The truncated response differs only in its last token; the complete one is equal.
  for index, truncated, complete in ((0, 'chosen', 'rejected'), (1, 'rejected', 'chosen')):
    now, before = getattr(forced, truncated)[index], getattr(plain, truncated)[index]
    assert now.tolist() == [*before[:-1].tolist(), stop] != before.tolist()
    assert getattr(forced, complete)[index].tolist() == getattr(plain, complete)[index].tolist()
  assert forced.gather(np.arange(2)).chosen.finished.tolist() == [True, True]


@pytest.mark.parametrize('force_stop', [False, True])
def test_forced_stop_by_worked_numbers(llama3, force_stop):
  """A prompt truncated to 20 tokens leaves 10: 30 tokens in all, the last one the stop token."""
  row = _pair('hello there ' * 9, 'one two three ' * 9, 'two')
  prompt = llama3.prompt_ids([user(row['prompt'])])
  chosen = llama3.response_ids([user(row['prompt'])], row['chosen'])
  data = tokenize_pairs(_rows(row), llama3, Limits(30, 20), PairRules(force_stop=force_stop))
  last = llama3.stop_ids[0] if force_stop else chosen[9]
  assert data.chosen[0].tolist() == [*prompt[-20:], *chosen[:9], last]
  assert data.chosen_finished.tolist() == [force_stop]


def test_a_forced_stop_alone_is_not_content(llama3):
  prompt = len(llama3.prompt_ids([user('a')]))
  rows = _rows(_pair('a', 'one two', 'two one'), _pair('a', 'one', 'two'))
  limits = Limits(prompt + 1, prompt)  # room for one token
  assert len(tokenize_pairs(rows, llama3, limits)) == 2
  with pytest.raises(ValueError, match='2 dropped empty'):
    tokenize_pairs(rows, llama3, limits, PairRules(force_stop=True, keep_identical=True))


def test_identical_pairs_are_kept_on_request(llama3):
  long = 'one two three ' * 9
  rows = _rows(
    _pair('a', 'one', 'one'),
    _pair('a', long + 'x', long + 'y'),
    _pair('a', ' ', ''),  # no words: dropped all the same
    _pair('a', 'one', 'two'),
  )
  data = tokenize_pairs(rows, llama3, Limits(32, 24), PairRules(keep_identical=True))
  assert data.counts == {'rows': 4, **NONE, 'truncated': 1, 'dropped_empty': 1}
  assert data.row.tolist() == [0, 1, 3]
  for index in (0, 1):
    assert data.chosen[index].tolist() == data.rejected[index].tolist()


def test_identity_is_judged_after_the_forced_stop(llama3):
  short = llama3.response_ids([user('a')], 'one two')
  longer = llama3.response_ids([user('a')], 'one two three three')
  assert short[:-1] == longer[: len(short) - 1] and len(longer) > len(short)
  prompt = len(llama3.prompt_ids([user('a')]))
  limits = Limits(prompt + len(short), prompt)
  rows = _rows(_pair('a', 'one two', 'one two three three'))
  assert len(tokenize_pairs(rows, llama3, limits)) == 1
  with pytest.raises(ValueError, match='1 dropped identical'):
    tokenize_pairs(rows, llama3, limits, PairRules(force_stop=True))
  both = tokenize_pairs(rows, llama3, limits, PairRules(force_stop=True, keep_identical=True))
  assert both.chosen[0].tolist() == both.rejected[0].tolist()


def test_prompt_without_preamble(llama31, llama3):
  rules = PairRules(strip_system_preamble=True)
  turn = '<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>'
  header = '<|start_header_id|>assistant<|end_header_id|>\n\n'
  own = [system('Speak like a pirate.'), user('hello')]
  rows = _rows(_pair('hello', 'one', 'two'), _pair(own, 'one', 'two'))
  data = tokenize_pairs(rows, llama31, WIDE, rules)
  texts = [llama31.decode(data.chosen[i], skip_special=False) for i in range(2)]
  assert texts[0] == turn + header + 'one<|eot_id|>'
  # With a system message the same number of characters is lost, ten of them its own.
  assert len('<|eot_id|>') == 10
  assert texts[1] == ' a pirate.<|eot_id|>' + turn + header + 'one<|eot_id|>'
  for index, messages in enumerate(([user('hello')], own)):
    prompt = llama31.prompt_text(messages)[len(llama31.preamble) :]
    assert data.prompt_length[index] == len(llama31.encode([prompt])[0])
  # Prompts to answer keep it, and so do pairs by default.
  short = tokenize_pairs(rows, llama31, WIDE)
  prompts = tokenize_prompts(rows, llama31, WIDE)
  for index in range(2):
    prompt = prompts.tokens[index].tolist()
    assert short.chosen[index][: len(prompt)].tolist() == prompt
  # Nothing is removed if the template inserts no such turn, not even BOS.
  same = [tokenize_pairs(rows, llama3, WIDE, r) for r in (rules, PairRules())]
  np.testing.assert_array_equal(same[0].chosen.values, same[1].chosen.values)


def test_ratings_that_are_not_read_may_be_invalid(llama3):
  row = _pair('a', 'one', 'two') | {'chosen_score': float('nan'), 'rejected_score': '?'}
  assert len(tokenize_pairs(_rows(row), llama3, WIDE, PairRules(ratings=False))) == 1
  with pytest.raises(ValueError, match='chosen_score'):
    tokenize_pairs(_rows(row), llama3, WIDE)
