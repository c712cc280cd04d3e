"""Loads rows of text from files, saved datasets or the hub; reads a row in one of three ways.

Files are opened by `segjax.data.files`, the forms of other projects are those of
`segjax.data.row_forms`; text is tokenized by `segjax.data.tokenize`.

A message is {'role': str, 'content': str}. Every error names the file and the row, counted from 1.
"""

import dataclasses
import re
from collections.abc import Mapping

from etils import epath

from segjax.data import files, row_forms, splits
from segjax.data.json_rows import Row
from segjax.data.ratings import rating_gap
from segjax.data.row_forms import Message, describe_keys, read_messages
from segjax.data.rows import AS_THEY_ARE, JoinedRows, Reading, Rows
from segjax.data.source_list import Source, parse_sources
from segjax.errors import UserError

_REMEDY = 'correct the row, or leave such rows out by data.bad_rows=drop'
_HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*')


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


def load_rows(
  path: str, split: str = 'train', limit: int = 0, reading: Reading = AS_THEY_ARE
) -> Rows:
  """Loads rows from files, directories or the hub.

  Args:
    path: a .json, .jsonl (either may be .gz) or .parquet file; a directory written by
      `datasets.save_to_disk`, or one with files named after their splits (train.jsonl, or shards
      train-00000-of-00002.jsonl); or a hub id 'owner/name'. Files and directories may be on a
      bucket (gs://). Or several of them, see `source_list`.
    split: split to read, with slices as in `datasets`: 'train[:90%]', 'train[100:200]+test'. A
      single file is the split 'train', and the one that its name says.
    limit: number of rows to read from the front of each source; 0 reads all.
    reading: how rows are read.

  Raises:
    UserError: a source does not exist, has no such split, holds a line that is not JSON, or has no
      rows.
  """
  sources = parse_sources(path)
  loaded = [(part, s.weight) for s in sources for part in _load(s, split, limit, reading)]
  if len(loaded) == 1 and loaded[0][1] == 1:
    return loaded[0][0]
  parts, weights = zip(*loaded, strict=True)
  name = parts[0].name if len(sources) == 1 else f'{len(sources)} sources'
  rows = JoinedRows(list(parts), name, reading=reading, weights=weights)
  if not len(rows):
    raise UserError(f'{path}: no rows are left by the weights; raise them.')
  return rows


def _load(source: Source, split: str, limit: int, reading: Reading) -> list[Rows]:
  """Returns the rows of a source, in several parts if it has several files."""
  path = epath.Path(source.path).expanduser()
  openers = files.find_splits(path, reading.drop_bad) if path.exists() else {}
  if openers:
    parts = _read_splits(openers, source.path, split, limit, reading)
  elif path.is_dir() and not list(path.glob('*/*')):
    raise UserError(
      f'{path}: no split {split!r}; it has no {files.KINDS} file and is not a saved dataset.'
    )
  elif path.is_dir() or is_hub_id(source.path):  # a directory of another layout
    parts = [Rows(*files.from_hub(str(source.path), split, limit), reading=reading)]
  else:
    raise UserError(
      f'{source.path}: no such file or directory; provide a {files.KINDS} file, a directory, or a '
      "hub id of the form 'owner/name'."
    )
  if not any(len(part) for part in parts):
    raise UserError(f'{source.path}: no rows; provide a source with at least one.')
  return parts


def _read_splits(
  openers: Mapping[str, files.Opener], path: str, split: str, limit: int, reading: Reading
) -> list[Rows]:
  """Returns the rows of a specification of splits, the first `limit` of them."""
  splits.check_names(split, list(openers), path)
  names = splits.split_names(split)
  is_sliced = splits.is_sliced(split)  # percent and negative numbers need the number of all rows
  opened = {
    name: [Rows(*file, reading=reading) for file in openers[name](0 if is_sliced else limit)]
    for name in dict.fromkeys(names)
  }
  parts = [part for name in names for part in opened[name]]
  if is_sliced:
    sizes = {name: sum(len(part) for part in files) for name, files in opened.items()}
    slices = splits.find_slices(split, sizes, path)
    parts = [p for n, low, high in slices for p in splits.cut(opened[n], low, high, Rows.part)]
  return splits.cut(parts, 0, limit, Rows.part) if limit else parts


def is_hub_id(path: str) -> bool:
  """Returns whether a path has the form 'owner/name' and does not look like a local one.

  It looks like one if it ends as a data file does or the directory `owner` exists here, so that a
  misspelled local path is not looked up on the network.
  """
  has_form = _HUB_ID.fullmatch(path) is not None and not path.endswith(files.SUFFIXES)
  return has_form and not epath.Path(path).parent.exists()


def as_pair(row: Row, location: str = 'row', ratings: bool = True) -> Pair:
  """Reads a preference: `chosen` and `rejected`.

  Both are message lists that share all but their last message (an assistant's), or texts of whole
  dialogues as in HH that do; or both are strings (or single assistant messages) with the prompt in
  a key of its own, as in `as_prompt`. Ratings, numbers on any scale, are optional: `chosen_rating`
  and `rejected_rating`, else `chosen-rating` and `rejected-rating`, else `chosen_score` and
  `rejected_score`; `ratings=False` ignores them.

  Raises:
    UserError: the row has another form, one rating without the other, or a rating that is not a
      finite number; the message names `location` and the row's keys.
  """
  prompt, chosen = _answer(row, 'chosen', location)
  rejected_prompt, rejected = _answer(row, 'rejected', location)
  if prompt != rejected_prompt:
    raise UserError(f'{location}: {_describe_parting(prompt, rejected_prompt)}')
  return Pair(prompt, chosen, rejected, rating_gap(row, location) if ratings else None)


