"""Ids by a table of words, compared with those of the library for whole texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segjax.data import word_ids


def _tokenizer(splitter):
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast

  core = Tokenizer(models.BPE())
  core.pre_tokenizer = splitter
  core.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  texts = ["it's  the quick\n\nbrown fox, 12345 jumps!  over\tit.\r\n It’s ünïcödé 日本 don't"] * 9
  core.train_from_iterator(texts, trainer)
  core.add_special_tokens([AddedToken('<|eot_id|>', special=True, normalized=False)])
  return PreTrainedTokenizerFast(tokenizer_object=core)


def _splitters():
  from tokenizers import Regex, pre_tokenizers

  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  split = pre_tokenizers.Split(Regex(word_ids._LLAMA3), 'isolated')
  digits = pre_tokenizers.Digits(individual_digits=True)
  return {
    'gpt2': byte_level,
    'llama3': pre_tokenizers.Sequence([split, plain]),
    'digits': pre_tokenizers.Sequence([digits, byte_level]),
  }


@pytest.fixture(scope='module')
def tokenizers():
  return {name: _tokenizer(splitter) for name, splitter in _splitters().items()}


_PARTS = (
  *(' ', '  ', '\n', '\n\n', '\t', '\r\n', '\x0b', '\x1c', '\x85', '\xa0', '\u2003', '\u180e'),
  *(
    "'s",
    "'LL",
    'word',
    'word.',
    'Words),\n',
    'Words',
    '12',
    '1234567',
    '.',
    '!?',
    '<|eot_id|>',
    'é',
    '日本',
    'ſ',
    '\u0301',
  ),
  *('\u200b', '\ufeff', '😀', '\x00', '\x7f', '_', '½'),
)


@given(text=st.lists(st.sampled_from(_PARTS), max_size=12).map(''.join))
@pytest.mark.parametrize('name', ['gpt2', 'llama3', 'digits'])
def test_ids_are_those_of_the_library(tokenizers, name, text):
  tokenizer = tokenizers[name]
  encoder = word_ids.make_encoder(tokenizer)
  assert isinstance(encoder, word_ids.WordTable)
  texts = [text, f'the {text} fox', text]
  for _ in range(2):  # unknown words, then known ones
    assert [ids.tolist() for ids in encoder.encode(texts)] == word_ids.encode(tokenizer, texts)


def test_the_table_is_bounded(tokenizers, monkeypatch):
  monkeypatch.setattr(word_ids, '_TABLE', 3)
  encoder = word_ids.WordTable(tokenizers['llama3'])
  texts = [f'the {"word" * 30} fox', 'a b c d e f']
  for text in texts:
    assert encoder.encode([text])[0].tolist() == word_ids.encode(tokenizers['llama3'], [text])[0]
    assert len(encoder._ids) <= 3 and not any(len(word) > 80 for word in encoder._ids)


def test_other_tokenizers_are_not_split(tokenizers):
  from tokenizers import AddedToken, normalizers, pre_tokenizers

  def assert_splits(expected, change):
    tokenizer = _tokenizer(_splitters()['llama3'])
    change(tokenizer.backend_tokenizer)
    assert word_ids.splits_into_words(tokenizer) is expected

  assert_splits(True, lambda core: None)
  for token in (
    AddedToken('a b'),
    AddedToken('Inc.'),
    AddedToken('ab', lstrip=True),
    AddedToken('ab', single_word=True),
  ):
    assert_splits(False, lambda core, token=token: core.add_tokens([token]))
  other = pre_tokenizers.ByteLevel(add_prefix_space=True)
  for name, value in (('normalizer', normalizers.NFC()), ('pre_tokenizer', other)):
    assert_splits(False, lambda core, name=name, value=value: setattr(core, name, value))
