"""Loads rows of text from files, saved datasets or the hub; reads a row in one of three ways.

Files are opened by `segjax.data.files`; text is tokenized by `segjax.data.tokenize`.

A message is {'role': str, 'content': str}. Every error names the file and the row, counted from 1.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from segjax.data import files
from segjax.data.files import Row, excerpt
from segjax.errors import UserError

Message = dict[str, str]

# The keys of a pair's ratings, chosen and rejected; the first two that a row has are read.
_RATINGS = (
  ('chosen_rating', 'rejected_rating'),
  ('chosen-rating', 'rejected-rating'),
  ('chosen_score', 'rejected_score'),
)
_LARGEST_RATING = 1e38  # the difference of two is finite in float32
_HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*')


@dataclasses.dataclass(frozen=True)
class Rows:
  """A sequence of dicts with the name of its source.

  Attributes:
    rows: a list of dicts, or a memory-mapped `datasets.Dataset`.
    name: name of the source in errors.
  """

  rows: Any
  name: str

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Row:
    return self.rows[index]

  def __iter__(self) -> Iterator[Row]:
    return iter(self.rows)

  def location(self, index: int) -> str:
    """Returns file and row for an error: 'train.jsonl, row 12' for index 11."""
    return f'{self.name}, row {index + 1}'


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two answers to one prompt, `chosen` preferred to `rejected`.

  Attributes:
    rating_gap: rating of the chosen answer minus that of the rejected one; None without ratings.
  """

  prompt: list[Message]
  chosen: str
  rejected: str
  rating_gap: float | None = None


def load_rows(path: str, split: str = 'train', limit: int = 0) -> Rows:
  """Loads rows from a file, a directory or the hub.

  Args:
    path: a .json, .jsonl (either may be .gz) or .parquet file; a directory written by
      `datasets.save_to_disk`, or one with a file per split (train.jsonl, ...); or a hub id
      'owner/name'. Files and directories may be on a bucket (gs://).
    split: split to read; ignored for a single file, which has only one.
    limit: number of rows to read from the front; 0 reads all.

  Raises:
    ValueError: `path` does not exist, has no such split, holds a line that is not JSON, or has no
      rows.
  """
  source = epath.Path(path).expanduser()
  if source.is_dir():
    rows = Rows(*files.from_directory(source, split, limit))
  elif source.exists():
    rows = Rows(*files.from_file(source, limit))
  elif is_hub_id(path):
    rows = Rows(*files.from_hub(path, split, limit))
  else:
    raise UserError(
      f'{path}: no such file or directory; provide a {files.KINDS} file, a directory, or a hub id '
      "of the form 'owner/name'."
    )
  if not len(rows):
    raise UserError(f'{rows.name}: no rows; provide a source with at least one.')
  return rows


def is_hub_id(path: str) -> bool:
  """Returns whether a path has the form 'owner/name' and does not look like a local one.

  It looks like one if it ends as a data file does or the directory `owner` exists here, so that a
  misspelled local path is not looked up on the network.
  """
  has_form = _HUB_ID.fullmatch(path) is not None and not path.endswith(files.SUFFIXES)
  return has_form and not epath.Path(path).parent.exists()


def as_pair(row: Row, location: str = 'row', ratings: bool = True) -> Pair:
  """Reads a preference: `chosen` and `rejected`.

  Both are message lists that share all but their last message (an assistant's), or both are
  strings (or single assistant messages) with the prompt in `messages` or `prompt`. Ratings,
  numbers on any scale, are optional: `chosen_rating` and `rejected_rating`, else `chosen-rating`
  and `rejected-rating`, else `chosen_score` and `rejected_score`; `ratings=False` ignores them.

  Raises:
    ValueError: the row has another form, one rating without the other, or a rating that is not a
      finite number; the message names `location` and the row's keys.
  """
  prompt, chosen = _answer(row, 'chosen', location)
  rejected_prompt, rejected = _answer(row, 'rejected', location)
  if prompt != rejected_prompt:
    raise UserError(f'{location}: `chosen` and `rejected` do not answer the same prompt.')
  return Pair(prompt, chosen, rejected, _rating_gap(row, location) if ratings else None)


