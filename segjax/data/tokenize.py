"""Rows of text -> datasets of token ids, within limits of length.

Rows are read by `segjax.data.sources` and tokenised by `segjax.data.tokenizer`; batches are made
by `segjax.data.batches`. Here is decided what is cut, what is left out, and how often.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from segjax.config.choices import OVERLONG_POLICIES
from segjax.data.batches import Conversations, Pairs, Prompts, Ragged
from segjax.data.sources import Message, Pair, Row, Rows, as_conversation, as_pair, as_prompt
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError

_DROPPED = ('dropped_overlong', 'dropped_identical', 'dropped_empty')
_CHUNK = 1024  # rows tokenised per call
_ROUND = 8  # lengths are rounded up to a multiple of this


@dataclasses.dataclass(frozen=True)
class Limits:
  """How long rows may be, in tokens, and what happens to longer ones.

  Attributes:
    max_length: prompt and response together.
    max_prompt_length: of a pair's prompt once something must be cut; of a lone prompt always.
    overlong_policy: 'truncate_left' cuts prompts and conversations at their beginning, 'drop'
    leaves the
      row out, 'error' raises.
  """

  max_length: int
  max_prompt_length: int
  overlong_policy: str = 'truncate_left'

  def __post_init__(self):
    if self.overlong_policy not in OVERLONG_POLICIES:
      raise UserError(
        f'data.overlong_policy={self.overlong_policy!r}; choose one of '
        f'{", ".join(OVERLONG_POLICIES)}.'
      )
    if not 0 < self.max_prompt_length <= self.max_length:
      raise UserError(
        f'data.max_prompt_length={self.max_prompt_length} must be at least 1 and at most '
        f'data.max_length={self.max_length}.'
      )


@dataclasses.dataclass(frozen=True)
class PairRules:
  """What of a pair is read, and what published code does to it.

  Attributes:
    ratings: the pair's ratings are read, and have to be numbers.
    force_stop: the last kept token of a response that was cut is overwritten by the stop token,
      and the response counts as finished.
    keep_identical: pairs whose sides are the same are kept.
    strip_system_preamble: the prompt's text loses its first len(tokenizer.preamble) characters,
    even
      where it has a system message of its own instead, which then loses its beginning.
  """

  ratings: bool = True
  force_stop: bool = False
  keep_identical: bool = False
  strip_system_preamble: bool = False


def tokenize_conversations(rows: Rows, tokenizer: ChatTokenizer, limits: Limits) -> Conversations:
  """Conversations to imitate: all assistant turns are trained, each with its stop token.

  Too long a conversation keeps its LAST max_length tokens. One without a trained token is dropped
  (`dropped_empty`).

  Returns:
    A dataset whose `counts` has rows, truncated, dropped_overlong, dropped_identical (always 0
    here) and dropped_empty; rows that were cut and then dropped count as dropped only.

  Raises:
    ValueError: a row that cannot be read or is too long under 'error', or no row is left.
  """

  def write(messages: list[Message]) -> tuple[list[str], list[bool]]:
    pieces = tokenizer.turn_texts(messages)
    return [text for text, _ in pieces], [is_trained for _, is_trained in pieces]

  tokens, trained, group, counts = [], [], [], _new_counts(rows)
  for where, key, pieces, flags in _tokenize(rows, tokenizer, as_conversation, write):
    ids = np.array([i for piece in pieces for i in piece], np.int32)
    mask = np.repeat(np.array(flags, bool), [len(piece) for piece in pieces])
    is_long = len(ids) > limits.max_length
    if is_long and _is_dropped(where, f'{len(ids)} tokens', limits, counts):
      continue
    ids, mask = ids[-limits.max_length :], mask[-limits.max_length :]
    if not mask.any():
      counts['dropped_empty'] += 1
      continue
    counts['truncated'] += is_long
    tokens.append(ids)
    trained.append(mask)
    group.append(key)
  return Conversations(
    tokens=Ragged.from_rows(tokens, np.int32),
    trained=Ragged.from_rows(trained, bool),
    group=np.array(group, np.uint64),
    length=_fixed_length(tokens, limits.max_length, rows, counts),
    pad_id=tokenizer.pad_id,
    counts=counts,
  )


def tokenize_pairs(
  rows: Rows, tokenizer: ChatTokenizer, limits: Limits, rules: PairRules = PairRules()
) -> Pairs:
  """Preferences: prompt and response of both sides, cut as `pair_lengths` says.

  A response that is cut is not finished: its last token stays what it was. A pair is dropped if
  either response has no content (`dropped_empty`) or if both are the same once cut
  (`dropped_identical`). `rules` say where published code differs.

  Returns:
    A dataset with `counts`, as `encode_conversations`.

  Raises:
    ValueError: a row that cannot be read or is too long under 'error', or no row is left.
  """
  stop = tokenizer.stop_ids[0] if rules.force_stop else None
  start = len(tokenizer.preamble) if rules.strip_system_preamble else 0

  def write(pair: Pair) -> tuple[list[str], tuple[bool, float]]:
    prompt, answers = tokenizer.prompt_text(pair.prompt), [pair.chosen, pair.rejected]
    texts = tokenizer.response_texts(pair.prompt, prompt, answers)
    gap = math.nan if pair.rating_gap is None else pair.rating_gap
    return [prompt[start:], *texts], (all(text.strip() for text in answers), gap)

  kept, counts = [], _new_counts(rows)
  read = _tokenize(rows, tokenizer, functools.partial(as_pair, ratings=rules.ratings), write)
  for index, (where, key, texts, (has_words, gap)) in enumerate(read):
    found = tuple(len(ids) for ids in texts)
    cut = pair_lengths(*found, limits)
    if cut != found and _is_dropped(where, _describe_lengths(found), limits, counts):
      continue
    prompt = texts[0][found[0] - cut[0] :]
    ends = [
      _truncate_response(ids, length, stop) for ids, length in zip(texts[1:], cut[1:], strict=True)
    ]
    sides, finished = zip(*ends, strict=True)
    # A finished response ends in a stop token, which is no content.
    if not has_words or any(len(s) <= f for s, f in zip(sides, finished, strict=True)):
      counts['dropped_empty'] += 1
    elif sides[0] == sides[1] and not rules.keep_identical:
      counts['dropped_identical'] += 1
    else:
      counts['truncated'] += cut != found
      both = [np.array(prompt + side, np.int32) for side in sides]
      kept.append((*both, *finished, len(prompt), gap, index, key, cut != found))
  length = _fixed_length([t for row in kept for t in row[:2]], limits.max_length, rows, counts)
  chosen, rejected, *ended, prompt_length, rating_gap, row, group, truncated = zip(
    *kept, strict=True
  )
  return Pairs(
    chosen=Ragged.from_rows(chosen, np.int32),
    rejected=Ragged.from_rows(rejected, np.int32),
    chosen_finished=np.array(ended[0], bool),
    rejected_finished=np.array(ended[1], bool),
    prompt_length=np.array(prompt_length, np.int32),
    rating_gap=np.array(rating_gap, np.float32),
    row=np.array(row, np.int64),
    group=np.array(group, np.uint64),
    length=length,
    pad_id=tokenizer.pad_id,
    counts=counts,
    truncated=np.array(truncated, bool),
  )


def tokenize_prompts(rows: Rows, tokenizer: ChatTokenizer, limits: Limits) -> Prompts:
  """Prompts to answer, each with the header that opens the answer.

  Too long a prompt keeps its LAST max_prompt_length tokens. One of nothing but special tokens is
  dropped (`dropped_empty`).

  Returns:
    A dataset with `counts`, as `encode_conversations`.

  Raises:
    ValueError: a row that cannot be read or is too long under 'error', or no row is left.
  """

  def write(messages: list[Message]) -> tuple[list[str], None]:
    return [tokenizer.prompt_text(messages)], None

  special = tokenizer.special_ids
  tokens, row, group, counts = [], [], [], _new_counts(rows)
  read = _tokenize(rows, tokenizer, as_prompt, write)
  for index, (where, key, (ids,), _) in enumerate(read):
    is_long = len(ids) > limits.max_prompt_length
    if is_long and _is_dropped(where, f'a prompt of {len(ids)} tokens', limits, counts):
      continue
    if special.issuperset(ids):
      counts['dropped_empty'] += 1
      continue
    counts['truncated'] += is_long
    tokens.append(np.array(ids[-limits.max_prompt_length :], np.int32))
    row.append(index)
    group.append(key)
  return Prompts(
    tokens=Ragged.from_rows(tokens, np.int32),
    row=np.array(row, np.int64),
    source=rows,
    group=np.array(group, np.uint64),
    length=_fixed_length(tokens, limits.max_prompt_length, rows, counts),
    pad_id=tokenizer.pad_id,
    counts=counts,
  )


def pair_lengths(prompt: int, chosen: int, rejected: int, limits: Limits) -> tuple[int, int, int]:
  """How many tokens of a pair are kept: of the prompt the LAST, of the responses the FIRST.

  Only if the prompt and the longer response exceed max_length: the prompt is cut to
  max_prompt_length, and if that is not enough, both responses to what the prompt leaves.
  """
  if prompt + max(chosen, rejected) <= limits.max_length:
    return prompt, chosen, rejected
  prompt = min(prompt, limits.max_prompt_length)
  room = limits.max_length - prompt
  return prompt, min(chosen, room), min(rejected, room)


def _truncate_response(ids: list[int], length: int, stop: int | None) -> tuple[list[int], bool]:
  """(the first tokens of a response, whether they end in a stop token), forced where given."""
  is_whole = length == len(ids)
  if is_whole or stop is None or not length:
    return ids[:length], is_whole
  return [*ids[: length - 1], stop], True


def _tokenize(
  rows: Rows,
  tokenizer: ChatTokenizer,
  read: Callable[[Row, str], Any],
  write: Callable[[Any], tuple[list[str], Any]],
) -> Iterator[tuple[str, int, list[list[int]], Any]]:
  """Reads each row, writes it as texts and tokenises these many at a time.

  Yields:
    (where, key of the first text, token ids of each text, what else `write` gave) of each row.
  """
  chunk = []
  for index, row in enumerate(rows):
    where = rows.where(index)
    item = read(row, where)
    try:
      chunk.append((where, *write(item)))
    except ValueError as error:
      raise UserError(f'{where}: {error}') from error
    if len(chunk) == _CHUNK or index == len(rows) - 1:
      ids = iter(tokenizer.encode([text for _, texts, _ in chunk for text in texts]))
      for where, texts, other in chunk:
        yield where, _key(texts), [next(ids) for _ in texts], other
      chunk = []


def _key(texts: Sequence[str]) -> int:
  """64 bits that are equal for equal prompts; `split_holdout` groups by them."""
  text = texts[0] if texts else ''
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def _new_counts(rows: Rows) -> dict[str, int]:
  return {'rows': len(rows), 'truncated': 0, **dict.fromkeys(_DROPPED, 0)}


def _describe_lengths(lengths: Sequence[int]) -> str:
  return 'prompt {}, chosen {} and rejected {} tokens'.format(*lengths)


def _is_dropped(where: str, found: str, limits: Limits, counts: dict[str, int]) -> bool:
  """True if a row that is too long is to be left out; raises if it is an error."""
  if limits.overlong_policy == 'error':
    raise UserError(
      f'{where}: {found} exceed data.max_length={limits.max_length} (prompt '
      f'{limits.max_prompt_length}); raise them, or set data.overlong_policy to truncate_left or '
      'drop.'
    )
  counts['dropped_overlong'] += limits.overlong_policy == 'drop'
  return limits.overlong_policy == 'drop'


def _fixed_length(
  tokens: Sequence[np.ndarray], limit: int, rows: Rows, counts: dict[str, int]
) -> int:
  """The longest row, rounded up so that other data compile alike, at most the limit."""
  if not tokens:
    raise UserError(
      f'{rows.name}: none of its {len(rows)} rows is left ({counts}); raise data.max_length or '
      'look at the rows.'
    )
  longest = max(len(ids) for ids in tokens)
  return min(limit, -(-longest // _ROUND) * _ROUND)
