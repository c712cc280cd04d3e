"""The class of errors that a user can fix, and errors as text."""

import re
from typing import Any

_LONGEST = 4000
_CAUSES = re.compile(
  'No space left on device|Disk quota exceeded|File too large|Permission denied|'
  'Read-only file system|Input/output error|Stale file handle'
)


class UserError(ValueError):
  """Wrong input. The command line prints its message alone; other errors are defects of segjax.

  The message gives the key or file, and the fix.
  """


class StepAbortedError(Exception):
  """The run must stop, in a step that has not changed any state yet; in all processes at once."""


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, at most 300 characters; its class if empty.

  Messages of XLA, Orbax and cloud clients have many lines, of which the first names the cause.
  """
  return (str(error).strip() or type(error).__name__).partition('\n')[0][:300]


def excerpt(value: Any) -> str:
  """Returns a value as text of at most 60 characters, for errors."""
  # The repr of a long text alone would take longer than the rest of the error.
  text = repr(value[:80] if isinstance(value, str) else value)
  return text if len(text) <= 60 else text[:57] + '...'


def system_cause(error: BaseException) -> str:
  """Returns the operating system's words in an error of tensorstore, else its first line."""
  match = _CAUSES.search(str(error))
  return match[0] if match else first_line(error)


def one_line(error: BaseException) -> str:
  """Returns an error's message in one line that a terminal shows as it is.

  Messages quote names and values of files, which may hold anything: line breaks, sequences that
  move the cursor, halves of characters, megabytes.
  """
  text = ' '.join(str(error).split())
  text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
  return text if len(text) <= _LONGEST else f'{text[: _LONGEST - 300]} ... {text[-300:]}'
