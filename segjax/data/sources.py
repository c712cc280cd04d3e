"""Rows of text from files, saved datasets or the hub, and the three ways to read a row.

Files are opened by `segjax.data.files`; nothing is tokenised here: that is `segjax.data.tokenize`.

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
  """A sequence of dicts that knows where each came from.

  Attributes:
    rows: a list of dicts, or a memory-mapped `datasets.Dataset`.
    name: what to call the source in an error.
  """

  rows: Any
  name: str

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Row:
    return self.rows[index]

  def __iter__(self) -> Iterator[Row]:
    return iter(self.rows)

  def where(self, index: int) -> str:
    """'train.jsonl, row 12' for index 11."""
    return f'{self.name}, row {index + 1}'


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two answers to one prompt, the first preferred.

  Attributes:
    rating_gap: the rating of the chosen answer less that of the rejected one; None without ratings.
  """

  prompt: list[Message]
  chosen: str
  rejected: str
  rating_gap: float | None = None


def load_rows(path: str, split: str = 'train', limit: int = 0) -> Rows:
  """Opens a source of rows.

  Args:
    path: a .json, .jsonl (either may be .gz) or .parquet file; a directory written by
      `datasets.save_to_disk`, or one with a file per split (train.jsonl, ...); or a hub id
      'owner/name'. Files and directories may lie on a bucket (gs://).
    split: which split to read; a single file has only one, so it is ignored there.
    limit: read only that many rows from the front; 0 reads all.

  Raises:
    ValueError: nothing at `path`, no such split, a line that is not JSON, or no rows at all.
  """
  place = epath.Path(path).expanduser()
  if place.is_dir():
    rows = Rows(*files.from_directory(place, split, limit))
  elif place.exists():
    rows = Rows(*files.from_file(place, limit))
  elif is_hub_id(path):
    rows = Rows(*files.from_hub(path, split, limit))
  else:
    raise UserError(
      f'{path}: no such file or directory. Give a {files.KINDS} file, a directory, or a hub id '
      "of the form 'owner/name'."
    )
  if not len(rows):
    raise UserError(f'{rows.name}: no rows; give a source with at least one.')
  return rows


def is_hub_id(path: str) -> bool:
  """Returns whether a path has the form 'owner/name' and does not look like a local one.

  It looks like one if it ends as a data file does or the directory `owner` exists here, so that a
  misspelled local path is not looked up on the network.
  """
  has_form = _HUB_ID.fullmatch(path) is not None and not path.endswith(files.SUFFIXES)
  return has_form and not epath.Path(path).parent.exists()


def as_pair(row: Row, where: str = 'row', ratings: bool = True) -> Pair:
  """Reads a preference: `chosen` and `rejected`.

  Both are message lists that share all but their last message (an assistant's), or both are
  strings (or lone assistant messages) beside a prompt in `messages` or `prompt`. Ratings, numbers
  on any scale, are optional: `chosen_rating` and `rejected_rating`, else `chosen-rating` and
  `rejected-rating`, else `chosen_score` and `rejected_score`; without `ratings` none is looked at.

  Raises:
    ValueError: any other form, one rating without the other, or one that is not a finite number;
      names `where` and the keys found.
  """
  prompt, chosen = _answer(row, 'chosen', where)
  other_prompt, rejected = _answer(row, 'rejected', where)
  if prompt != other_prompt:
    raise UserError(f'{where}: `chosen` and `rejected` do not answer the same prompt.')
  return Pair(prompt, chosen, rejected, _rating_gap(row, where) if ratings else None)


def as_conversation(row: Row, where: str = 'row') -> list[Message]:
  """Reads a conversation to imitate: a preference's chosen side, else `messages` as they are.

  Raises:
    ValueError: neither is there; names `where` and the keys found.
  """
  if row.get('chosen') is not None:
    prompt, chosen = _answer(row, 'chosen', where)
    return [*prompt, {'role': 'assistant', 'content': chosen}]
  if row.get('messages') is not None:
    return _messages(row['messages'], 'messages', where)
  raise UserError(f'{where}: no `messages` and no `chosen`; {_found(row)}.')


