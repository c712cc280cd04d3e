"""Reads messages, prompts and answers in the forms that data sets of other projects have.

A message is {role, content} or, as in ShareGPT, {from, value}. A prompt is a list of messages or
one of the keys in `_QUESTIONS`; its answer is one of the keys in `ANSWERS`. Texts of Anthropic's HH
hold a whole conversation. `segjax.data.sources` decides which of them a job reads.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from segjax.data.json_rows import Row
from segjax.errors import UserError, excerpt

Message = dict[str, str]

ROLES = ('system', 'user', 'assistant', 'tool')
PLAIN_TEXT = 'text'  # role of the single message of a row that is text without a conversation
_ALIASES = {
  **dict.fromkeys(('human', 'prompter', 'customer'), 'user'),
  **dict.fromkeys(('gpt', 'bot', 'model', 'ai', 'chatbot', 'chatgpt', 'bing', 'bard'), 'assistant'),
  **dict.fromkeys(('function', 'observation', 'ipython'), 'tool'),
  'developer': 'system',
}
CONVERSATIONS = ('messages', 'conversations', 'context_messages')
_QUESTIONS = ('question', 'query', 'instruction')
ANSWERS = ('completion', 'response', 'output', 'answer')
PROMPTS = (*CONVERSATIONS, 'prompt', *_QUESTIONS)  # keys that may hold a prompt
_SIDES = ('chosen', 'rejected')
STEPS = 'steps'
STEPWISE = ('completions', 'labels')  # the same as TRL's stepwise supervision has it
# Keys that compete with each other, those that go together in one tuple: where a setting names the
# column of one, the others are left out of the row.
_COMPETING = (
  tuple((key,) for key in (*PROMPTS, PLAIN_TEXT)),
  tuple((key,) for key in ANSWERS),
  ((STEPS,), STEPWISE),
)
# Columns that rows of another form lack in data of both forms.
_OF_PAIRS = (*_SIDES, 'chosen_rating', 'rejected_rating')
_OF_LABELLED = (STEPS, *STEPWISE, 'response')
_HH_TURN = re.compile(r'\n\n(Human|Assistant):')
_HH_ROLES = {'Human': 'user', 'Assistant': 'assistant'}


def notes(row: Row) -> Iterator[str]:
  """Yields a sentence for each name of a role in the row that is read as another one."""
  for key in (*CONVERSATIONS, 'prompt', *_SIDES):
    value = row.get(key)
    for message in value if isinstance(value, list) else [value]:
      if isinstance(message, dict):
        role = message.get('role', message.get('from'))
        if isinstance(role, str) and role not in ROLES and role.lower() in (*ROLES, *_ALIASES):
          yield f'role {role!r} is read as {_ALIASES.get(role.lower(), role.lower())}'


def with_columns(row: Row, columns: Mapping[str, str], location: str) -> Row:
  """Returns the row with its columns under our names: {ours: theirs}.

  Keys of the row that compete with a renamed column are left out. A pair may lack columns of
  labelled steps, and a row with labelled steps those of pairs and of the other way to write labels:
  data may hold rows of all these forms.

  Raises:
    UserError: the row has neither of the two names.
  """
  if not columns:
    return row
  claimed = columns.keys() & {*columns.values()}  # `steps` may be the name of their `completions`
  left_out = _competitors(frozenset(columns)) | claimed
  renamed = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
  result = {key: value for key, value in row.items() if key not in left_out} | renamed
  missing = [key for key in columns if key not in result]
  if missing and (wrong := [key for key in missing if key not in _columns_of_others(result)]):
    raise UserError(
      f'{location}: data.columns.{wrong[0]}={columns[wrong[0]]!r}, but there is no such column; '
      f'{describe_keys(row)}.'
    )
  return result


@functools.cache
def _competitors(columns: frozenset[str]) -> set[str]:
  """Returns the keys that compete with those of some columns."""
  groups = [group for group in _COMPETING if any(columns & {*keys} for keys in group)]
  return {key for group in groups for keys in group if not columns & {*keys} for key in keys}


def _columns_of_others(row: Row) -> set[str]:
  """Returns the columns that a row need not have, because it has those of its own form."""
  if is_labelled(row):
    own = (STEPS, 'response') if row.get(STEPS) is not None else STEPWISE
    return {*_OF_PAIRS, *_OF_LABELLED} - {*own}
  return {*_OF_LABELLED} if _has_side(row) else set()


def is_labelled(row: Row) -> bool:
  """Returns whether the steps of an answer have labels, see `step_labels`."""
  has_stepwise = all(row.get(key) is not None for key in STEPWISE)
  return row.get(STEPS) is not None or (has_stepwise and not _has_side(row))


def is_pair(row: Row) -> bool:
  """Returns whether a row has a preferred or another answer, and no labels of steps."""
  return _has_side(row) and not is_labelled(row)


def check_pair_or_steps(row: Row, location: str) -> None:
  """Raises UserError if a row is no pair and has no labels of steps."""
  if not (is_pair(row) or is_labelled(row)):
    raise UserError(
      f'{location}: no `chosen` and `rejected` of a pair, and no labelled `steps` (or '
      f'`completions` with `labels`); {describe_keys(row)}. Name its columns by data.columns.'
    )


def _has_side(row: Row) -> bool:
  return any(row.get(key) is not None for key in _SIDES)


def read_messages(value: Any, key: str, location: str) -> list[Message]:
  """Returns a non-empty list of {role, content}, with standard roles and without other keys."""
  value = _rows_of_columns(value)
  if isinstance(value, dict):
    raise UserError(
      f'{location}: `{key}` is one object, {excerpt(value)}, in place of a list of messages; '
      'write it in brackets: [{role, content}, ...].'
    )
  if not isinstance(value, list) or not value:
    raise UserError(
      f'{location}: `{key}` must be a non-empty list of {{role, content}}, not {excerpt(value)}.'
    )
  return [_message(item, f'message {i} of `{key}`', location) for i, item in enumerate(value, 1)]


def read_text(text: str, name: str, location: str) -> str:
  """Returns the text; raises UserError if it holds half of a character."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{location}: {name} has half of a character, \\u{ord(text[error.start]):04x}, at position '
      f'{error.start}; write the whole character, or leave such rows out by data.bad_rows=drop.'
    ) from error
  return text


