"""Reads responses whose steps have labels; `data.step_rows` tokenizes them.

A step is a span of text, from the end of the one before to its own. Rows may lie among pairs:
`row_forms.is_labelled` tells them apart.
"""

import itertools
import math
from typing import Any, NamedTuple

from segjax.data.json_rows import Row
from segjax.data.row_forms import STEPS, STEPWISE, is_labelled, read_text
from segjax.data.sources import Message, Rows, as_conversation, as_prompt
from segjax.errors import UserError, excerpt

_SEPARATOR = '\n'  # of joined `completions`, TRL's default


class LabelledResponse(NamedTuple):
  """A response, and (characters up to the end, label from 0 to 1) of each labelled step."""

  prompt: list[Message]
  response: str
  steps: list[tuple[int, float]]


def as_labelled_response(row: Row, location: str = 'row') -> LabelledResponse:
  """Reads an answer whose steps have labels, in either of two forms:

    a conversation of any number of turns, as sft reads it, whose last answer has labels in `steps`:
    a list of [end, label] or {end, label}, in order of `end`, the number of characters of that
    answer up to the end of the step;
    TRL's stepwise supervision, https://huggingface.co/docs/trl/dataset_formats, as PRM800K and
    Math-Shepherd are published in it: a prompt, `completions`, the texts of the steps, and
    `labels`, one of each; the answer is the texts joined by a newline.

  A label is 1 of a good step, 0 of a bad one, true, false, or between.

  Raises:
    UserError: the row has another form; the message names `location`.
  """
  if row.get(STEPS) is None and all(row.get(key) is not None for key in STEPWISE):
    return _as_stepwise(row, location)
  messages = as_conversation(row, location)
  if len(messages) < 2 or messages[-1]['role'] != 'assistant':
    raise UserError(f'{location}: `steps` label an answer to a prompt, and there is none.')
  response, listed = messages[-1]['content'], row.get(STEPS)
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


def _as_stepwise(row: Row, location: str) -> LabelledResponse:
  texts, labels = (row[key] for key in STEPWISE)
  if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
    raise UserError(
      f'{location}: `completions` must be a list of texts, none of them blank, not '
      f'{excerpt(texts)}.'
    )
  if not isinstance(labels, list) or len(labels) != len(texts):
    number = len(labels) if isinstance(labels, list) else excerpt(labels)
    raise UserError(
      f'{location}: {len(texts)} `completions` but {number} `labels`; write a label for each.'
    )
  if wrong := [label for label in labels if not _is_label(label)]:
    raise UserError(
      f'{location}: {excerpt(wrong[0])} in `labels` must be 0, 1, true, false, or between.'
    )
  texts = [read_text(text, '`completions`', location) for text in texts]
  ends = [len(_SEPARATOR.join(texts[:count])) for count in range(1, len(texts) + 1)]
  steps = [(end, float(label)) for end, label in zip(ends, labels, strict=True)]
  return LabelledResponse(as_prompt(row, location), _SEPARATOR.join(texts), steps)


def _is_label(value: Any) -> bool:
  return isinstance(value, int | float) and 0 <= value <= 1 and math.isfinite(value)


def _step(item: Any, length: int, location: str) -> tuple[int, float]:
  pair = [item.get('end'), item.get('label')] if isinstance(item, dict) else item
  if isinstance(pair, list | tuple) and len(pair) == 2:
    end, label = pair
    is_end = isinstance(end, int) and not isinstance(end, bool) and 1 <= end <= length
    if is_end and _is_label(label):
      return end, float(label)
  raise UserError(
    f'{location}: the step {excerpt(item)} must be [end, label], with an end from 1 to {length}, '
    'the number of characters of the answer, and a label from 0 to 1.'
  )


def has_step_labels(rows: Rows) -> bool:
  """Returns whether the first row that can be read has labels of steps.

  Raises:
    UserError: a row before it cannot be read, and `rows.reading` drops none.
  """
  for index in range(len(rows)):
    try:
      return is_labelled(rows[index])
    except UserError:
      if not rows.reading.drop_bad:
        raise
  return False
