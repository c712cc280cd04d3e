"""Reads responses whose steps have labels, and tokenizes them; `train.step_label_step` trains.

A step is a span of text, from the end of the one before to its own.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from segjax.data.batches import Steps
from segjax.data.json_rows import Row
from segjax.data.limits import Limits, NoRowsLeftError, describe_counts, fixed_length
from segjax.data.ragged import Ragged
from segjax.data.sources import Message, Rows, as_conversation
from segjax.data.span_annotations import SpanAnnotation, tokenize_annotation
from segjax.data.token_chunks import prompt_key
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError, excerpt

COLUMN = 'steps'


class LabelledResponse(NamedTuple):
  """A response, and (characters up to the end, label from 0 to 1) of each labelled step."""

  prompt: list[Message]
  response: str
  steps: list[tuple[int, float]]


def as_labelled_response(row: Row, location: str = 'row') -> LabelledResponse:
  """Reads a conversation, as sft does, whose last answer has labels in `steps`.

  `steps` is a list of [end, label] or {end, label}, in order of `end`, the number of characters of
  the answer up to the end of the step. A label is 1 of a good step, 0 of a bad one, true, false, or
  between.

  Raises:
    UserError: the row has another form; the message names `location`.
  """
  messages = as_conversation(row, location)
  if len(messages) < 2 or messages[-1]['role'] != 'assistant':
    raise UserError(f'{location}: `steps` label an answer to a prompt, and there is none.')
  response, listed = messages[-1]['content'], row.get(COLUMN)
  if not isinstance(listed, list):
    raise UserError(
      f'{location}: `steps` is {excerpt(listed)}; write a list of [end, label], or leave the row '
      'out.'
    )
  steps = [_step(item, len(response), location) for item in listed]
  ends = [end for end, _ in steps]
  if any(first >= second for first, second in itertools.pairwise(ends)):
    raise UserError(f'{location}: the ends of `steps`, {excerpt(ends)}, do not increase.')
  return LabelledResponse(messages[:-1], response, steps)


def _step(item: Any, length: int, location: str) -> tuple[int, float]:
  pair = [item.get('end'), item.get('label')] if isinstance(item, dict) else item
  if isinstance(pair, list | tuple) and len(pair) == 2:
    end, label = pair
    is_end = isinstance(end, int) and not isinstance(end, bool) and 1 <= end <= length
    if is_end and isinstance(label, int | float) and 0 <= label <= 1 and math.isfinite(label):
      return end, float(label)
  raise UserError(
    f'{location}: the step {excerpt(item)} must be [end, label], with an end from 1 to {length}, '
    'the number of characters of the answer, and a label from 0 to 1.'
  )


def has_step_labels(rows: Rows) -> bool:
  """Returns whether the first row that can be read has labels of steps."""
  for index in range(len(rows)):
    try:
      return rows[index].get(COLUMN) is not None
    except UserError:
      continue
  return False


def tokenize_steps(rows: Rows, tokenizer: ChatTokenizer, limits: Limits) -> Steps:
  """Tokenizes responses with labelled steps, truncated as a pair's are.

  A label lies at the token that completes the characters of its step, see
  `span_annotations.character_tokens`; of steps that end in the same token, the last counts. A
  response whose labels were all truncated is dropped (`dropped_empty`).

  Raises:
    UserError: a row cannot be read, is overlong under 'error', or no row is left.
  """
  ids, labels, indices, groups = [], [], [], []
  counts = {'rows': len(rows), 'truncated': 0, 'dropped_overlong': 0, 'dropped_empty': 0}
  for index, location, labelled in rows.read(as_labelled_response, counts):
    annotation = SpanAnnotation(labelled.prompt, labelled.response, ())
    tokenized, is_truncated = tokenize_annotation(annotation, tokenizer, limits, location)
    if is_truncated and limits.overlong_policy == 'drop':
      counts['dropped_overlong'] += 1
      continue
    row = np.full(len(tokenized.ids), np.nan, np.float32)
    for end, label in labelled.steps:
      token = tokenized.token_of_char[end - 1]
      if token >= 0:
        row[tokenized.prompt_length + token] = label
    if np.isnan(row).all():
      counts['dropped_empty'] += 1
      continue
    counts['truncated'] += is_truncated
    ids.append(np.array(tokenized.ids, np.int32))
    labels.append(row)
    indices.append(index)
    groups.append(prompt_key(labelled.prompt))
  if not ids:
    raise NoRowsLeftError(
      f'{rows.name}: none of its {len(rows)} rows is left ({describe_counts(counts)}); raise '
      'data.max_length or check the rows.'
    )
  return Steps(
    tokens=Ragged.from_rows(ids, np.int32),
    labels=Ragged.from_rows(labels, np.float32),
    row=np.array(indices),
    group=np.array(groups, np.uint64),
    length=fixed_length(max(map(len, ids)), limits.max_length, rows, counts),
    pad_id=tokenizer.pad_id,
    counts=counts,
  )
