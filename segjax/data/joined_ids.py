"""Token ids of pieces of text that are those of the whole text.

Tokenizers made by sentencepiece put a space in front of every text. Pieces that are tokenized apart
then have spaces that the whole text does not have; here they are tokenized together and separated
by their characters.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_SENTINELS = ('\n', '|', ':', '.')
_WORD = 'Quokka'
# What the parts of a tokenizer that put a space in front of a text are called.
_PREFIXES = ('"Prepend"', '"Metaspace"', '"add_prefix_space":true')


class Encoded(NamedTuple):
  """Token ids, and (first character, last character + 1) of each token, [T, 2]."""

  ids: list[int]
  offsets: np.ndarray


def find_sentinel(tokenizer: Any) -> str:
  """Returns a text after which other text is tokenized without a space in front of it.

  '' if the tokenizer puts no space in front of a text, as byte-level ones do.
  """
  core = tokenizer.backend_tokenizer
  parts = [part.__getstate__() for part in (core.normalizer, core.pre_tokenizer) if part]
  state = ''.join(part.decode() if isinstance(part, bytes) else str(part) for part in parts)
  if not any(prefix in state.replace(' ', '') for prefix in _PREFIXES):
    return ''
  alone = _encode(tokenizer, [_WORD])[0].ids
  for sentinel in _SENTINELS:
    encoded = _encode(tokenizer, [sentinel + _WORD])[0]
    pieces, spanned = _split(encoded, [len(sentinel)])
    if not spanned and pieces[1] != alone:
      return sentinel
  return ''


def encode_joined(
  tokenizer: Any, groups: Sequence[Sequence[str]], sentinel: str
) -> list[list[list[int]]]:
  """Returns the token ids of each piece, those of a group joined being those of its whole text.

  Where a token of the whole text would span two pieces, both are tokenized apart, the second
  without a space in front of it.

  Args:
    tokenizer: fast tokenizer.
    groups: the pieces of each text.
    sentinel: see `find_sentinel`.
  """
  results = []
  for pieces, encoded in zip(groups, _encode(tokenizer, map(''.join, groups)), strict=True):
    boundaries = list(itertools.accumulate(map(len, pieces)))[:-1]
    ids, spanned = _split(encoded, boundaries)
    results.append(_encode_runs(tokenizer, pieces, spanned, sentinel) if spanned else ids)
  return results


def encode_after(tokenizer: Any, context: str, text: str, sentinel: str) -> Encoded:
  """Returns the tokens of a text as they follow a context; offsets count from the text's start."""
  for before in (context, sentinel):
    encoded = _encode(tokenizer, [before + text])[0]
    if not _split(encoded, [len(before)])[1]:
      first = _first_token(encoded, len(before))
      return Encoded(encoded.ids[first:], encoded.offsets[first:] - len(before))
  return _encode(tokenizer, [text])[0]


def _encode_runs(
  tokenizer: Any, pieces: Sequence[str], spanned: list[int], sentinel: str
) -> list[list[int]]:
  """Tokenizes the pieces between boundaries that a token spans, each run of them by itself."""
  cuts = [0, *(number + 1 for number in spanned), len(pieces)]
  results = []
  for start, stop in itertools.pairwise(cuts):
    run = list(pieces[start:stop])
    front = sentinel if start else ''
    boundaries = list(itertools.accumulate(map(len, [front, *run])))[:-1]
    ids, _ = _split(_encode(tokenizer, [front + ''.join(run)])[0], boundaries)
    results += ids[1:]
  return results


def _split(encoded: Encoded, boundaries: list[int]) -> tuple[list[list[int]], list[int]]:
  """Returns (ids of each piece, numbers of the boundaries inside a token).

  A token belongs to the piece of its first character.
  """
  cuts = [0, *(_first_token(encoded, boundary) for boundary in boundaries), len(encoded.ids)]
  ends = np.maximum.accumulate(np.concatenate([[0], encoded.offsets[:, 1]]))
  spanned = [
    number for number, boundary in enumerate(boundaries) if ends[cuts[number + 1]] > boundary
  ]
  return [encoded.ids[a:b] for a, b in itertools.pairwise(cuts)], spanned


def _first_token(encoded: Encoded, position: int) -> int:
  """Returns the index of the first token that begins at this character or behind it."""
  return int(np.searchsorted(encoded.offsets[:, 0], position))


def _encode(tokenizer: Any, texts: Any) -> list[Encoded]:
  texts = list(texts)
  if not texts:
    return []
  encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
  return [
    Encoded(ids, np.array(offsets, np.int64).reshape(-1, 2))
    for ids, offsets in zip(encoded['input_ids'], encoded['offset_mapping'], strict=True)
  ]
