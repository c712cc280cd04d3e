"""Responses in which people marked what is wrong, and which token each character belongs to.

No scores here: `segjax.evaluation.span_auc` asks a reward model.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from segjax.data.files import Row, excerpt
from segjax.data.sources import Message, Rows, as_prompt
from segjax.data.tokenize import Limits, pair_lengths
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Span:
  """Characters start to end - 1 of a response, and what is wrong with them."""

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
  """A marked response as the model sees it.

  Attributes:
    ids: prompt and response, cut to length.
    prompt_length: how many of them are the prompt's.
    finished: whether the response kept its stop token.
    owner: of each character, the token of the response that completes it; -1 where that was cut.
    spans: all of them, cut or not.
  """

  ids: list[int]
  prompt_length: int
  finished: bool
  owner: np.ndarray
  spans: tuple[Span, ...]


def as_span_annotation(row: Row, where: str = 'row') -> SpanAnnotation:
  """Reads a marked response, in either of two forms:

    `messages` or `prompt`, `response`, and `spans`, a list of {start, end, type};
    FineGrainedRLHF's, https://github.com/allenai/FineGrainedRLHF: `question`, `passages` and
    `feedback.errors`, a list of {start, end, `error type`} in `prediction 1`.

  Raises:
    ValueError: any other form, or a span that is not inside of its response; names `where`.
  """
  if isinstance(row.get('prediction 1'), str) and isinstance(row.get('feedback'), dict):
    prompt = [{'role': 'user', 'content': _question(row, where)}]
    return SpanAnnotation(prompt, row['prediction 1'], _spans(row, 'feedback', 'error type', where))
  if isinstance(row.get('response'), str) and isinstance(row.get('spans'), list):
    prompt = as_prompt({key: row.get(key) for key in ('messages', 'prompt')}, where)
    return SpanAnnotation(prompt, row['response'], _spans(row, 'spans', 'type', where))
  raise UserError(
    f'{where}: no marked response; it has `response` and `spans`, or `prediction 1` and '
    f'`feedback`. Found the keys {", ".join(row) or "(none)"}.'
  )


def tokenize_spans(
  rows: Rows, tokenizer: ChatTokenizer, limits: Limits
) -> tuple[list[TokenizedSpans], dict[str, int]]:
  """Marked responses cut as a pair's are (`pair_lengths`), and how many rows were cut or left out.

  Empty responses are left out (`dropped_empty`).

  Raises:
    ValueError: a row that cannot be read, is too long under 'error', or none is left.
  """
  found = []
  counts = {'rows': len(rows), 'truncated': 0, 'dropped_overlong': 0, 'dropped_empty': 0}
  for index, row in enumerate(rows):
    where = rows.where(index)
    marked = as_span_annotation(row, where)
    if not marked.response.strip():
      counts['dropped_empty'] += 1
      continue
    try:
      one, is_cut = _encode(marked, tokenizer, limits)
    except ValueError as error:
      raise UserError(f'{where}: {error}') from error
    if is_cut and limits.overlong_policy == 'error':
      raise UserError(
        f'{where}: prompt and response exceed data.max_length={limits.max_length}; raise it, or '
        'set data.overlong_policy to truncate_left or drop.'
      )
    if is_cut and limits.overlong_policy == 'drop':
      counts['dropped_overlong'] += 1
      continue
    counts['truncated'] += is_cut
    found.append(one)
  if not found:
    raise UserError(f'{rows.name}: none of its {len(rows)} rows is left ({counts}).')
  return found, counts


def character_tokens(offsets: Sequence[tuple[int, int]], length: int) -> Int[np.ndarray, 'length']:
  """The token that completes each character of a text.

  Of the tokens that hold bytes of one character it is the last. White space that no token claims,
  as tokenizers leave it before a word, is the following token's, at the end the last one's.

  Args:
    offsets: (first character, last one + 1) of each token, in order.
    length: characters of the text.
  """
  owner = np.full(length, -1)
  for token, (start, end) in enumerate(offsets):
    owner[start:end] = token
  following = len(offsets) - 1
  for at in range(length - 1, -1, -1):
    if owner[at] < 0:
      owner[at] = following
    following = owner[at]
  return owner


def _encode(
  marked: SpanAnnotation, tokenizer: ChatTokenizer, limits: Limits
) -> tuple[TokenizedSpans, bool]:
  prompt_text = tokenizer.prompt_text(marked.prompt)
  (text,) = tokenizer.response_texts(marked.prompt, prompt_text, [marked.response])
  begin = _find(marked.response, text)
  (prompt,) = tokenizer.encode([prompt_text])
  response, offsets = tokenizer.encode_with_offsets(text)
  length, kept, _ = pair_lengths(len(prompt), len(response), 0, limits)
  of_text = character_tokens(offsets, len(text))
  # The template may have taken white space off the response's ends: that is no token's.
  at = begin + np.arange(len(marked.response))
  is_there = (at >= 0) & (at < len(text))
  owner = np.where(is_there, of_text[np.clip(at, 0, len(text) - 1)], -1)
  is_cut = (length, kept) != (len(prompt), len(response))
  one = TokenizedSpans(
    ids=prompt[len(prompt) - length :] + response[:kept],
    prompt_length=length,
    finished=kept == len(response),
    owner=np.where(owner < kept, owner, -1),
    spans=marked.spans,
  )
  return one, is_cut


def _find(response: str, text: str) -> int:
  """Where the response begins in what the template made of it; the template may trim it."""
  words = response.strip()
  at = text.find(response)
  if at >= 0:
    return at
  at = text.find(words)
  if at < 0:
    raise UserError('the chat template changes the words of the response; spans have no place.')
  return at - response.index(words)


def _question(row: Row, where: str) -> str:
  """The passages, then the question, as the pairs made of this data have it."""
  question, passages = row.get('question'), row.get('passages')
  is_text = isinstance(question, str) and isinstance(passages, list)
  if not is_text or not all(isinstance(p, list) and all(map(_is_text, p)) for p in passages):
    raise UserError(f'{where}: `question` must be a string and `passages` lists of strings.')
  joined = '\n'.join(' '.join(passage) for passage in passages)
  return f'Passages:\n{joined}\n\nQuestion: {question}'


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _spans(row: Row, key: str, kind: str, where: str) -> tuple[Span, ...]:
  response = row['response'] if key == 'spans' else row['prediction 1']
  listed = row[key] if key == 'spans' else row[key].get('errors')
  if not isinstance(listed, list):
    raise UserError(f'{where}: `feedback.errors` must be a list, not {excerpt(listed)}.')
  spans = []
  for item in listed:
    ends = [item.get(name) for name in ('start', 'end')] if isinstance(item, dict) else [None]
    if not all(isinstance(end, int) for end in ends) or not 0 <= ends[0] < ends[1] <= len(response):
      raise UserError(
        f'{where}: the span {excerpt(item)} must have `start` < `end`, from 0 to {len(response)}, '
        'as many characters as the response has.'
      )
    spans.append(Span(*ends, str(item.get(kind) or 'unnamed')))
  return tuple(spans)
