"""Rows of labelled steps as tokens: equal to a loop over single rows, whoever tokenizes them."""

import numpy as np
import pytest
from fixtures.tokenizers import assistant, user

from segjax.data import limits as limits_lib
from segjax.data import token_cache
from segjax.data.limits import Limits, NoRowsLeftError
from segjax.data.row_forms import is_pair
from segjax.data.rows import Reading
from segjax.data.sources import Rows
from segjax.data.span_annotations import SpanAnnotation, tokenize_annotation
from segjax.data.step_labels import as_labelled_response
from segjax.data.token_chunks import prompt_key
from segjax.data.tokenize import tokenize_steps
from segjax.errors import UserError

WORDS = ('the fox', ' sleeps.', '\n\n', 'é', '日本', '😀', ' one ', '\ttwo', '\n', ' .', 'don’t')
LIMITS = [Limits(200, 100), Limits(60, 30), Limits(140, 70, 'drop'), Limits(20, 13)]


def random_rows(seed, count=60):
  """Returns labelled rows of all forms, and pairs between them."""
  rng = np.random.default_rng(seed)

  def text():
    return ''.join(rng.choice(WORDS, rng.integers(1, 20))) + 'x'

  rows = []
  for number in range(count):
    response = rng.choice(['', ' ', '\n']) + text() + rng.choice(['', ' ', '\n'])
    number_of_steps = rng.integers(0, min(5, len(response)))
    ends = sorted(rng.choice(np.arange(1, len(response) + 1), number_of_steps, replace=False))
    steps = [[int(end), float(label)] for end, label in zip(ends, rng.random(5), strict=False)]
    earlier = [user(text()), assistant(text())] if number % 3 else []
    if number % 5 == 4:
      rows.append({'prompt': text(), 'chosen': response, 'rejected': text()})
    elif number % 4 == 1:
      parts = [text() for _ in range(4)]
      rows.append({'prompt': text(), 'completions': parts, 'labels': [1, 0, True, 0.5]})
    else:
      messages = [*earlier, user(text()), assistant(response)]
      rows.append({'messages': messages, 'steps': steps})
  return rows


def slow_steps(rows, tokenizer, limits):
  """Returns (ids, labels, index, key of the prompt) of each row that is kept, and the counts."""
  kept, counts = [], limits_lib.new_counts(len(rows))
  for index, row in enumerate(rows):
    if is_pair(row):
      counts['pairs'] = counts.get('pairs', 0) + 1
      continue
    labelled = as_labelled_response(row)
    annotation = SpanAnnotation(labelled.prompt, labelled.response, ())
    tokenized, is_truncated = tokenize_annotation(annotation, tokenizer, limits, 'row')
    (text,) = tokenizer.response_texts(
      labelled.prompt, tokenizer.prompt_text(labelled.prompt), [labelled.response]
    )
    words = labelled.response.rstrip()
    label_of = {}
    for end, label in labelled.steps:
      if labelled.response not in text and end > len(words):
        end = len(words)
      token = tokenized.token_of_char[end - 1]
      if token >= 0:
        label_of[tokenized.prompt_length + token] = label
    if is_truncated and limits.overlong_policy == 'drop':
      counts['dropped_overlong'] += 1
    elif not label_of:
      counts['dropped_empty'] += 1
    else:
      counts['truncated'] += is_truncated
      labels = [label_of.get(position, np.nan) for position in range(len(tokenized.ids))]
      kept.append((tokenized.ids, labels, index, prompt_key(labelled.prompt)))
  return kept, counts


def assert_is_slow(steps, expected):
  kept, counts = expected
  assert steps.counts == counts and len(steps) == len(kept)
  for number, (ids, labels, index, key) in enumerate(kept):
    assert steps.tokens[number].tolist() == ids
    np.testing.assert_array_equal(steps.labels[number], np.array(labels, np.float32))
    assert (steps.row[number], steps.group[number]) == (index, key)


@pytest.mark.parametrize('name', ['llama3', 'chatml'])
@pytest.mark.parametrize('limits', LIMITS, ids=str)
def test_rows_are_those_of_a_slow_loop(request, monkeypatch, name, limits):
  monkeypatch.setattr('segjax.data.tokenize._CHUNK', 16)
  tokenizer, rows = request.getfixturevalue(name), random_rows(3)
  steps = tokenize_steps(Rows(rows, 'r'), tokenizer, limits)
  expected = slow_steps(rows, tokenizer, limits)
  assert_is_slow(steps, expected)
  assert expected[1]['pairs'] == 12 and len(steps) > 5
  if limits.max_length < 200:
    assert steps.counts['truncated'] or steps.counts['dropped_overlong']
  longest = max(len(ids) for ids, *_ in expected[0])
  assert longest <= steps.length <= min(limits.max_length, longest + 7)


@pytest.mark.processes
@pytest.mark.parametrize('num_workers', [1, 2])
def test_workers_give_the_same_rows(monkeypatch, llama3, num_workers):
  monkeypatch.setattr('segjax.data.tokenize._CHUNK', 16)
  monkeypatch.setattr('segjax.data.tokenize._MANY', 1)
  monkeypatch.setattr('segjax.data.token_workers.count_workers', lambda: num_workers)
  monkeypatch.setenv(token_cache.VARIABLE, '')
  rows = random_rows(5)
  steps = tokenize_steps(Rows(rows, 'r'), llama3, LIMITS[1])
  assert_is_slow(steps, slow_steps(rows, llama3, LIMITS[1]))


def test_what_cannot_be_rendered_is_a_bad_row(llama3):
  closed = {'prompt': 'a', 'response': 'one<|eot_id|>', 'steps': [[3, 1]]}
  good = {'prompt': 'a', 'response': 'one', 'steps': [[3, 1]]}
  with pytest.raises(UserError, match=r'^r, row 2: .*eot_id') as error:
    tokenize_steps(Rows([good, closed], 'r'), llama3, LIMITS[0])
  assert '\n' not in str(error.value)
  rows = Rows([closed, good], 'r', reading=Reading(drop_bad=True))
  steps = tokenize_steps(rows, llama3, LIMITS[0])
  assert steps.row.tolist() == [1] and steps.counts['dropped_bad'] == 1


@pytest.mark.parametrize(
  'row, counts',
  [
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, '2 rows, 2 pairs'),
    ({'prompt': 'a', 'response': 'b', 'steps': []}, '2 rows, 2 dropped empty'),
  ],
)
def test_no_rows_left_is_one_line(llama3, row, counts):
  with pytest.raises(NoRowsLeftError, match=rf'^r: none of its 2 rows is left \({counts}\)'):
    tokenize_steps(Rows([row, row], 'r'), llama3, LIMITS[0])


@pytest.mark.parametrize('white_space', ['', '\n', '\n\n', ' \n'])
def test_a_label_behind_stripped_white_space_is_that_of_the_last_word(llama3, white_space):
  """Llama-3's template strips it; the label is not that of the token behind the response."""
  steps = [[len('Two.'), 0.0], [len('Two.\n\nFour.') + len(white_space), 1.0]]
  messages = [user('2 + 2?'), assistant('Two.\n\nFour.' + white_space)]
  rows = Rows([{'messages': messages, 'steps': steps}], 'rows')
  tokenized = tokenize_steps(rows, llama3, Limits(200, 100))
  ids, labels = tokenized.tokens[0], tokenized.labels[0]
  (last,) = np.flatnonzero(labels == 1)
  assert llama3.tokenizer.decode(ids[: last + 1]).endswith('Four.')
