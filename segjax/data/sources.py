"""Rows of text from files, saved datasets or the hub, and the three ways to read a row.

Nothing is tokenised here: that is `segjax.data.batches`.

A message is {'role': str, 'content': str}. Every error names the file and the row, counted from 1.
"""

import dataclasses
import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

Message = dict[str, str]
Row = dict[str, Any]

_SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz', '.parquet')
_KINDS = ', '.join(_SUFFIXES)
_HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')


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
  """Two answers to one prompt, the first preferred."""

  prompt: list[Message]
  chosen: str
  rejected: str


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
    rows = _from_directory(place, split, limit)
  elif place.exists():
    rows = _from_file(place, limit)
  elif is_hub_id(path):
    rows = _from_hub(path, split, limit)
  else:
    raise ValueError(
      f'{path}: no such file or directory. Give a {_KINDS} file, a directory, or a hub id '
      "of the form 'owner/name'."
    )
  if not len(rows):
    raise ValueError(f'{rows.name}: no rows; give a source with at least one.')
  return rows


def is_hub_id(path: str) -> bool:
  """True for 'owner/name', unless it looks like a local path; keeps a typo off the network."""
  is_local = path.endswith(_SUFFIXES) or epath.Path(path).parent.exists()
  return not is_local and _HUB_ID.fullmatch(path) is not None


def as_pair(row: Row, where: str = 'row') -> Pair:
  """Reads a preference: `chosen` and `rejected`.

  Both are message lists that share all but their last message (an assistant's), or both are
  strings (or lone assistant messages) beside a prompt in `messages` or `prompt`.

  Raises:
    ValueError: any other form; names `where` and the keys found.
  """
  prompt, chosen = _answer(row, 'chosen', where)
  other_prompt, rejected = _answer(row, 'rejected', where)
  if prompt != other_prompt:
    raise ValueError(f'{where}: `chosen` and `rejected` do not answer the same prompt.')
  return Pair(prompt, chosen, rejected)


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
  raise ValueError(f'{where}: no `messages` and no `chosen`; {_found(row)}.')


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
    raise ValueError(f'{where}: no `{key}` message list or string; {_found(row)}.')
  messages = _messages(value, key, where)
  if not _is_answered(messages):
    raise ValueError(
      f'{where}: the last message of `{key}` is by {messages[-1]["role"]!r}; it must be by the '
      'assistant.'
    )
  prompt = messages[:-1]
  prompt = _as_asked(prompt, key, where) if prompt else _given_prompt(row, where)
  return prompt, messages[-1]['content']


def _given_prompt(row: Row, where: str) -> list[Message]:
  """The prompt that stands beside the answers, in `messages` or `prompt`."""
  for key in ('messages', 'prompt'):
    value = row.get(key)
    if isinstance(value, str):
      return [{'role': 'user', 'content': value}]
    if value is not None:
      return _as_asked(_messages(value, key, where), key, where)
  raise ValueError(f'{where}: no prompt in `messages` or `prompt`; {_found(row)}.')


def _as_asked(messages: list[Message], key: str, where: str) -> list[Message]:
  """The messages, if they wait for an answer."""
  if not messages or _is_answered(messages):
    raise ValueError(f'{where}: the prompt in `{key}` is empty or ends in an assistant message.')
  return messages


def _is_answered(messages: list[Message]) -> bool:
  return messages[-1]['role'] == 'assistant'


def _messages(value: Any, key: str, where: str) -> list[Message]:
  """A non-empty list of {role, content}, other keys left out."""
  if not isinstance(value, list) or not value:
    raise ValueError(
      f'{where}: `{key}` must be a non-empty list of {{role, content}}, not {_short(value)}.'
    )
  messages = []
  for number, message in enumerate(value, 1):
    pair = [message.get(name) for name in ('role', 'content')] if isinstance(message, dict) else []
    if not pair or not all(isinstance(text, str) for text in pair):
      raise ValueError(
        f'{where}: message {number} of `{key}` must be {{role: string, content: string}}, not '
        f'{_short(message)}.'
      )
    messages.append({'role': pair[0], 'content': pair[1]})
  return messages


