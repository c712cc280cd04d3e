"""Tokens as text: joined they are the text, and parts of a character are not shown broken."""

import numpy as np
import pytest
from fixtures.tokenizers import write_tokenizer

from segjax.data.tokenizer import load_tokenizer
from segjax.report.response_log import segments_of, token_texts


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """Every byte beyond ASCII is a token of its own."""
  return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp('tokenizer')))


@pytest.mark.parametrize('text', ['one two', 'naïve 日本 👩‍👩‍👧', '  spaces \n', 'مرحبا', ''])
def test_pieces_join_to_the_text(tokenizer, text):
  ids = tokenizer.encode([text])[0]
  found = token_texts(ids, tokenizer)
  assert len(found) == len(ids)
  assert ''.join(found) == text
  assert '\ufffd' not in ''.join(found)


def test_a_character_stands_at_its_last_token(tokenizer):
  ids = tokenizer.encode(['日'])[0]
  assert token_texts(ids, tokenizer) == ['', '', '日']


def test_a_broken_character_is_shown_as_one(tokenizer):
  ids = tokenizer.encode(['日'])[0]
  after = tokenizer.encode(['one'])[0]
  found = token_texts([*ids[:2], *after], tokenizer)
  assert ''.join(found).endswith('one') and '\ufffd' in ''.join(found)
  assert len(found) == 2 + len(after)


def test_special_tokens_are_written_out(tokenizer):
  assert token_texts(tokenizer.stop_ids[:1], tokenizer)[0].startswith('<|')


def test_segments_have_the_score_of_their_last_token():
  segment_id = np.array([0, 0, 1, -1])
  entropy, score = np.array([9.0, 0.5, np.inf, 1.0]), np.array([0.0, 0.25, 0.5, 7.0])
  one, two = segments_of(['a', ' b', ' c', '<e>'], segment_id, entropy, score, [1.0, -1.0])
  assert (one.text, one.score, one.reward) == ('a b', 0.25, 1.0)
  assert (two.tokens, two.entropy, two.score) == ([' c'], [None], 0.5)  # JSON knows no infinity
  assert segments_of([], np.array([], int), entropy, None, None) == []
