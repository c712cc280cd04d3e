"""Texts of tokens join to the decoded text, whatever the ids, and never divide a character."""

import functools

import pytest
from fixtures.tokenizers import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from segjax.data.token_texts import token_texts
from segjax.data.tokenizer import load_tokenizer

REPLACEMENT = '\N{REPLACEMENT CHARACTER}'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """A tokenizer in which every byte beyond ASCII is a token."""
  return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp('tokenizer')))


@functools.cache
def sentencepiece(kind):
  """Returns (decode, number of ids): 256 bytes and a few words, as Llama-2 or T5 decode them."""
  from tokenizers import Tokenizer, decoders, models

  words = ['<unk>', *(f'<0x{byte:02X}>' for byte in range(256)), '▁', '▁one', '▁two', 'three', '日']
  vocab = {word: i for i, word in enumerate(words)}
  core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token='<unk>'))
  parts = [decoders.ByteFallback(), decoders.Metaspace()]
  if kind == 'llama':
    parts = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    parts.append(decoders.Strip(' ', 1, 0))
  core.decoder = decoders.Sequence(parts)
  return lambda ids: core.decode(list(ids), skip_special_tokens=False), len(words)


@functools.cache
def word_piece():
  from tokenizers import Tokenizer, decoders, models

  words = ['[UNK]', 'hello', '##lo', 'hel', '##s', '.', "'", 'world']
  core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
  core.decoder = decoders.WordPiece()
  return lambda ids: core.decode(list(ids), skip_special_tokens=False), len(words)


@pytest.mark.parametrize('text', ['one two', 'naïve 日本 👩‍👩‍👧', '  spaces \n', 'مرحبا', ''])
def test_texts_join_to_a_valid_text(tokenizer, text):
  ids = tokenizer.encode([text])[0]
  texts = tokenizer.token_texts(ids)
  assert len(texts) == len(ids)
  assert ''.join(texts) == text
  assert REPLACEMENT not in ''.join(texts)


def test_a_character_is_the_text_of_its_last_token(tokenizer):
  ids = tokenizer.encode(['日'])[0]
  assert tokenizer.token_texts(ids) == ['', '', '日']


def test_characters_after_broken_ones_are_kept(tokenizer):
  first, second, third = tokenizer.encode(['日'])[0]
  one = tokenizer.encode(['one'])[0]
  ids = [first, second, *one, third, first, second, third, *one]
  texts = tokenizer.token_texts(ids)
  assert ''.join(texts) == tokenizer.decode(ids) == '�one�日one'
  assert texts == ['�', '', 'one', '�', '', '', '日', 'one']


def test_a_character_after_four_broken_bytes_is_kept(tokenizer):
  # Byte-level names of F1, F6, C1 and of the two bytes of a letter.
  ids = tokenizer.tokenizer.convert_tokens_to_ids(['ñ', 'ö', 'Á', 'Ó', 'ľ'])
  assert tokenizer.token_texts(ids) == ['�', '�', '�', '', 'Ӝ']


def test_special_tokens_are_written_out(tokenizer):
  assert tokenizer.token_texts(tokenizer.stop_ids[:1])[0].startswith('<|')


def check(ids, decode):
  texts = token_texts(ids, decode)
  assert len(texts) == len(ids)
  assert ''.join(texts) == decode(ids)


@settings(max_examples=200)
@given(data=st.data())
def test_texts_of_any_bytes_join_to_the_decoded_text(tokenizer, data):
  size = len(tokenizer.tokenizer)
  ids = data.draw(st.lists(st.integers(0, size - 1), max_size=24))
  check(ids, functools.partial(tokenizer.decode, skip_special=False))


@pytest.mark.parametrize('kind', ['llama', 't5', 'word pieces'])
@settings(max_examples=200)
@given(data=st.data())
def test_texts_of_other_decoders_join_too(kind, data):
  decode, size = word_piece() if kind == 'word pieces' else sentencepiece(kind)
  check(data.draw(st.lists(st.integers(0, size - 1), max_size=24)), decode)


@settings(max_examples=100)
@given(
  text=st.text('ab 日é👩', max_size=12),
  broken=st.lists(st.integers(0, 255), min_size=1, max_size=3),
)
def test_words_after_broken_bytes_stay_at_their_tokens(text, broken):
  decode, size = sentencepiece('t5')
  ids = [1 + byte for byte in (*broken, 0xFF)] + [size - 3, size - 2] * 4  # ▁two, three
  assert token_texts(ids, decode)[-6:] == [' two', 'three'] * 3
  # A character that is whole stays whole.
  ids = [1 + byte for byte in text.encode()]
  assert token_texts(ids, decode) == [
    part for c in text for part in [*[''] * (len(c.encode()) - 1), c]
  ]
