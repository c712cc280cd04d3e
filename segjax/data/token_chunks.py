"""Tokenizes chunks of rows into columns of arrays.

A chunk is read, rendered, tokenized and limited by itself, so that any process can do it. Datasets
are assembled from the columns by `segjax.data.tokenize`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from segjax.data import limits as limits_lib
from segjax.data import template_checks
from segjax.data.row_forms import Message
from segjax.data.rows import Reading, read_row
from segjax.data.sources import Row
from segjax.data.token_forms import Form
from segjax.data.token_rows import SKIPPED, TokenizedRow, Written
from segjax.data.token_store import Columns
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError

Chunk = Sequence[tuple[int, str, Any]]  # (index, location, row as it is in the source)


class TokenizedChunk(NamedTuple):
  """The columns of a chunk, and what happened to its rows.

  Attributes:
    columns: an array for each field of the dataset; the ids of all rows end to end, with the number
      of each row in the column `NAME_length`.
    counts: rows that were truncated or dropped.
    remarks: (kind, text) of remarks on the rows, in order.
    warning: that the template changes earlier answers; '' if it does not.
    error: what is wrong with a row, if the chunk ends there.
  """

  columns: Columns
  counts: dict[str, int]
  remarks: list[tuple[str, str]]
  warning: str = ''
  error: Exception | None = None


def tokenize_chunk(form: Form, chunk: Chunk, reading: Reading) -> TokenizedChunk:
  """Tokenizes a chunk of rows.

  Args:
    form: what the rows hold, and how they are limited.
    chunk: the rows.
    reading: how they are read; its `log` is not called.
  """
  counts = limits_lib.new_counts(len(chunk))
  result = TokenizedChunk({}, counts, [])
  fields: list[Mapping[str, Any]] = []
  try:
    rows = []
    for index, location, row in chunk:
      written = _write(form, row, location, reading, result)
      if written is None:
        counts['dropped_bad'] = counts.get('dropped_bad', 0) + 1
      elif written is SKIPPED:
        counts[form.skipped] = counts.get(form.skipped, 0) + 1
      else:
        rows.append((index, location, written))
    tokenized = _encode(form.tokenizer, rows)
    for row in tokenized:
      if (values := form.limit(row, counts)) is not None:
        fields.append(values)
  except Exception as error:
    result = result._replace(error=error)
  result.columns.update(_make_columns(form, fields))
  return result._replace(warning=_find_changed(rows))


def _write(
  form: Form, row: Any, location: str, reading: Reading, result: TokenizedChunk
) -> Written | None:
  """Returns a row as text, None for one that is dropped."""

  def convert(row: Row, location: str) -> Written:
    item = form.read(row, location)
    try:
      return form.write(item)
    except ValueError as error:
      raise UserError(f'{location}: {error}') from error  # only here the row is known

  say = lambda kind, text: result.remarks.append((kind, text))  # noqa: E731
  return read_row(row, location, convert, reading, say)


def _find_changed(rows: Sequence[tuple[int, str, Written]]) -> str:
  """Returns a warning on the first row whose earlier answers the template changes; '' if none."""
  for _, location, written in rows:
    if written.rendered:
      changed = template_checks.find_changed_answer(written.prompt, written.rendered)
      if changed:
        return f'{location}: {changed}; later rows may be read so too.'
  return ''


def _encode(
  tokenizer: ChatTokenizer, rows: Sequence[tuple[int, str, Written]]
) -> Iterator[TokenizedRow]:
  """Tokenizes rows; an error names the row."""
  try:
    groups = tokenizer.encode_pieces([pieces for _, _, row in rows for pieces in row.groups])
  except UserError as error:
    if len(rows) == 1:
      raise UserError(f'{rows[0][1]}: {error}') from error
    for row in rows:
      yield from _encode(tokenizer, [row])
    return
  ids = iter(groups)
  for index, location, row in rows:
    pieces = [next(ids) for _ in row.groups]
    yield TokenizedRow(index, location, prompt_key(row.prompt), pieces, row.flags, row.rendered)


def prompt_key(prompt: Sequence[Message]) -> int:
  """Returns 64 bits that are equal for equal prompts; `split_holdout` groups by them."""
  # The messages, not their rendering: a template may write another text on another day. Most
  # templates strip them.
  text = json.dumps([(message['role'], message['content'].strip()) for message in prompt])
  # Not hash(), which differs between processes: all have to hold out the same prompts.
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def _make_columns(form: Form, rows: Sequence[Mapping[str, Any]]) -> Columns:
  """Returns the fields of all rows as arrays."""
  columns = {
    name: np.array([row[name] for row in rows], dtype) for name, dtype in form.fields.items()
  }
  for name, dtype in form.ragged.items():
    arrays = [np.asarray(row[name], dtype) for row in rows]
    columns[name] = np.concatenate([np.zeros(0, dtype), *arrays])
    columns[f'{name}_length'] = np.array([len(array) for array in arrays], np.int32)
  return columns