def as_conversation(row: Row, location: str = 'row') -> list[Message]:
  """Reads a conversation to imitate.

  It is the chosen side of a preference, else a list of messages, else a prompt (as in `as_prompt`)
  with its answer in `completion`, `response`, `output` or `answer`, else `text`: the text of a
  dialogue as in HH, or any other text, which is returned as one message of role `PLAIN_TEXT`.

  Raises:
    UserError: the row has none of these; the message names `location` and the row's keys.
  """
  if row.get('chosen') is not None:
    prompt, chosen = _answer(row, 'chosen', location)
    return [*prompt, {'role': 'assistant', 'content': chosen}]
  conversation = row_forms.find_conversation(row, location)
  if conversation and _is_answered(conversation[0]):
    return conversation[0]
  answer = row_forms.find_answer(row, location)
  question = conversation or row_forms.find_question(row, location)
  if question and answer is not None:
    messages = _check_unanswered(*question, location)
    return [*messages, {'role': 'assistant', 'content': answer}]
  if conversation:  # without an answer, so that no token of it is trained
    return read_messages(row[conversation[1]], conversation[1], location)
  if question and _is_answered(question[0]):
    return question[0]
  if isinstance(text := row.get(row_forms.PLAIN_TEXT), str):
    text = row_forms.read_text(text, '`text`', location)
    return row_forms.read_dialogue(text) or [{'role': row_forms.PLAIN_TEXT, 'content': text}]
  raise UserError(
    f'{location}: no `messages` and no `chosen`, no prompt with a `response`, no `text`; '
    f'{describe_keys(row)}. Name its columns by data.columns.'
  )


def as_prompt(row: Row, location: str = 'row') -> list[Message]:
  """Reads a prompt, without its answer.

  It is `chosen` without its last message where that holds the whole conversation, else a list of
  messages (`messages`, `conversations`, `context_messages`) without the assistant's last one, else
  `prompt`, `question`, `query`, or `instruction` with `input`.

  Raises:
    UserError: the row has none or it is empty; the message names `location` and the row's keys.
  """
  is_whole = isinstance(row.get('chosen'), str) and not _has_prompt(row)
  if isinstance(row.get('chosen'), list) or (is_whole and row_forms.read_dialogue(row['chosen'])):
    return _answer(row, 'chosen', location)[0]
  if conversation := row_forms.find_conversation(row, location):
    messages, key = conversation
    messages = messages[:-1] if _is_answered(messages) else messages
    return _check_unanswered(messages, key, location)
  return _separate_prompt(row, location)


def _answer(row: Row, key: str, location: str) -> tuple[list[Message], str]:
  """Returns (prompt, answer) under `key`, in any of the forms."""
  value = row.get(key)
  if isinstance(value, str):
    text = row_forms.read_text(value, f'`{key}`', location)
    messages = None if _has_prompt(row) else row_forms.read_dialogue(text)
    if not messages:
      return _separate_prompt(row, location), text
  elif isinstance(value, list | dict):
    # One message may stand for a list of it, as in data of LLaMA-Factory.
    is_message = isinstance(value, dict) and not isinstance(value.get('content'), list)
    messages = read_messages([value] if is_message else value, key, location)
  else:
    raise UserError(f'{location}: no `{key}` message list or string; {describe_keys(row)}.')
  if not _is_answered(messages):
    raise UserError(
      f'{location}: the last message of `{key}` is by {messages[-1]["role"]!r}; it must be by the '
      f'assistant; {_REMEDY}.'
    )
  prompt = messages[:-1]
  prompt = _check_unanswered(prompt, key, location) if prompt else _separate_prompt(row, location)
  return prompt, messages[-1]['content']


def _has_prompt(row: Row) -> bool:
  return any(row.get(key) is not None for key in row_forms.PROMPTS)


def _describe_parting(chosen: list[Message], rejected: list[Message]) -> str:
  """Returns where two prompts differ, and what to do, for an error."""
  pairs = enumerate(zip(chosen, rejected, strict=False), 1)
  shorter = min(len(chosen), len(rejected))
  number = next((i for i, (a, b) in pairs if a != b), shorter + 1)
  return (
    f'`chosen` and `rejected` do not answer the same prompt: they part at message {number} of '
    f'{len(chosen) + 1} and {len(rejected) + 1}, and only the last one may differ; '
    f'{_REMEDY}.'
  )


def _separate_prompt(row: Row, location: str) -> list[Message]:
  """Returns the prompt of a row whose answers do not include it."""
  prompt = row_forms.find_conversation(row, location) or row_forms.find_question(row, location)
  if not prompt:
    raise UserError(
      f'{location}: no prompt in `messages` or `prompt`, nor a `question` or `instruction`; '
      f'{describe_keys(row)}. Name its column by data.columns.prompt.'
    )
  return _check_unanswered(*prompt, location)


def _check_unanswered(messages: list[Message], key: str, location: str) -> list[Message]:
  """Returns the messages; raises UserError unless the next one is the assistant's."""
  if not messages or _is_answered(messages):
    raise UserError(
      f'{location}: the prompt in `{key}` is empty or ends in an assistant message; {_REMEDY}.'
    )
  last = messages[-1]
  asks = last['role'] != 'system' and last['content'].strip()
  if not asks and any(_is_answered([message]) for message in messages):
    raise UserError(
      f'{location}: the prompt in `{key}` ends in a system or empty message after an answer, so '
      f'that it holds the answer; {_REMEDY}.'
    )
  return messages


def _is_answered(messages: list[Message]) -> bool:
  return messages[-1]['role'] == 'assistant'
