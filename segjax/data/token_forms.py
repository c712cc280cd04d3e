"""What a row holds, and how its tokens are limited, for each kind of dataset.

Rows are read by `segjax.data.sources` and rendered by `segjax.data.tokenizer`; chunks of them are
tokenized by `segjax.data.token_chunks`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from segjax.data import limits as limits_lib
from segjax.data import row_forms
from segjax.data.limits import Limits
from segjax.data.pair_rules import PairRules
from segjax.data.row_forms import Message
from segjax.data.sources import Pair, Row, as_conversation, as_pair, as_prompt
from segjax.data.step_rows import StepRows
from segjax.data.token_rows import SKIPPED, TokenizedRow, Written
from segjax.data.tokenizer import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class ConversationRows:
  """Conversations to imitate; see `tokenize.tokenize_conversations`."""

  tokenizer: ChatTokenizer
  limits: Limits

  ragged: ClassVar = {'tokens': np.int32, 'trained': bool}
  fields: ClassVar = {'group': np.uint64}
  length_limit = property(lambda self: self.limits.max_length)

  def read(self, row: Row, location: str) -> list[Message]:
    """Returns the conversation of a row."""
    return as_conversation(row, location)

  def write(self, messages: list[Message]) -> Written:
    """Returns a conversation as text."""
    pieces = self.tokenizer.turn_texts(messages)
    flags = [is_trained for _, is_trained in pieces]
    answers = (i for i, message in enumerate(messages) if i and message['role'] == 'assistant')
    return Written(messages[: next(answers, None)], [[text for text, _ in pieces]], flags)

  def limit(self, row: TokenizedRow, counts: dict[str, int]) -> Mapping[str, Any] | None:
    """Returns the fields of a row, None for one that is dropped."""
    (pieces,), limits = row.groups, self.limits
    ids = np.concatenate([np.zeros(0, np.int32), *pieces])
    mask = np.repeat(np.array(row.flags, bool), [len(piece) for piece in pieces])
    is_long = len(ids) > limits.max_length
    if is_long and limits_lib.is_dropped(row.location, f'{len(ids)} tokens', limits, counts):
      return None
    # The last turn is the answer; the first ones are what can be spared.
    ids, mask = ids[-limits.max_length :], mask[-limits.max_length :]
    # After truncation, which may have removed every trained token.
    if not mask.any():
      counts['dropped_empty'] += 1
      return None
    counts['truncated'] += is_long  # last: a dropped row is not counted as truncated too
    return {'tokens': ids, 'trained': mask, 'group': row.key}


@dataclasses.dataclass(frozen=True)
class PairRows:
  """Preferences; see `tokenize.tokenize_pairs`."""

  tokenizer: ChatTokenizer
  limits: Limits
  rules: PairRules

  ragged: ClassVar = {'chosen': np.int32, 'rejected': np.int32}
  fields: ClassVar = {
    'chosen_finished': bool,
    'rejected_finished': bool,
    'prompt_length': np.int32,
    'rating_gap': np.float32,
    'row': np.int64,
    'group': np.uint64,
    'truncated': bool,
  }
  skipped: ClassVar = 'with_steps'  # what rows of another form are counted as
  length_limit = property(lambda self: self.limits.max_length)

  def read(self, row: Row, location: str) -> Pair | None:
    """Returns the pair of a row; None of a row with labelled steps, by `PairRules`."""
    if self.rules.skip_labelled:
      if row_forms.is_labelled(row):
        return None
      row_forms.check_pair_or_steps(row, location)
    return as_pair(row, location, self.rules.ratings)

  def write(self, pair: Pair | None) -> Written:
    """Returns a pair as text, or nothing."""
    if pair is None:
      return SKIPPED
    tokenizer, start = self.tokenizer, 0
    if self.rules.strip_system_preamble:
      start = len(tokenizer.preamble)
    prompt, answers = tokenizer.prompt_text(pair.prompt), [pair.chosen, pair.rejected]
    texts = tokenizer.response_texts(pair.prompt, prompt, answers)
    gap = math.nan if pair.rating_gap is None else pair.rating_gap
    flags = all(text.strip() for text in answers), gap
    return Written(pair.prompt, [[prompt[start:], text] for text in texts], flags, prompt)

  def limit(self, row: TokenizedRow, counts: dict[str, int]) -> Mapping[str, Any] | None:
    """Returns the fields of a row, None for one that is dropped."""
    stop_id = self.tokenizer.stop_ids[0] if self.rules.force_stop else None
    has_words, gap = row.flags
    texts = [row.groups[0][0], *(response for _, response in row.groups)]
    full = tuple(len(ids) for ids in texts)
    # Of the pair: both sides keep the same prompt, and differ in the response alone.
    lengths = limits_lib.pair_lengths(*full, self.limits)
    is_truncated = lengths != full
    describe = 'prompt {}, chosen {} and rejected {} tokens'.format
    if is_truncated and limits_lib.is_dropped(row.location, describe(*full), self.limits, counts):
      return None
    prompt = texts[0][full[0] - lengths[0] :]
    sides, finished = zip(
      *map(limits_lib.truncate_response, texts[1:], lengths[1:], (stop_id, stop_id)), strict=True
    )
    # A finished response ends in a stop token, which is not content.
    if not has_words or any(len(s) <= f for s, f in zip(sides, finished, strict=True)):
      counts['dropped_empty'] += 1
      return None
    if np.array_equal(*sides) and not self.rules.keep_identical:
      # Its margin is 0 whatever the weights are, so that it has no gradient.
      counts['dropped_identical'] += 1
      return None
    counts['truncated'] += is_truncated
    return {
      'chosen': np.concatenate([prompt, sides[0]]),
      'rejected': np.concatenate([prompt, sides[1]]),
      'chosen_finished': finished[0],
      'rejected_finished': finished[1],
      'prompt_length': len(prompt),
      'rating_gap': gap,
      'row': row.index,
      'group': row.key,
      'truncated': is_truncated,
    }


@dataclasses.dataclass(frozen=True)
class PromptRows:
  """Prompts to answer; see `tokenize.tokenize_prompts`."""

  tokenizer: ChatTokenizer
  limits: Limits

  ragged: ClassVar = {'tokens': np.int32}
  fields: ClassVar = {'row': np.int64, 'group': np.uint64}
  length_limit = property(lambda self: self.limits.max_prompt_length)

  @functools.cached_property
  def _special_ids(self) -> set[int]:
    return self.tokenizer.special_ids

  def read(self, row: Row, location: str) -> list[Message]:
    """Returns the prompt of a row."""
    return as_prompt(row, location)

  def write(self, messages: list[Message]) -> Written:
    """Returns a prompt as text."""
    prompt = self.tokenizer.prompt_text(messages)
    return Written(messages, [[prompt]], None, prompt)

  def limit(self, row: TokenizedRow, counts: dict[str, int]) -> Mapping[str, Any] | None:
    """Returns the fields of a row, None for one that is dropped."""
    ((ids,),) = row.groups
    limit = self.limits.max_prompt_length
    is_long, length = len(ids) > limit, f'a prompt of {len(ids)} tokens'
    if is_long and limits_lib.is_dropped(row.location, length, self.limits, counts):
      return None
    if self._special_ids.issuperset(ids.tolist()):  # the template alone: nothing to answer
      counts['dropped_empty'] += 1
      return None
    counts['truncated'] += is_long
    return {'tokens': ids[-limit:], 'row': row.index, 'group': row.key}


Form = ConversationRows | PairRows | PromptRows | StepRows
