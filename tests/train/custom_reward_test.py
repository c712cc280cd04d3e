"""Custom rewards: every form of the returned value, assignment to tokens, errors that name both."""

import functools
import urllib.error

import numpy as np
import pytest
from fixtures import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from segjax.config.settings import RewardShaping
from segjax.data.tokenizer import ChatTokenizer, load_tokenizer
from segjax.errors import UserError
from segjax.train.custom_reward import load_gold, parse_token_rewards, token_rewards
from segjax.train.response_functions import ResponseFunction, Responses

LENGTH = 24
SETTINGS = RewardShaping()


@pytest.fixture(scope='module')
def chat(tmp_path_factory) -> ChatTokenizer:
  """A byte-level tokenizer: a character that is not ASCII is several tokens."""
  return load_tokenizer(tokenizers.write_tokenizer(tmp_path_factory.mktemp('tokenizer')))


def padded(chat, texts, length=LENGTH, fill=7):
  """Returns (ids, mask) of responses with stop tokens; the padding is a token with a text."""
  rows = [[*chat.encode([text])[0], chat.stop_ids[0]] if text else [] for text in texts]
  ids, mask = np.full((len(rows), length), fill, np.int32), np.zeros((len(rows), length), bool)
  for row, tokens in enumerate(rows):
    ids[row, : len(tokens)] = tokens
    mask[row, : len(tokens)] = True
  return ids, mask


def rewards_of(function, prompts, ids, mask, decode):
  """Returns the rewards of tokens [B, T]."""
  reward = ResponseFunction(function, parse_token_rewards, decode, SETTINGS)
  tokens = [row[real] for row, real in zip(ids, mask, strict=True)]
  return token_rewards(reward(Responses(prompts, tokens)).values, mask)


def response_rewards(chat, texts, function):
  """Returns the rewards of each response without padding, whose rewards must be 0."""
  ids, mask = padded(chat, texts)
  prompts = [f'prompt {row}' for row in range(len(texts))]
  rewards = rewards_of(function, prompts, ids, mask, chat.decode)
  assert rewards.dtype == np.float32 and rewards.shape == ids.shape
  assert (rewards[~mask] == 0).all()
  return [row[real].tolist() for row, real in zip(rewards, mask, strict=True)]


def test_number_is_assigned_to_the_last_token(chat):
  calls = []

  def function(prompt, response):
    calls.append((prompt, response))
    return 0.7

  first, second = response_rewards(chat, ['one two', 'three'], function)
  assert calls == [('prompt 0', 'one two'), ('prompt 1', 'three')]
  assert first == [0] * (len(first) - 1) + [float(np.float32(0.7))]
  assert second == [0] * (len(second) - 1) + [float(np.float32(0.7))]


@pytest.mark.parametrize(
  'value, expected',
  [
    (3, 3.0),
    (True, 1.0),
    (np.True_, 1.0),
    (np.float32(0.7), np.float32(0.7)),
    (np.float64(0.7), np.float32(0.7)),
    (np.float16(0.7), np.float16(0.7)),
    (np.int8(-128), -128.0),
    (-0.0, 0.0),
  ],
)
def test_numbers(chat, value, expected):
  (rewards,) = response_rewards(chat, ['one'], lambda prompt, response: value)
  assert rewards[-1] == float(expected)
  (rewards,) = response_rewards(chat, ['one'], lambda prompt, response: [(3, value)])
  assert rewards[-2] == float(expected)


def test_unfinished_response_is_rewarded_at_its_last_token(chat):
  ids, mask = padded(chat, ['one two'])
  mask[0, mask[0].sum() - 1] = False  # without the stop token
  rewards = rewards_of(lambda prompt, response: 2, ['p'], ids, mask, chat.decode)
  assert np.flatnonzero(rewards[0]).tolist() == [mask[0].sum() - 1]


@pytest.mark.parametrize('kind', [list, tuple, np.array, functools.partial(np.array, dtype='f4')])
def test_one_number_per_token(chat, kind):
  count = len(chat.encode(['one two three'])[0]) + 1
  values = [0.1 * (i + 1) for i in range(count)]
  (rewards,) = response_rewards(chat, ['one two three'], lambda prompt, response: kind(values))
  np.testing.assert_array_equal(rewards, np.float32(values))


def test_empty_list_is_no_reward(chat):
  for nothing in ([], (), np.zeros(0)):
    assert not any(response_rewards(chat, ['one two'], lambda prompt, response, n=nothing: n)[0])


