"""Makes datasets of tokens from rows of text, within limits of length.

Rows are read by `segjax.data.sources` and tokenized by `segjax.data.token_chunks`; tokens are kept
by `segjax.data.token_cache`, and batches made by `segjax.data.batches`.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from absl import logging

from segjax.data import limits as limits_lib
from segjax.data import token_cache, token_workers
from segjax.data.batches import Conversations, Pairs, Prompts, Steps
from segjax.data.limits import Limits
from segjax.data.pair_rules import DEFAULT_RULES, PairRules
from segjax.data.ragged import Ragged
from segjax.data.rows import Remarks, Rows
from segjax.data.step_rows import StepRows
from segjax.data.token_chunks import TokenizedChunk, tokenize_chunk
from segjax.data.token_forms import ConversationRows, Form, PairRows, PromptRows
from segjax.data.token_store import Sink
from segjax.data.tokenizer import ChatTokenizer

# Keeps all threads of a fast tokenizer busy; all rows at once would be held as text as well.
_CHUNK = 1024  # rows tokenized per call
_MANY = 16 * _CHUNK  # rows, from which on it pays to start processes


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
  return Conversations(**_tokenize(rows, ConversationRows(tokenizer, limits)))


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
  return Pairs(**_tokenize(rows, PairRows(tokenizer, limits, rules)))


def tokenize_prompts(rows: Rows, tokenizer: ChatTokenizer, limits: Limits) -> Prompts:
  """Tokenizes prompts to answer, each with the header that opens the answer.

  An overlong prompt keeps its LAST max_prompt_length tokens. A prompt of special tokens alone is
  dropped (`dropped_empty`).

  Returns:
    A dataset with `counts` as in `tokenize_conversations`.

  Raises:
    ValueError: a row cannot be read, a row is overlong under 'error', or no row is left.
  """
  return Prompts(source=rows, **_tokenize(rows, PromptRows(tokenizer, limits)))


def tokenize_steps(rows: Rows, tokenizer: ChatTokenizer, limits: Limits) -> Steps:
  """Tokenizes responses with labelled steps, truncated as a pair's are; pairs are left out.

  A label lies at the token that completes the characters of its step, see
  `span_annotations.character_tokens`; of steps that end in the same token, the last counts. A
  response whose labels were all truncated is dropped (`dropped_empty`).

  Returns:
    A dataset with `counts` as in `tokenize_conversations`, and `pairs` if there are any.

  Raises:
    ValueError: a row cannot be read, a row is overlong under 'error', or no row is left.
  """
  return Steps(**_tokenize(rows, StepRows(tokenizer, limits)))


def _tokenize(rows: Rows, form: Form) -> dict[str, Any]:
  """Returns the fields of a dataset, from the cache if they are there."""
  log = rows.reading.log or (lambda text: None)
  columns, summary, is_cached = token_cache.load_or_fill(
    rows, form, lambda sink: _fill(rows, form, sink), log
  )
  if is_cached:  # what was logged when the rows were read
    for text in summary['remarks']:
      log(text)
    if summary['warning']:
      logging.warning(summary['warning'])
  ragged = {
    name: Ragged.end_to_end(columns[name], columns[f'{name}_length']) for name in form.ragged
  }
  fields = {name: columns[name] for name in form.fields}
  shared = {'length': summary['length'], 'counts': summary['counts']}
  return ragged | fields | shared | {'pad_id': form.tokenizer.pad_id}


def _fill(rows: Rows, form: Form, sink: Sink) -> dict[str, Any]:
  """Tokenizes all rows, chunk by chunk.

  Returns:
    What the dataset holds besides its columns: `counts`, `length`, and the lines that were logged.
  """
  counts = limits_lib.new_counts(0)
  remarks, warning, longest = Remarks(rows.reading.log), '', 0
  for chunk in _tokenize_chunks(rows, form):
    for kind, text in chunk.remarks:
      remarks.say(kind, text)
    if chunk.warning and not warning:
      warning = chunk.warning
      logging.warning(warning)
    if chunk.error:
      raise chunk.error
    for name, count in chunk.counts.items():
      counts[name] = counts.get(name, 0) + count
    lengths = [chunk.columns[f'{name}_length'] for name in form.ragged]
    longest = max(longest, *(int(length.max(initial=0)) for length in lengths))
    sink.append(chunk.columns)
  rows.check_any_read(remarks, counts)
  length = limits_lib.fixed_length(longest, form.length_limit, rows, counts)
  return {
    'counts': counts,
    'length': length,
    'remarks': list(remarks.said.values()),
    'warning': warning,
  }


def _tokenize_chunks(rows: Rows, form: Form) -> Iterator[TokenizedChunk]:
  """Yields the tokens of chunks of rows, in order."""
  located = rows.located()
  chunks = iter(lambda: list(itertools.islice(located, _CHUNK)), [])
  num_workers = token_workers.count_workers() if len(rows) >= _MANY else 1
  if num_workers > 1:
    yield from token_workers.tokenize_chunks(form, chunks, rows.reading, num_workers)
  else:
    yield from (tokenize_chunk(form, chunk, rows.reading) for chunk in chunks)