def as_prompt(row: Row, where: str = 'row') -> list[Message]:
  """Reads a prompt: `chosen` without its last message, else `messages`, else `prompt`.

  A trailing assistant message of `messages` is dropped.

  Raises:
    ValueError: none is there or nothing is left of it; names `where` and the keys found.
  """
  if isinstance(row.get('chosen'), list):
    return _answer(row, 'chosen', where)[0]
  if row.get('messages') is not None:
    messages = _messages(row['messages'], 'messages', where)
    return _as_asked(messages[:-1] if _is_answered(messages) else messages, 'messages', where)
  return _given_prompt(row, where)


def _answer(row: Row, key: str, where: str) -> tuple[list[Message], str]:
  """(prompt, answer) under `key`, whichever of the three forms it takes."""
  value = row.get(key)
  if isinstance(value, str):
    return _given_prompt(row, where), value
  if not isinstance(value, list):
    raise UserError(f'{where}: no `{key}` message list or string; {_found(row)}.')
  messages = _messages(value, key, where)
  if not _is_answered(messages):
    raise UserError(
      f'{where}: the last message of `{key}` is by {messages[-1]["role"]!r}; it must be by the '
      'assistant.'
    )
  prompt = messages[:-1]
  prompt = _as_asked(prompt, key, where) if prompt else _given_prompt(row, where)
  return prompt, messages[-1]['content']


def _rating_gap(row: Row, where: str) -> float | None:
  """The chosen answer's rating less the rejected one's, or None if the row has none."""
  for keys in _RATINGS:
    missing = [key for key in keys if row.get(key) is None]
    if len(missing) == 1:
      both = ' and '.join(f'`{key}`' for key in keys)
      raise UserError(f'{where}: give both {both} or neither; there is no `{missing[0]}`.')
    if not missing:
      chosen, rejected = (_rating(row[key], key, where) for key in keys)
      return chosen - rejected
  return None


def _rating(value: Any, key: str, where: str) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not abs(value) <= _LARGEST_RATING:
    raise UserError(f'{where}: `{key}` must be a finite number, not {excerpt(value)}.')
  return float(value)


def _given_prompt(row: Row, where: str) -> list[Message]:
  """The prompt that stands beside the answers, in `messages` or `prompt`."""
  for key in ('messages', 'prompt'):
    value = row.get(key)
    if isinstance(value, str):
      return [{'role': 'user', 'content': value}]
    if value is not None:
      return _as_asked(_messages(value, key, where), key, where)
  raise UserError(f'{where}: no prompt in `messages` or `prompt`; {_found(row)}.')


def _as_asked(messages: list[Message], key: str, where: str) -> list[Message]:
  """The messages, if they wait for an answer."""
  if not messages or _is_answered(messages):
    raise UserError(f'{where}: the prompt in `{key}` is empty or ends in an assistant message.')
  return messages


def _is_answered(messages: list[Message]) -> bool:
  return messages[-1]['role'] == 'assistant'


def _messages(value: Any, key: str, where: str) -> list[Message]:
  """A non-empty list of {role, content}, other keys left out."""
  if not isinstance(value, list) or not value:
    raise UserError(
      f'{where}: `{key}` must be a non-empty list of {{role, content}}, not {excerpt(value)}.'
    )
  messages = []
  for number, message in enumerate(value, 1):
    pair = [message.get(name) for name in ('role', 'content')] if isinstance(message, dict) else []
    if not pair or not all(isinstance(text, str) for text in pair):
      raise UserError(
        f'{where}: message {number} of `{key}` must be {{role: string, content: string}}, not '
        f'{excerpt(message)}.'
      )
    messages.append({'role': pair[0], 'content': pair[1]})
  return messages


def _found(row: Row) -> str:
  keys = [key for key, value in row.items() if value is not None]
  return f'found the keys {", ".join(keys) or "(none)"}'
