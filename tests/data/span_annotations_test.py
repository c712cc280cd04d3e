"""Marked responses, and characters against tokens."""

import json

import numpy as np
import pytest
from fixtures import tokenizers

from segjax.data.limits import Limits
from segjax.data.sources import Rows, load_rows
from segjax.data.span_annotations import Span, as_span_annotation, character_tokens, tokenize_spans
from segjax.data.tokenizer import load_tokenizer

WIDE = Limits(1000, 900)
TEXT = 'the fox é 日本 😀  says\nhello'


def _row(response, *spans, prompt='one'):
  listed = [{'start': start, 'end': end, 'type': kind} for start, end, kind in spans]
  return {'prompt': prompt, 'response': response, 'spans': listed}


def _encode(tokenizer, row, limits=WIDE):
  (tokenized,), counts = tokenize_spans(Rows([row], 'r.jsonl'), tokenizer, limits)
  return tokenized, counts


@pytest.mark.parametrize(
  'offsets, length, expected',
  [
    ([(0, 2), (2, 3)], 3, [0, 0, 1]),
    ([(0, 1), (0, 1), (0, 1), (1, 2)], 2, [2, 3]),  # three tokens of one character
    ([(0, 1), (2, 3)], 3, [0, 1, 1]),  # a space outside of all tokens belongs to the next one
    ([(0, 1)], 3, [0, 0, 0]),
    ([], 0, []),
  ],
)
def test_character_tokens(offsets, length, expected):
  assert character_tokens(offsets, length).tolist() == expected


def _check_alignment(tokenizer, text):
  """A character's token is the first after which decoding gives the text up to that character."""
  tokenized, _ = _encode(tokenizer, _row(text))
  ids = tokenized.ids[tokenized.prompt_length :]
  assert ids == tokenizer.response_ids([{'role': 'user', 'content': 'one'}], text)
  for position, token in enumerate(tokenized.token_of_char):
    if text[position].isspace():
      continue
    before, upto = (tokenizer.decode(ids[:count]) for count in (token, token + 1))
    prefix = text[: position + 1].lstrip()
    assert upto.lstrip().startswith(prefix), (position, upto)
    assert not before.lstrip().startswith(prefix), (position, before)


@pytest.mark.parametrize('text', [TEXT, 'é', '日本日本', 'a\u0301b 👩‍👩‍👧 c'])
def test_alignment_of_a_byte_level_tokenizer(llama3, text):
  _check_alignment(llama3, text)


@pytest.mark.parametrize('text', [TEXT, '日本 once upon a time'])
def test_alignment_of_a_real_tokenizer_with_byte_fallback(shared_files, text):
  model = str(shared_files / 'models' / 'stories260k-hf')
  _check_alignment(load_tokenizer(model, tokenizers.PLAIN), text)


def test_white_space_that_the_template_strips_has_no_token(llama3):
  tokenized, _ = _encode(llama3, _row('  hello '))
  words = tokenized.token_of_char[2:7]
  assert tokenized.token_of_char[0] == -1
  assert (words >= 0).all()
  ids = tokenized.ids[tokenized.prompt_length :]
  assert llama3.decode(ids[words[0] : words[-1] + 1]) == 'hello'


def test_truncated_characters_have_no_token(llama3):
  complete, _ = _encode(llama3, _row('hello there ' * 9, (0, 5, 'x')))
  size = len(complete.ids)
  tokenized, counts = _encode(
    llama3, _row('hello there ' * 9), Limits(size - 6, complete.prompt_length)
  )
  assert counts['truncated'] == 1 and not tokenized.finished and complete.finished
  length = len(tokenized.ids) - tokenized.prompt_length
  expected = np.where(complete.token_of_char < length, complete.token_of_char, -1)
  assert tokenized.token_of_char.tolist() == expected.tolist()
  assert (expected < 0).any()


def test_overlong_rows_are_dropped_or_an_error(llama3):
  rows = Rows([_row('hello there ' * 9), _row('one')], 'r.jsonl')
  size = len(_encode(llama3, _row('one'))[0].ids)
  tokenized, counts = tokenize_spans(rows, llama3, Limits(size, size - 2, 'drop'))
  assert len(tokenized) == 1 and counts['dropped_overlong'] == 1
  with pytest.raises(ValueError, match=r'r.jsonl, row 1: prompt and response exceed'):
    tokenize_spans(rows, llama3, Limits(size, size - 2, 'error'))


def test_empty_responses_are_dropped_and_nothing_left_is_an_error(llama3):
  with pytest.raises(ValueError, match=r'r.jsonl: none of its 1 rows is left'):
    tokenize_spans(Rows([_row(' ')], 'r.jsonl'), llama3, WIDE)


FINE = {
  'question': 'Who?',
  'passages': [['Title', 'One.', 'Two.'], ['B']],
  'prediction 1': 'He did.',
  'feedback': {'errors': [{'error type': 'Irrelevant', 'start': 0, 'end': 2}]},
}


def test_fine_grained_rlhf_rows():
  annotation = as_span_annotation(FINE)
  assert annotation.response == 'He did.' and annotation.spans == (Span(0, 2, 'Irrelevant'),)
  assert annotation.prompt[0]['content'] == 'Passages:\nTitle One. Two.\nB\n\nQuestion: Who?'


@pytest.mark.parametrize(
  'row, message',
  [
    ({'chosen': 'a', 'rejected': 'b'}, r'row: no marked response, .* keys are chosen, rejected'),
    (_row('ab', (1, 3, 'x')), r'the span .* from 0 to 2, the number of characters'),
    (_row('ab', (1, 1, 'x')), r'must have `start` < `end`'),
    (_row('ab', (None, 1, 'x')), r'must have `start` < `end`'),
    ({**_row('ab'), 'spans': [3]}, r'the span 3 must have'),
    ({**FINE, 'passages': 'text'}, r'`passages` lists of strings'),
    ({**FINE, 'feedback': {}}, r'`feedback.errors` must be a list'),
    ({'response': 'a', 'spans': []}, r'no prompt in `messages` or `prompt`'),
  ],
)
def test_other_forms_are_named(row, message):
  with pytest.raises(ValueError, match=message):
    as_span_annotation(row)


def test_published_file(shared_files):
  folder = shared_files / 'data' / 'finegrained'
  marked = [as_span_annotation(row) for row in load_rows(str(folder / 'dev_feedback.json'))]
  assert len(marked) == 500 and sum(len(row.spans) for row in marked) == 1373
  # The prompts equal those of the pairs that were built from the same data.
  pairs = load_rows(str(folder / 'pairs.jsonl.gz'))
  prompts = {json.dumps(row['messages']) for row in pairs}
  assert sum(json.dumps(row.prompt) in prompts for row in marked) > 450
