"""Reads responses in which annotators marked errors, and maps their characters to tokens.

A reward model is compared with the marks in `segjax.evaluation.span_auc`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from segjax.data.json_rows import Row
from segjax.data.limits import Limits, NoRowsLeftError, describe_counts, pair_lengths
from segjax.data.sources import Message, Rows, as_prompt
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError, excerpt


@dataclasses.dataclass(frozen=True)
class Span:
  """Characters start to end - 1 of a response, and the kind of error in them."""

  start: int
  end: int
  kind: str


@dataclasses.dataclass(frozen=True)
class SpanAnnotation:
  """A response with its marked spans."""

  prompt: list[Message]
  response: str
  spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class TokenizedSpans:
  """A marked response as token ids.

  Attributes:
    ids: prompt and response, truncated.
    prompt_length: number of the prompt's tokens.
    finished: whether the response kept its stop token.
    token_of_char: for each character of the response, the index of the response token that
      completes it; -1 if that token was truncated.
    spans: all marked spans, including truncated ones.
    prompt: messages before the response.
  """

  ids: list[int]
  prompt_length: int
  finished: bool
  token_of_char: np.ndarray
  spans: tuple[Span, ...]
  prompt: list[Message] = dataclasses.field(default_factory=list)


def as_span_annotation(row: Row, location: str = 'row') -> SpanAnnotation:
  """Reads a marked response, in either of two forms:

    `messages` or `prompt`, `response`, and `spans`, a list of {start, end, type};
    FineGrainedRLHF's, https://github.com/allenai/FineGrainedRLHF: `question`, `passages` and
    `feedback.errors`, a list of {start, end, `error type`} in `prediction 1`.

  Raises:
    ValueError: the row has another form, or a span is not inside its response; the message names
      `location`.
  """
  if isinstance(row.get('prediction 1'), str) and isinstance(row.get('feedback'), dict):
    prompt = [{'role': 'user', 'content': _question(row, location)}]
    return SpanAnnotation(
      prompt, row['prediction 1'], _spans(row, 'feedback', 'error type', location)
    )
  if isinstance(row.get('response'), str) and isinstance(row.get('spans'), list):
    prompt = as_prompt({key: row.get(key) for key in ('messages', 'prompt')}, location)
    return SpanAnnotation(prompt, row['response'], _spans(row, 'spans', 'type', location))
  raise UserError(
    f'{location}: no marked response, which has `response` and `spans`, or `prediction 1` and '
    f'`feedback`; its keys are {", ".join(row) or "(none)"}.'
  )


def tokenize_spans(
  rows: Rows, tokenizer: ChatTokenizer, limits: Limits
) -> tuple[list[TokenizedSpans], dict[str, int]]:
  """Tokenizes marked responses, truncated as a pair's are (`pair_lengths`).

  Empty responses are left out (`dropped_empty`).

  Returns:
    (the tokenized responses, counts of rows read, truncated and dropped).

  Raises:
    ValueError: a row cannot be read, a row is overlong under 'error', or no row is left.
  """
  tokenized = []
  counts = {'rows': len(rows), 'truncated': 0, 'dropped_overlong': 0, 'dropped_empty': 0}
  for index, row in enumerate(rows):
    location = rows.location(index)
    annotation = as_span_annotation(row, location)
    if not annotation.response.strip():
      counts['dropped_empty'] += 1
      continue
    response, is_truncated = tokenize_annotation(annotation, tokenizer, limits, location)
    if is_truncated and limits.overlong_policy == 'drop':
      counts['dropped_overlong'] += 1
      continue
    counts['truncated'] += is_truncated
    tokenized.append(response)
  if not tokenized:
    raise NoRowsLeftError(
      f'{rows.name}: none of its {len(rows)} rows is left ({describe_counts(counts)}); raise '
      'data.max_length or check the rows.'
    )
  return tokenized, counts


def character_tokens(offsets: Sequence[tuple[int, int]], length: int) -> Int[np.ndarray, 'length']:
  """Returns the index of the token that completes each character of a text.

  If several tokens hold bytes of one character, it is the last of them. White space outside of all
  tokens, as tokenizers leave it before a word, belongs to the following token, at the end of the
  text to the last one.

  Args:
    offsets: (first character, last character + 1) of each token, in order.
    length: number of characters of the text.
  """
  token_of_char = np.full(length, -1)
  for token, (start, end) in enumerate(offsets):
    token_of_char[start:end] = token
  # Of each character the next one, itself included, that a token holds; `length` if there is none.
  held = np.where(token_of_char < 0, length, np.arange(length))
  following = np.minimum.accumulate(held[::-1])[::-1]
  return np.append(token_of_char, len(offsets) - 1)[following]


def tokenize_annotation(
  annotation: SpanAnnotation, tokenizer: ChatTokenizer, limits: Limits, location: str
) -> tuple[TokenizedSpans, bool]:
  """Returns a response as token ids, and whether it was truncated.

  Raises:
    UserError: it cannot be rendered, or is overlong under 'error'; the message names `location`.
  """
  try:
    tokenized, is_truncated = _tokenize(annotation, tokenizer, limits)
  except ValueError as error:
    raise UserError(f'{location}: {error}') from error
  if is_truncated and limits.overlong_policy == 'error':
    raise UserError(
      f'{location}: prompt and response exceed data.max_length={limits.max_length}; raise it, or '
      'set data.overlong_policy to truncate_left or drop.'
    )
  return tokenized, is_truncated


def _tokenize(
  annotation: SpanAnnotation, tokenizer: ChatTokenizer, limits: Limits
) -> tuple[TokenizedSpans, bool]:
  prompt_text = tokenizer.prompt_text(annotation.prompt)
  (text,) = tokenizer.response_texts(annotation.prompt, prompt_text, [annotation.response])
  begin = find_response(annotation.response, text)
  (prompt,) = tokenizer.encode([prompt_text])
  response, offsets = tokenizer.encode_response(prompt_text, text)
  prompt_length, length, _ = pair_lengths(len(prompt), len(response), 0, limits)
  token_of_text = character_tokens(offsets, len(text))
  # Characters of white space that the template stripped from the response belong to no token.
  position = begin + np.arange(len(annotation.response))
  is_in_text = (position >= 0) & (position < len(text))
  token = np.where(is_in_text, token_of_text[np.clip(position, 0, len(text) - 1)], -1)
  tokenized = TokenizedSpans(
    ids=prompt[len(prompt) - prompt_length :] + response[:length],
    prompt_length=prompt_length,
    finished=length == len(response),
    token_of_char=np.where(token < length, token, -1),
    spans=annotation.spans,
    prompt=annotation.prompt,
  )
  return tokenized, (prompt_length, length) != (len(prompt), len(response))


def find_response(response: str, text: str) -> int:
  """Returns the position of a response in its rendered text; the template may strip it.

  It is negative where the text lacks white space that the response begins with.

  Raises:
    UserError: the template changes the words of the response.
  """
  position = text.find(response)
  if position >= 0:
    return position
  words = response.strip()
  position = text.find(words)
  if position < 0:
    raise UserError(
      'the chat template changes the words of the response, so that spans cannot be located; set '
      'data.chat_template to one that keeps them.'
    )
  return position - response.index(words)


def _question(row: Row, location: str) -> str:
  """Returns the passages, then the question, as in the pairs built from this data."""
  question, passages = row.get('question'), row.get('passages')
  is_text = isinstance(question, str) and isinstance(passages, list)
  if not is_text or not all(isinstance(p, list) and all(map(_is_text, p)) for p in passages):
    raise UserError(f'{location}: `question` must be a string and `passages` lists of strings.')
  joined = '\n'.join(' '.join(passage) for passage in passages)
  return f'Passages:\n{joined}\n\nQuestion: {question}'


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _spans(row: Row, key: str, kind: str, location: str) -> tuple[Span, ...]:
  response = row['response'] if key == 'spans' else row['prediction 1']
  listed = row[key] if key == 'spans' else row[key].get('errors')
  if not isinstance(listed, list):
    raise UserError(f'{location}: `feedback.errors` must be a list, not {excerpt(listed)}.')
  spans = []
  for item in listed:
    ends = [item.get(name) for name in ('start', 'end')] if isinstance(item, dict) else [None]
    if not all(isinstance(end, int) for end in ends) or not 0 <= ends[0] < ends[1] <= len(response):
      raise UserError(
        f'{location}: the span {excerpt(item)} must have `start` < `end`, both from 0 to '
        f'{len(response)}, the number of characters of the response.'
      )
    spans.append(Span(*ends, str(item.get(kind) or 'unnamed')))
  return tuple(spans)
