"""Tokenizes rows of text into datasets, within limits of length.

Rows are read by `segjax.data.sources`, tokenized by `segjax.data.tokenizer`, limited and counted by
`segjax.data.limits`; batches are made by `segjax.data.batches`.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from segjax.data import limits as limits_lib
from segjax.data import template_checks
from segjax.data.batches import Conversations, Pairs, Prompts, Ragged
from segjax.data.limits import Limits
from segjax.data.pair_rules import DEFAULT_RULES, PairRules
from segjax.data.sources import Message, Pair, Row, Rows, as_conversation, as_pair, as_prompt
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError

# Keeps all threads of a fast tokenizer busy; all rows at once would be held as text as well.
_CHUNK = 1024  # rows tokenized per call


class _Written(NamedTuple):
  """A row as text.

  Attributes:
    prompt: the messages before the answers.
    groups: texts in pieces that no token spans, see `ChatTokenizer.encode_pieces`.
    flags: what is read of the row besides.
    rendered: the prompt as text, where earlier answers in it are read but not trained.
  """

  prompt: Sequence[Message]
  groups: list[list[str]]
  flags: Any
  rendered: str = ''


def tokenize_conversations(rows: Rows, tokenizer: ChatTokenizer, limits: Limits) -> Conversations:
  """Tokenizes conversations to imitate; all assistant turns are trained, with their stop tokens.

  An overlong conversation keeps its LAST max_length tokens. One without a trained token is dropped
  (`dropped_empty`).

  Returns:
    A dataset whose `counts` has rows, truncated, dropped_overlong, dropped_identical (always 0
    here), dropped_empty and, if rows could not be read, dropped_bad; rows that were truncated and
    then dropped count as dropped only.

  Raises:
    ValueError: a row cannot be read, a row is overlong under 'error', or no row is left.
  """

  def write(messages: list[Message]) -> _Written:
    pieces = tokenizer.turn_texts(messages)
    flags = [is_trained for _, is_trained in pieces]
    answers = (i for i, message in enumerate(messages) if i and message['role'] == 'assistant')
    return _Written(messages[: next(answers, None)], [[text for text, _ in pieces]], flags)

  tokens, trained, group, counts = [], [], [], limits_lib.new_counts(rows)
  read = _tokenize(rows, tokenizer, as_conversation, write, counts)
  for _, location, key, (pieces,), flags in read:
    ids = np.array([i for piece in pieces for i in piece], np.int32)
    mask = np.repeat(np.array(flags, bool), [len(piece) for piece in pieces])
    is_long = len(ids) > limits.max_length
    if is_long and limits_lib.is_dropped(location, f'{len(ids)} tokens', limits, counts):
      continue
    # The last turn is the answer; the first ones are what can be spared.
    ids, mask = ids[-limits.max_length :], mask[-limits.max_length :]
    # After truncation, which may have removed every trained token.
    if not mask.any():
      counts['dropped_empty'] += 1
      continue
    counts['truncated'] += is_long  # last: a dropped row is not counted as truncated too
    tokens.append(ids)
    trained.append(mask)
    group.append(key)
  return Conversations(
    tokens=Ragged.from_rows(tokens, np.int32),
    trained=Ragged.from_rows(trained, bool),
    group=np.array(group, np.uint64),
    length=limits_lib.fixed_length(tokens, limits.max_length, rows, counts),
    pad_id=tokenizer.pad_id,
    counts=counts,
  )


def tokenize_pairs(
  rows: Rows, tokenizer: ChatTokenizer, limits: Limits, rules: PairRules = DEFAULT_RULES
) -> Pairs:
  """Tokenizes preferences: prompt and response of both sides, truncated by `pair_lengths`.

  A truncated response is not finished: its last token is kept. A pair is dropped if either response
  has no content (`dropped_empty`) or if both are the same once truncated (`dropped_identical`).
  `rules` select differences of published code.

  Returns:
    A dataset with `counts` as in `tokenize_conversations`.

  Raises:
    ValueError: a row cannot be read, a row is overlong under 'error', or no row is left.
  """
  stop_id = tokenizer.stop_ids[0] if rules.force_stop else None
  start = len(tokenizer.preamble) if rules.strip_system_preamble else 0

  def write(pair: Pair) -> _Written:
    prompt, answers = tokenizer.prompt_text(pair.prompt), [pair.chosen, pair.rejected]
    texts = tokenizer.response_texts(pair.prompt, prompt, answers)
    gap = math.nan if pair.rating_gap is None else pair.rating_gap
    flags = all(text.strip() for text in answers), gap
    return _Written(pair.prompt, [[prompt[start:], text] for text in texts], flags, prompt)

  pairs, counts = [], limits_lib.new_counts(rows)
  as_rated_pair = functools.partial(as_pair, ratings=rules.ratings)
  read = _tokenize(rows, tokenizer, as_rated_pair, write, counts)
  for index, location, key, sides, (has_words, gap) in read:
    texts = [sides[0][0], *(response for _, response in sides)]
    full = tuple(len(ids) for ids in texts)
    # Of the pair: both sides keep the same prompt, and differ in the response alone.
    lengths = limits_lib.pair_lengths(*full, limits)
    is_truncated = lengths != full
    if is_truncated and limits_lib.is_dropped(location, _describe_lengths(full), limits, counts):
      continue
    prompt = texts[0][full[0] - lengths[0] :]
    sides, finished = zip(
      *map(limits_lib.truncate_response, texts[1:], lengths[1:], (stop_id, stop_id)), strict=True
    )
    # A finished response ends in a stop token, which is not content.
    if not has_words or any(len(s) <= f for s, f in zip(sides, finished, strict=True)):
      counts['dropped_empty'] += 1
    elif sides[0] == sides[1] and not rules.keep_identical:
      # Its margin is 0 whatever the weights are, so that it has no gradient.
      counts['dropped_identical'] += 1
    else:
      counts['truncated'] += is_truncated
      both = [np.array(prompt + side, np.int32) for side in sides]
      pairs.append((*both, *finished, len(prompt), gap, index, key, is_truncated))
  tokens = [ids for pair in pairs for ids in pair[:2]]
  length = limits_lib.fixed_length(tokens, limits.max_length, rows, counts)
  return _join_pairs(pairs, length, tokenizer.pad_id, counts)


def _join_pairs(pairs: Sequence[tuple], length: int, pad_id: int, counts: dict[str, int]) -> Pairs:
  """Returns the dataset of pairs whose fields are in the order of the arguments below."""
  chosen, rejected, *finished, prompt_length, rating_gap, row, group, truncated = zip(
    *pairs, strict=True
  )
  return Pairs(
    chosen=Ragged.from_rows(chosen, np.int32),
    rejected=Ragged.from_rows(rejected, np.int32),
    chosen_finished=np.array(finished[0], bool),
    rejected_finished=np.array(finished[1], bool),
    prompt_length=np.array(prompt_length, np.int32),
    rating_gap=np.array(rating_gap, np.float32),
    row=np.array(row, np.int64),
    group=np.array(group, np.uint64),
    length=length,
    pad_id=pad_id,
    counts=counts,
    truncated=np.array(truncated, bool),
  )


def tokenize_prompts(rows: Rows, tokenizer: ChatTokenizer, limits: Limits) -> Prompts:
  """Tokenizes prompts to answer, each with the header that opens the answer.

  An overlong prompt keeps its LAST max_prompt_length tokens. A prompt of special tokens alone is
  dropped (`dropped_empty`).

  Returns:
    A dataset with `counts` as in `tokenize_conversations`.

  Raises:
    ValueError: a row cannot be read, a row is overlong under 'error', or no row is left.
  """

  def write(messages: list[Message]) -> _Written:
    prompt = tokenizer.prompt_text(messages)
    return _Written(messages, [[prompt]], None, prompt)

  special = tokenizer.special_ids
  tokens, row, group, counts = [], [], [], limits_lib.new_counts(rows)
  read = _tokenize(rows, tokenizer, as_prompt, write, counts)
  for index, location, key, ((ids,),), _ in read:
    is_long = len(ids) > limits.max_prompt_length
    length = f'a prompt of {len(ids)} tokens'
    if is_long and limits_lib.is_dropped(location, length, limits, counts):
      continue
    if special.issuperset(ids):  # the template alone: nothing to answer
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
    length=limits_lib.fixed_length(tokens, limits.max_prompt_length, rows, counts),
    pad_id=tokenizer.pad_id,
    counts=counts,
  )


def _tokenize(
  rows: Rows,
  tokenizer: ChatTokenizer,
  read: Callable[[Row, str], Any],
  write: Callable[[Any], _Written],
  counts: dict[str, int],
) -> Iterator[tuple[int, str, int, list[list[list[int]]], Any]]:
  """Reads each row, writes it as texts and tokenizes them in chunks.

  Args:
    read: (row, location) -> the row's content.
    write: content -> the row as text.
    counts: counts rows that cannot be read or written, if these are dropped.

  Yields:
    For each row: (index, location, key of its prompt, token ids of each piece of each group,
    flags).
  """

  def convert(row: Row, location: str) -> _Written:
    item = read(row, location)
    try:
      return write(item)
    except ValueError as error:
      raise UserError(f'{location}: {error}') from error  # only here the row is known

  converted, changed = rows.read(convert, counts), ''
  while chunk := list(itertools.islice(converted, _CHUNK)):
    ids = iter(_encode(tokenizer, [(location, written) for _, location, written in chunk]))
    for index, location, written in chunk:
      if not changed and written.rendered:
        changed = template_checks.find_changed_answer(written.prompt, written.rendered)
        if changed:
          logging.warning('%s: %s; later rows may be read so too.', location, changed)
      groups = [next(ids) for _ in written.groups]
      yield index, location, _key(written.prompt), groups, written.flags


def _encode(
  tokenizer: ChatTokenizer, chunk: Sequence[tuple[str, _Written]]
) -> list[list[list[int]]]:
  """Returns the token ids of all groups of (location, row); an error names the row."""
  try:
    return tokenizer.encode_pieces([pieces for _, written in chunk for pieces in written.groups])
  except UserError:
    if len(chunk) == 1:
      raise
  ids = []
  for location, written in chunk:
    try:
      ids += tokenizer.encode_pieces(written.groups)
    except UserError as error:
      raise UserError(f'{location}: {error}') from error
  return ids


def _key(prompt: Sequence[Message]) -> int:
  """Returns 64 bits that are equal for equal prompts; `split_holdout` groups by them."""
  # The messages, not their rendering: a template may write another text on another day. Most
  # templates strip them.
  text = json.dumps([(message['role'], message['content'].strip()) for message in prompt])
  # Not hash(), which differs between processes: all have to hold out the same prompts.
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def _describe_lengths(lengths: Sequence[int]) -> str:
  return 'prompt {}, chosen {} and rejected {} tokens'.format(*lengths)