def read_dialogue(text: Any) -> list[Message] | None:
  """Returns the turns of a text '\\n\\nHuman: ...\\n\\nAssistant: ...'; None of other texts."""
  if not isinstance(text, str) or not text.lstrip().startswith('Human:'):
    return None
  _, *pieces = _HH_TURN.split('\n\n' + text.lstrip())
  if 'Assistant' not in pieces[::2]:
    return None
  return [
    {'role': _HH_ROLES[name], 'content': words.strip()}
    for name, words in zip(pieces[::2], pieces[1::2], strict=True)
  ]


def find_conversation(row: Row, location: str) -> tuple[list[Message], str] | None:
  """Returns (messages, key) of the first key that holds a conversation; None without any."""
  for key in CONVERSATIONS:
    value = row.get(key)
    if isinstance(value, str):
      return _from_string(value, key, location), key
    if value is not None:
      messages = read_messages(value, key, location)
      return [*(_system(row, location) if key != 'messages' else []), *messages], key
  return None


def find_question(row: Row, location: str) -> tuple[list[Message], str] | None:
  """Returns (messages, key) of a prompt without its answer; None if the row has none."""
  value = row.get('prompt')
  if isinstance(value, str):
    return [*_system(row, location), *_from_string(value, 'prompt', location)], 'prompt'
  if value is not None:
    return read_messages(value, 'prompt', location), 'prompt'
  for key in _QUESTIONS:
    if isinstance(row.get(key), str):
      text = read_text(row[key], f'`{key}`', location)
      more = row.get('input') if key == 'instruction' else None
      if isinstance(more, str) and more.strip():
        text = f'{text}\n\n{read_text(more, "`input`", location)}'
      earlier = [*_system(row, location), *_history(row.get('history'), location)]
      return [*earlier, {'role': 'user', 'content': text}], key
  return None


def find_answer(row: Row, location: str) -> str | None:
  """Returns the answer to `find_question`, a string or a list of one message; None without any."""
  for key in ANSWERS:
    value = row.get(key)
    if isinstance(value, str):
      return read_text(value, f'`{key}`', location)
    if isinstance(value, list):
      messages = read_messages(value, key, location)
      if len(messages) != 1 or messages[0]['role'] != 'assistant':
        raise UserError(
          f'{location}: `{key}` must be a string or a list of one message by the assistant, not '
          f'{excerpt(value)}; write longer conversations in `messages`.'
        )
      return messages[0]['content']
  return None


def describe_keys(row: Row) -> str:
  """Returns the keys of a row that are not null, for errors."""
  keys = [key for key, value in row.items() if value is not None]
  more = f' and {len(keys) - 20} more' if len(keys) > 20 else ''
  return f'its keys are {", ".join(key[:40] for key in keys[:20]) or "(none)"}{more}'


def _from_string(text: str, key: str, location: str) -> list[Message]:
  text = read_text(text, f'`{key}`', location)
  turns = read_dialogue(text) or [{'role': 'user', 'content': text}]
  # The assistant's last turn, without words, opens the answer.
  return turns[:-1] if turns[-1] == {'role': 'assistant', 'content': ''} else turns


def _message(message: Any, name: str, location: str) -> Message:
  if isinstance(message, dict):
    keys = ('from', 'value') if 'role' not in message and 'from' in message else ('role', 'content')
    role, content = (message.get(key) for key in keys)
    if isinstance(role, str) and isinstance(content, str):
      content = read_text(content, name, location)
      return {'role': _standard_role(role, name, location), 'content': content}
  raise UserError(
    f'{location}: {name} must be {{role: string, content: string}}, not {excerpt(message)}.'
  )


def _standard_role(role: str, name: str, location: str) -> str:
  lower = role.lower()
  if lower in ROLES:
    return lower
  if lower not in _ALIASES:
    raise UserError(
      f'{location}: {name} has the role {excerpt(role)}; use one of {", ".join(ROLES)} (known '
      f'other names: {", ".join(_ALIASES)}).'
    )
  return _ALIASES[lower]


def _system(row: Row, location: str) -> list[Message]:
  """Returns the message of a `system` column, as a list."""
  text = row.get('system')
  if not isinstance(text, str) or not text.strip():
    return []
  return [{'role': 'system', 'content': read_text(text, '`system`', location)}]


def _history(value: Any, location: str) -> list[Message]:
  """Returns earlier turns of a `history` column, a list of [question, answer]."""
  turns = []
  for pair in value or []:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
      raise UserError(
        f'{location}: `history` must be a list of [question, answer], not {excerpt(value)}.'
      )
    texts = [read_text(text, '`history`', location) for text in pair]
    turns += [{'role': r, 'content': t} for r, t in zip(('user', 'assistant'), texts, strict=True)]
  return turns


def _rows_of_columns(value: Any) -> Any:
  """Returns {role: [...], content: [...]}, as `datasets` may read messages, as a list of them."""
  if not isinstance(value, dict):
    return value
  columns = [column for column in value.values() if isinstance(column, list)]
  if not columns or len(columns) != len(value) or len({len(column) for column in columns}) > 1:
    return value
  return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