def _found(row: Row) -> str:
  keys = [key for key, value in row.items() if value is not None]
  return f'found the keys {", ".join(keys) or "(none)"}'


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + '...'


def _from_directory(place: epath.Path, split: str, limit: int) -> Rows:
  """A saved dataset, one file per split, or the shards of a downloaded hub repository."""
  if any((place / name).exists() for name in ('dataset_info.json', 'dataset_dict.json')):
    return _from_saved(place, split, limit)
  files = {
    entry.name.removesuffix(suffix): entry
    for suffix in _SUFFIXES
    for entry in sorted(place.glob(f'*{suffix}'))
  }
  if split in files:
    return _from_file(files[split], limit)
  if list(place.glob('*-of-*')) or list(place.glob('data/*-of-*')):
    return _from_hub(str(place), split, limit)
  has = ', '.join(sorted(files)) or f'no {_KINDS} file and is no saved dataset'
  raise ValueError(f'{place}: no split {split!r}; it has {has}.')


def _from_saved(place: epath.Path, split: str, limit: int) -> Rows:
  import datasets

  data = datasets.load_from_disk(str(place))
  if isinstance(data, datasets.DatasetDict):
    if split not in data:
      raise ValueError(f'{place}: no split {split!r}; it has {", ".join(sorted(data))}.')
    data = data[split]
  return Rows(_front(data, limit), place.name)


def _from_hub(path: str, split: str, limit: int) -> Rows:
  import datasets

  try:
    data = datasets.load_dataset(path, split=split)
  except (OSError, ValueError) as error:  # OSError covers not found and no connection
    raise ValueError(f'{path}: datasets cannot load split {split!r}: {error}') from error
  return Rows(_front(data, limit), path)


def _front(data: Any, limit: int) -> Any:
  return data.select(range(min(limit, len(data)))) if limit else data


def _from_file(place: epath.Path, limit: int) -> Rows:
  if not place.name.endswith(_SUFFIXES):
    raise ValueError(f'{place}: unknown kind of file; give {_KINDS}.')
  if place.name.endswith('.parquet'):
    return _from_parquet(place, limit)
  with place.open('rb') as raw, gzip.open(raw) if place.suffix == '.gz' else raw as stream:
    try:
      return Rows(_read_json(stream, place, limit), place.name)
    except (EOFError, gzip.BadGzipFile) as error:
      raise ValueError(f'{place}: broken gzip file: {error}') from error


def _from_parquet(place: epath.Path, limit: int) -> Rows:
  import datasets
  import pyarrow.parquet

  with place.open('rb') as stream:
    try:
      table = pyarrow.parquet.read_table(stream)
    except pyarrow.ArrowInvalid as error:
      raise ValueError(f'{place}: not a parquet file: {error}') from error
  data = datasets.Dataset(datasets.table.InMemoryTable(table))
  return Rows(_front(data, limit), place.name)


def _read_json(stream: Any, place: epath.Path, limit: int) -> list[Row]:
  """One JSON object a line, blank lines skipped; or one JSON array of objects."""
  rows = []
  for line in stream:
    if not line.strip():
      continue
    if not rows and line.lstrip().startswith(b'['):
      rows = _parse(line + stream.read(), str(place))[: limit or None]
      break
    rows.append(_parse(line, f'{place}, row {len(rows) + 1}'))
    if len(rows) == limit:
      break
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict):
      raise ValueError(f'{place}, row {number}: must be a JSON object, not {_short(row)}.')
  return rows


def _parse(text: bytes, where: str) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:
    found = _short(text.decode('utf-8', 'replace'))
    raise ValueError(f'{where}: not JSON: {error}; found {found}.') from error