def test_function_is_not_called_for_an_empty_response(chat):
  calls = []

  def function(prompt, response):
    calls.append(prompt)
    return 1

  rewards = response_rewards(chat, ['', 'one', ''], function)
  assert calls == ['prompt 1'] and rewards[0] == rewards[2] == []


def test_stop_token_alone_is_an_empty_text(chat):
  ids, mask = np.full((1, 4), chat.stop_ids[0]), np.array([[True, False, False, False]])
  rewards = rewards_of(lambda prompt, text: 1 if text == '' else 2, ['p'], ids, mask, chat.decode)
  assert rewards.tolist() == [[1, 0, 0, 0]]
  with pytest.raises(ValueError, match='from 1 to 0'):
    rewards_of(lambda prompt, text: [(1, 1)], ['p'], ids, mask, chat.decode)


def test_pairs_worked_example(chat):
  text = 'one €two'
  tokens = [chat.decode([i]) for i in chat.encode([text])[0]]
  # The three bytes of the euro sign are three tokens, each of them unreadable.
  assert tokens == ['one', ' ', '�', '�', '�', 't', 'wo']
  pairs = [(3, 0.5), (4, 1), (5, 2), (8, 4.0), (1, 8), (2, 0.25)]
  (rewards,) = response_rewards(chat, [text], lambda prompt, response: pairs)
  # One reward for each of these tokens, and one for the stop token.
  assert rewards == [0.5 + 8 + 0.25, 1, 0, 0, 2, 0, 4, 0]
  # A pair may be a list, too.
  (from_lists,) = response_rewards(chat, [text], lambda prompt, response: tuple(map(list, pairs)))
  assert from_lists == rewards


def test_pairs_at_one_token_are_added_before_they_are_rounded(chat):
  (rewards,) = response_rewards(
    chat, ['one'], lambda prompt, response: [(1, 0.1), (2, 0.2), (3, 0.4)]
  )
  assert rewards[0] == float(np.float32(0.1 + 0.2 + 0.4))


def test_response_that_breaks_off_inside_a_character(chat):
  ids = np.array([chat.encode(['a€'])[0][:3]])
  text = chat.decode(ids[0])
  assert text == 'a�'
  mask = np.ones((1, 3), bool)
  rewards = rewards_of(lambda prompt, response: [(1, 1), (2, 2)], ['p'], ids, mask, chat.decode)
  assert rewards[0, 0] == 1 and rewards[0, 1:].sum() == 2


@given(text=st.text('ab €é😀\n', min_size=1, max_size=8), data=st.data())
def test_pair_is_assigned_to_the_token_that_completes_its_text(chat, text, data):
  tokens = chat.encode([text])[0]
  end = data.draw(st.integers(1, len(text)))
  # By counting bytes: a token of this vocabulary is one byte a character of its name.
  bytes_after = np.cumsum([len(name) for name in chat.tokenizer.convert_ids_to_tokens(tokens)])
  expected = int(np.searchsorted(bytes_after, len(text[:end].encode())))
  ids, mask = np.array([tokens]), np.ones((1, len(tokens)), bool)
  rewards = rewards_of(lambda prompt, response: [(end, 1)], ['p'], ids, mask, chat.decode)
  assert np.flatnonzero(rewards[0]).tolist() == [expected]


def test_tokens_that_were_seen_are_not_decoded_again(chat):
  calls = []

  def decode(ids):
    calls.append(len(ids))
    return chat.decode(ids)

  ids, mask = padded(chat, ['the quick brown fox ' * 20] * 2, length=512)
  ends = [(end, 1) for end in range(20, 401, 20)]
  rewards = rewards_of(lambda prompt, response: ends, ['p'] * 2, ids, mask, decode)
  assert rewards.sum() == 40 and mask.sum() > 200
  # Of the second response, the whole text, and its first token, which alone may lose a space.
  assert len(calls) < 60 and calls[-3:] == [161, 1, 0]


def test_token_texts_are_passed_to_a_tokens_parameter(chat):
  seen = []

  def function(prompt, response, tokens):
    seen.append(tokens)
    return [len(text) for text in tokens]

  rewards = response_rewards(chat, ['one €', 'one'], function)
  assert seen == [['one', ' ', '', '', '€', ''], ['one', '']]
  assert rewards == [[3, 1, 0, 0, 1, 0], [3, 0]]


