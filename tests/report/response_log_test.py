"""Texts of tokens: they join to the text and never divide a character."""

import numpy as np
import pytest
from fixtures.tokenizers import write_tokenizer

from segjax.data.tokenizer import load_tokenizer
from segjax.evaluation.segment_records import make_segments, token_texts


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """A tokenizer in which every byte beyond ASCII is a token."""
  return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp('tokenizer')))


@pytest.mark.parametrize('text', ['one two', 'naïve 日本 👩‍👩‍👧', '  spaces \n', 'مرحبا', ''])
def test_token_texts_join_to_the_text(tokenizer, text):
  ids = tokenizer.encode([text])[0]
  texts = token_texts(ids, tokenizer)
  assert len(texts) == len(ids)
  assert ''.join(texts) == text
  assert '\ufffd' not in ''.join(texts)


def test_a_character_is_the_text_of_its_last_token(tokenizer):
  ids = tokenizer.encode(['日'])[0]
  assert token_texts(ids, tokenizer) == ['', '', '日']


def test_an_incomplete_character_is_a_replacement_character(tokenizer):
  ids = tokenizer.encode(['日'])[0]
  after = tokenizer.encode(['one'])[0]
  texts = token_texts([*ids[:2], *after], tokenizer)
  assert ''.join(texts).endswith('one') and '\ufffd' in ''.join(texts)
  assert len(texts) == 2 + len(after)


def test_special_tokens_are_written_out(tokenizer):
  assert token_texts(tokenizer.stop_ids[:1], tokenizer)[0].startswith('<|')


def test_segments_have_the_score_of_their_last_token():
  segment_id = np.array([0, 0, 1, -1])
  entropy, score = np.array([9.0, 0.5, np.inf, 1.0]), np.array([0.0, 0.25, 0.5, 7.0])
  one, two = make_segments(['a', ' b', ' c', '<e>'], segment_id, entropy, score, reward=[1.0, -1.0])
  assert (one.text, one.score, one.reward) == ('a b', 0.25, 1.0)
  assert (two.tokens, two.entropy, two.score) == ([' c'], [None], 0.5)  # JSON has no infinity
  assert make_segments([], np.array([], int), entropy, None) == []
