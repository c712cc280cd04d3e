"""Prints the settings: each key with its default, its comment and its choices, from one source.

Defaults and comments are read from the source of the settings' dataclasses, choices and minimums
from `choices`.
"""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from segjax.config import parse, ppo_settings, settings, training_settings
from segjax.config.choices import CHOICES, MINIMUMS
from segjax.config.settings import (
  DPO,
  LanguageLoraOverrides,
  Lora,
  LoraOverrides,
  LoraSettings,
  PairTraining,
  RewardTraining,
  Segmentation,
  SegmentationOverrides,
  Settings,
)

_WIDTH = 100


class Setting(NamedTuple):
  """A key of the config; `section` describes the dataclass that it belongs to."""

  key: str
  default: Any
  comment: str
  section: str


def all_settings() -> list[Setting]:
  """Returns every setting in the order of the source."""
  comments = _comments(settings) | _comments(training_settings) | _comments(ppo_settings)
  # An override means the same as the field that it replaces.
  for kind, base in ((LoraSettings, Lora), (RewardTraining, PairTraining), (DPO, PairTraining)):
    for field in dataclasses.fields(base):
      comments.setdefault((kind.__name__, field.name), comments[base.__name__, field.name])
  for overriding, kind in (
    (SegmentationOverrides, Segmentation),
    (LoraOverrides, LoraSettings),
    (LanguageLoraOverrides, LoraSettings),
  ):
    for field in dataclasses.fields(overriding):
      comments[overriding.__name__, field.name] = comments[kind.__name__, field.name]
  return list(_walk(Settings(), '', comments))


def describe(section: str = '') -> str:
  """Returns the table of a section, of a single key, or of everything.

  Raises:
    UserError: there is no such section or key.
  """
  if section:
    parse.check_key(section)
  rows = [
    row
    for row in all_settings()
    if not section or row.key == section or row.key.startswith(f'{section}.')
  ]
  key_width = max(len(row.key) for row in rows)
  default_width = min(24, max(len(_text(row.default)) for row in rows))
  lines, previous = [], None
  for row in rows:
    parent = row.key.rpartition('.')[0]
    if parent != previous:
      title = f'{parent}: {row.section}' if parent else row.section
      lines += [''] * bool(lines) + textwrap.wrap(title, _WIDTH)
      previous = parent
    lines += textwrap.wrap(
      f'  {row.key:<{key_width}}  {_text(row.default):<{default_width}}  {_explain(row)}',
      _WIDTH,
      subsequent_indent=' ' * (key_width + default_width + 6),
      break_on_hyphens=False,
    )
  return '\n'.join(lines)


def _walk(value: Any, prefix: str, comments: dict[tuple[str, str], str]) -> Iterator[Setting]:
  name = type(value).__name__
  section = ' '.join((type(value).__doc__ or '').split())
  sections = []
  for field in dataclasses.fields(value):
    default = attrgetter(field.name)(value)
    if dataclasses.is_dataclass(default):
      sections.append((default, f'{prefix}{field.name}.'))
    else:
      comment = comments.get((name, field.name), '')
      yield Setting(prefix + field.name, default, comment, section)
  for default, nested in sections:
    yield from _walk(default, nested, comments)


def _comments(module: Any) -> dict[tuple[str, str], str]:
  """Returns {(class, field): the comment at the end of the field's line}."""
  source = inspect.getsource(module)
  by_line = {
    token.start[0]: token.string.removeprefix('#').strip()
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  return {
    (node.name, field.target.id): by_line.get(field.end_lineno, '')
    for node in ast.parse(source).body
    if isinstance(node, ast.ClassDef)
    for field in node.body
    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
  }


def _text(default: Any) -> str:
  if isinstance(default, tuple):
    return ','.join(default) or "''"
  return repr(default) if isinstance(default, str) else str(default)


def _explain(row: Setting) -> str:
  parts = [row.comment] if row.comment else []
  if choices := CHOICES.get(row.key):
    parts.append(f'one of {", ".join(choice or repr(choice) for choice in choices)}')
  elif (minimum := MINIMUMS.get(row.key)) is not None and f'{minimum}:' not in row.comment:
    parts.append(f'at least {minimum}')
  return '; '.join(parts)