@pytest.mark.parametrize(
  'value, message',
  [
    (float('nan'), 'returned nan; return a finite number'),
    (np.float32('inf'), 'returned .*inf.*finite'),
    (1e39, 'returned 1e\\+39'),
    (10**400, 'returned 10000'),
    (None, 'returned None'),
    ('0.7', "returned '0.7'"),
    ({'reward': 1}, 'returned {'),
    (1j, 'returned 1j'),
    ([1, 2], 'returned 2 numbers for 3 tokens'),
    ([1, 2, 3, 4], 'returned 4 numbers for 3 tokens'),
    ([1, 2, None], 'returned None'),
    ([1, 2, float('nan')], 'returned nan'),
    ([(1, 2), 3], 'returned 3 among pairs'),
    ([(1, 2, 3)], r'returned \(1, 2, 3\) among pairs'),
    ([(0, 2)], r'returned the pair \(0, 2\); its first element must be an integer from 1 to 7'),
    ([(8, 2)], r'returned the pair \(8, 2\).*from 1 to 7, the number of characters'),
    ([(1.0, 2)], r'returned the pair \(1\.0, 2\).*integer'),
    ([(True, 2)], r'returned the pair \(True, 2\).*integer'),
    ([(1, float('inf'))], 'returned inf'),
    ([(1, '2')], "returned '2'"),
  ],
)
def test_invalid_values_name_the_function_and_the_prompt(chat, value, message):
  def reward_fn(prompt, response):
    return value

  text = 'one two'
  assert chat.encode([text])[0] == chat.encode(['one'])[0] + chat.encode([' two'])[0]
  ids, mask = padded(chat, [text])
  with pytest.raises(
    ValueError, match=rf"custom_reward_test:.*reward_fn on .*'why{{40,}}\.\.\. {message}"
  ):
    rewards_of(reward_fn, ['wh' + 'y' * 200], ids, mask, chat.decode)


@pytest.mark.parametrize(
  'error, words',
  [
    (KeyError('x'), "KeyError: 'x'"),
    (urllib.error.URLError('timed out'), 'URLError: <urlopen error timed out>'),
    (UserError('bad\nmore'), 'UserError: bad'),
    (RuntimeError(), 'RuntimeError'),
    (SystemExit(3), 'SystemExit: 3'),
  ],
)
def test_exceptions_name_the_function_the_prompt_and_the_cause(chat, error, words):
  def reward_fn(prompt, response):
    raise error

  ids, mask = padded(chat, ['one'])
  with pytest.raises(
    UserError,
    match=rf"^{__name__}:.*reward_fn on the prompt 'hello' raised {words} in line \d+ of "
    r'custom_reward_test.py; correct the function \(SEGJAX_TRACEBACK=1',
  ) as caught:
    rewards_of(reward_fn, ['hello'], ids, mask, chat.decode)
  assert caught.value.__cause__ is error and '\n' not in str(caught.value)


def test_gold_functions_raise_one_line(tmp_path, monkeypatch, chat):
  (tmp_path / 'gold_rules.py').write_text(
    'def number(prompt, response): return {"a": 2, "b": None, "c": float("nan")}[response]\n'
    'def many(*texts, tokens=None): return 1\n'
  )
  monkeypatch.syspath_prepend(tmp_path)

  def gold(name, text):
    function = load_gold(
      f'gold_rules:{name}', RewardShaping(reward_fn_on_error='zero'), chat.decode
    )
    return function(Responses(['p'], chat.encode([text])))

  assert gold('number', 'a') == [2] and gold('many', 'a') == [1]
  for response, words in (
    ('b', 'returned None; return a finite number'),
    ('c', 'returned nan; return a finite number'),
    ('d', "raised KeyError: 'd' in line 1 of gold_rules.py; correct"),
  ):
    with pytest.raises(UserError, match=rf"^gold_rules:number on the prompt 'p' {words}"):
      gold('number', response)


def test_functions_without_signature_or_name(chat):
  # max has no signature, and returns one of its two texts, which is not a number.
  with pytest.raises(ValueError, match=r"^builtins:max on .* 'prompt 0' returned 'prompt 0'"):
    response_rewards(chat, ['one'], max)
  nameless = functools.partial(lambda value, prompt, response: value, 'x')
  with pytest.raises(ValueError, match=r'^functools\.partial'):
    response_rewards(chat, ['one'], nameless)
