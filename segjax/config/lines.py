"""Reads lines 'NAME KEY=VALUE KEY=VALUE ...' of the config: arms of a study, rewards.

A value in quotes is written as in Python, and may hold spaces: KEY=' a' or KEY='\\n'.
"""

import ast
import re
from collections.abc import Iterable
from typing import Any

from segjax.errors import UserError

_WORD = re.compile(r"""[^\s=]+=(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")(?!\S)|\S+""")


def split_words(line: str) -> list[str]:
  """Returns the words of a line; white space in the quotes of a value is a part of its word."""
  return _WORD.findall(line)


def read_lines(lines: Iterable[str], key: str) -> dict[str, dict[str, str]]:
  """Returns the words KEY=VALUE of each line, by the name that it begins with.

  Args:
    lines: the lines.
    key: of the config that holds them, for errors.

  Raises:
    UserError: a name occurs twice, or a key in one line; or a word has no value.
  """
  named: dict[str, dict[str, str]] = {}
  for line in lines:
    name, *words = split_words(line)
    values: dict[str, str] = {}
    for word in words:
      word_key, equals, text = word.partition('=')
      if not equals:
        raise UserError(f'config.{key}: {name}: {word!r} has no value; write KEY=VALUE.')
      if word_key in values:
        raise UserError(f'config.{key}: {name}: {word_key} is given twice; remove one of them.')
      values[word_key] = text
    if name in named:
      raise UserError(f'config.{key} has {name!r} twice; rename one of them.')
    named[name] = values
  return named


def parse_value(text: str) -> Any:
  """Returns the value of a setting from its text, as after --config.KEY= on the command line."""
  try:
    return ast.literal_eval(text.replace('\n', '\\n'))  # a line end in quotes is that character
  except (ValueError, SyntaxError):
    return text