def as_conversation(row: Row, location: str = 'row') -> list[Message]:
  """Reads a conversation to imitate: a preference's chosen side, else `messages` unchanged.

  Raises:
    ValueError: the row has neither; the message names `location` and the row's keys.
  """
  if row.get('chosen') is not None:
    prompt, chosen = _answer(row, 'chosen', location)
    return [*prompt, {'role': 'assistant', 'content': chosen}]
  if row.get('messages') is not None:
    return _messages(row['messages'], 'messages', location)
  raise UserError(f'{location}: no `messages` and no `chosen`; {_describe_keys(row)}.')


def as_prompt(row: Row, location: str = 'row') -> list[Message]:
  """Reads a prompt: `chosen` without its last message, else `messages`, else `prompt`.

  A trailing assistant message of `messages` is dropped.

  Raises:
    ValueError: the row has none or it is empty; the message names `location` and the row's keys.
  """
  if isinstance(row.get('chosen'), list):
    return _answer(row, 'chosen', location)[0]
  if row.get('messages') is not None:
    messages = _messages(row['messages'], 'messages', location)
    messages = messages[:-1] if _is_answered(messages) else messages
    return _check_unanswered(messages, 'messages', location)
  return _separate_prompt(row, location)


def _answer(row: Row, key: str, location: str) -> tuple[list[Message], str]:
  """Returns (prompt, answer) under `key`, in any of the three forms."""
  value = row.get(key)
  if isinstance(value, str):
    return _separate_prompt(row, location), value
  if not isinstance(value, list):
    raise UserError(f'{location}: no `{key}` message list or string; {_describe_keys(row)}.')
  messages = _messages(value, key, location)
  if not _is_answered(messages):
    raise UserError(
      f'{location}: the last message of `{key}` is by {messages[-1]["role"]!r}; it must be by the '
      'assistant.'
    )
  prompt = messages[:-1]
  prompt = _check_unanswered(prompt, key, location) if prompt else _separate_prompt(row, location)
  return prompt, messages[-1]['content']


def _rating_gap(row: Row, location: str) -> float | None:
  """Returns the chosen answer's rating minus the rejected one's, None if the row has none."""
  for keys in _RATINGS:
    missing = [key for key in keys if row.get(key) is None]
    if len(missing) == 1:
      both = ' and '.join(f'`{key}`' for key in keys)
      raise UserError(f'{location}: `{missing[0]}` is missing; provide both {both} or neither.')
    if not missing:
      chosen, rejected = (_rating(row[key], key, location) for key in keys)
      return chosen - rejected
  return None


def _rating(value: Any, key: str, location: str) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not abs(value) <= _LARGEST_RATING:
    raise UserError(f'{location}: `{key}` must be a finite number, not {excerpt(value)}.')
  return float(value)


def _separate_prompt(row: Row, location: str) -> list[Message]:
  """Returns the prompt of a row whose answers do not include it: `messages` or `prompt`."""
  for key in ('messages', 'prompt'):
    value = row.get(key)
    if isinstance(value, str):
      return [{'role': 'user', 'content': value}]
    if value is not None:
      return _check_unanswered(_messages(value, key, location), key, location)
  raise UserError(f'{location}: no prompt in `messages` or `prompt`; {_describe_keys(row)}.')


def _check_unanswered(messages: list[Message], key: str, location: str) -> list[Message]:
  """Returns the messages; raises ValueError unless the next one is the assistant's."""
  if not messages or _is_answered(messages):
    raise UserError(f'{location}: the prompt in `{key}` is empty or ends in an assistant message.')
  return messages


def _is_answered(messages: list[Message]) -> bool:
  return messages[-1]['role'] == 'assistant'


def _messages(value: Any, key: str, location: str) -> list[Message]:
  """Returns a non-empty list of {role, content}, without other keys."""
  if not isinstance(value, list) or not value:
    raise UserError(
      f'{location}: `{key}` must be a non-empty list of {{role, content}}, not {excerpt(value)}.'
    )
  messages = []
  for number, message in enumerate(value, 1):
    pair = [message.get(name) for name in ('role', 'content')] if isinstance(message, dict) else []
    if not pair or not all(isinstance(text, str) for text in pair):
      raise UserError(
        f'{location}: message {number} of `{key}` must be {{role: string, content: string}}, not '
        f'{excerpt(message)}.'
      )
    messages.append({'role': pair[0], 'content': pair[1]})
  return messages


def _describe_keys(row: Row) -> str:
  keys = [key for key, value in row.items() if value is not None]
  return f'its keys are {", ".join(keys) or "(none)"}'
