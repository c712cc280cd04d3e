"""Token ids of texts by a table of the ids of words, for tokenizers that split texts into words.

Byte-level BPE as Llama-3's splits a text by a regular expression and then makes tokens of each part
by itself, so that a part that was seen before need not be tokenized again. The library does both
for every part: its regular expression alone takes several times as long as looking the words up.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_TABLE = 1 << 18  # words; more are forgotten together
_LONGEST = 80  # characters of a word that is kept
# No part of a text contains a space that follows another character, under the expressions below.
# Such a space is a cut where no neighbour can be white space to one engine and none to another.
_CUT = re.compile(r'(?<=[!-~\w]) (?=[!-~\w])')
# Nor does a part go on after the end of a line with a letter or digit, under Llama-3's expression.
_LINE = re.compile(r'(?<=\n)(?=[A-Za-z0-9])')
# A mark after letters is the first character of a part.
_MARK = re.compile(r'([A-Za-z]+)([.,:;!?)]+\n*)')
_UNUSUAL = re.compile('[\t\r\x0b\x0c\x1c-\x1f]')
_GPT2 = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True}
_BYTES = _GPT2 | {'use_regex': False}
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_SPLIT = {'type': 'Split', 'pattern': {'Regex': _LLAMA3}, 'behavior': 'Isolated', 'invert': False}
_DIGITS = {'type': 'Digits', 'individual_digits': True}
_SPLITTERS = ([_GPT2], [_SPLIT, _BYTES], [_DIGITS, _GPT2])


class Encoder:
  """Tokenizes texts by the library."""

  def __init__(self, tokenizer: Any):
    """Keeps the `transformers` tokenizer."""
    self._tokenizer = tokenizer

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the token ids of each text, int32, without added special tokens."""
    return [np.array(ids, np.int32) for ids in encode(self._tokenizer, texts)]


class WordTable(Encoder):
  """Tokenizes texts of a tokenizer that `splits_into_words` by the ids of words seen before."""

  def __init__(self, tokenizer: Any):
    """Starts with no words."""
    super().__init__(tokenizer)
    core = tokenizer.backend_tokenizer
    cuts_lines = _read_splitter(core) == [_SPLIT, _BYTES]
    self._firsts = _Ids(core, None, cuts_lines)
    self._ids = _Ids(core, self._firsts, cuts_lines)  # of a space and the word

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the token ids of each text, int32, without added special tokens."""
    core = self._tokenizer.backend_tokenizer
    core.no_truncation()
    core.no_padding()
    find, ids = self._ids.__getitem__, []
    for text in texts:
      words = _split(text)
      first = self._firsts[words.pop(0)]
      ids.append(np.frombuffer(first + b''.join(map(find, words)), np.int32))
    for table in (self._firsts, self._ids):
      if len(table) > _TABLE:
        table.clear()
    return ids


class _Ids(dict[str, bytes]):
  """Token ids of words as bytes of int32; those of a word that is not there yet are made."""

  def __init__(self, core: Any, firsts: '_Ids | None', cuts_lines: bool):
    """Starts with no words.

    Args:
      core: the tokenizer of the `tokenizers` library; `transformers` would take longer.
      firsts: those of texts that follow no space; None if these are those.
      cuts_lines: `_LINE` is a cut.
    """
    self._core, self._firsts, self._cuts_lines = core, firsts, cuts_lines

  def __missing__(self, word: str) -> bytes:
    firsts = self if self._firsts is None else self._firsts
    if self._cuts_lines and '\n' in word:
      first, *lines = _LINE.split(word)
      if lines:  # too many words to keep: any two of them
        return self[first] + b''.join(map(firsts.__getitem__, lines))
    if mark := _MARK.fullmatch(word):
      ids = self[mark[1]] + firsts[mark[2]]
    else:
      text = word if firsts is self else f' {word}'
      ids = np.array(self._core.encode(text, add_special_tokens=False).ids, np.int32).tobytes()
    if len(word) <= _LONGEST:
      self[word] = ids
    return ids


def make_encoder(tokenizer: Any) -> Encoder:
  """Returns the fastest encoder that gives the ids of a `transformers` tokenizer."""
  return (WordTable if splits_into_words(tokenizer) else Encoder)(tokenizer)


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
  """Returns the token ids of each text, without added special tokens, by one batch call."""
  if not texts:
    return []
  return tokenizer(
    list(texts),
    add_special_tokens=False,
    return_attention_mask=False,
    return_token_type_ids=False,
    verbose=False,
  )['input_ids']


def splits_into_words(tokenizer: Any) -> bool:
  """Returns whether a tokenizer's ids of a text are those of its words, by `WordTable`."""
  core = tokenizer.backend_tokenizer
  if core.normalizer is not None or core.pre_tokenizer is None or tokenizer.split_special_tokens:
    return False
  other_ways = ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix')
  is_bpe = type(core.model).__name__ == 'BPE'
  return (
    _read_splitter(core) in _SPLITTERS
    and is_bpe
    and not any(getattr(core.model, name) for name in other_ways)
    and not any(_crosses_words(token) for token in core.get_added_tokens_decoder().values())
  )


def _read_splitter(core: Any) -> list[dict[str, Any]]:
  """Returns how a tokenizer splits texts, as the library writes it."""
  splitter = json.loads(core.pre_tokenizer.__getstate__())
  parts = splitter['pretokenizers'] if splitter['type'] == 'Sequence' else [splitter]
  return [{k: v for k, v in part.items() if k != 'trim_offsets'} for part in parts]


def _crosses_words(token: Any) -> bool:
  """Returns whether an added token may span a cut, or depend on the word that it is in."""
  has_cut = bool(re.search(r'\s|[A-Za-z][.,:;!?)]', token.content))
  return has_cut or token.lstrip or token.rstrip or token.single_word


def _split(text: str) -> list[str]:
  """Returns the words of a text; all but the first follow a space, which they are without."""
  has_runs = '  ' in text or ' \n' in text or '\n ' in text
  is_plain = text.isascii() and not has_runs and not _UNUSUAL.search(text)
  if is_plain and not text.startswith(' ') and not text.endswith(' '):
    return text.split(' ')
  return _CUT.split(text)
