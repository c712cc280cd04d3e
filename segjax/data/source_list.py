"""Reads lists of sources with weights and patterns: 'a.jsonl*2,shards/*.jsonl,owner/name*0.5'."""

import re
from typing import NamedTuple

from etils import epath

from segjax.errors import UserError, first_line

_WEIGHT = re.compile(r'(.+?)\*(\d+(?:\.\d+)?|\.\d+)')
_SEVERAL = re.compile(r'[,*?\[]')
_PATTERN = re.compile(r'[*?\[]')
_MAX_WEIGHT = 1000  # rows are repeated in memory; more is a mistake, or many epochs


class Source(NamedTuple):
  """A file, directory or hub id, and how many times each of its rows is read."""

  path: str
  weight: float = 1.0


def parse_sources(text: str) -> list[Source]:
  """Returns the sources of a list joined by commas, patterns replaced by the files they match.

  A path that exists as it is written, commas and stars included, is one source.

  Raises:
    UserError: there is no source, a weight is 0 or over 1,000, or a pattern matches nothing.
  """
  is_one = not _SEVERAL.search(text)  # most paths; those of buckets are not looked up
  if not text or is_one or epath.Path(text).expanduser().exists():
    return [Source(text)] if text else []
  sources = []
  for item in (item.strip() for item in text.split(',')):
    match = _WEIGHT.fullmatch(item)
    path, weight = (match[1], float(match[2])) if match else (item, 1.0)
    if not weight:
      raise UserError(f'{item}: the weight is 0; leave the source out instead.')
    if weight > _MAX_WEIGHT:
      raise UserError(f'{item}: the weight is over {_MAX_WEIGHT:,}; raise num_epochs instead.')
    sources += [Source(p, weight) for p in _expand(path)] if path else []
  if not sources:
    raise UserError(f'{text!r} names no source; give a file, directory or hub id.')
  return sources


def _expand(path: str) -> list[str]:
  """Returns the paths that match a pattern, sorted; a path without pattern as it is."""
  match = _PATTERN.search(path)
  if not match or epath.Path(path).expanduser().exists():
    return [path]
  # Text before the last slash that comes before the pattern is a directory.
  root, slash, pattern = path[: match.start()].rpartition('/')
  pattern += path[match.start() :]
  directory = epath.Path((root + slash) or '.').expanduser()
  try:
    paths = sorted(str(p) for p in directory.glob(pattern)) if directory.exists() else []
  except (OSError, NotImplementedError) as error:  # etils lacks **
    raise UserError(f'{path}: the pattern cannot be expanded: {first_line(error)}') from error
  if not paths:
    raise UserError(f'{path}: no file matches the pattern.')
  return paths
