"""The class of errors that a user can fix, and errors as text."""

from typing import Any


class UserError(ValueError):
  """Wrong input. The command line prints its message alone; other errors are defects of segjax.

  The message gives the key or file, and the fix.
  """


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
