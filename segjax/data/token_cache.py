"""Keeps the tokens of large data sets on disk, so that rows are read and tokenized once.

An entry is a directory named by a hash of everything that its content depends on: the rows' files
with their sizes and times, how they are read, the tokenizer with its template, the limits, and the
code and libraries that tokenize. `rm -r` of the directory, or of entries in it, is safe at any
time; entries that were not used for 30 days are removed when another one is written.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from segjax.data.rows import Rows
from segjax.data.token_forms import Form
from segjax.data.token_store import Columns, Sink, read_entry
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError, first_line
from segjax.storage import atomic_directory, make_directory

VARIABLE = 'SEGJAX_TOKEN_CACHE_DIR'  # of the environment: the directory; '' keeps no tokens
_LIBRARIES = ('tokenizers', 'transformers', 'jinja2', 'numpy')
_MAX_AGE = 30 * 24 * 3600  # seconds


class Tokens(NamedTuple):
  """Columns of a dataset, its summary, and whether they come from the cache."""

  columns: Columns
  summary: dict[str, Any]
  is_cached: bool


class _NotStoredError(Exception):
  """The columns did not fit on the disk."""


def default_directory() -> str:
  """Returns the directory of the cache: that of the environment, or one in the home directory."""
  return os.environ.get(VARIABLE, str(Path.home() / '.cache' / 'segjax' / 'tokens'))


def load_or_fill(
  rows: Rows, form: Form, fill: Callable[[Sink], dict[str, Any]], log: Callable[[str], None]
) -> Tokens:
  """Returns the tokens of rows from the cache, or from `fill`, whose result it keeps.

  Args:
    rows: the rows; without a fingerprint nothing is kept.
    form: what they hold, and how they are tokenized.
    fill: writes the columns to a sink; returns a summary that JSON can hold.
    log: called with a line of text if an entry is damaged or cannot be written.
  """
  directory = default_directory()
  if not rows.fingerprint or not directory:
    return _fill_memory(fill)
  entry = Path(directory).expanduser() / _key(rows, form)
  try:
    make_directory(entry.parent)
    if not os.access(entry.parent, os.W_OK):
      raise UserError(f'{entry.parent} cannot be written to')
  except UserError as error:
    if entry.exists():
      return _read(entry, log) or _fill_memory(fill)
    log(f'tokens are kept in memory, not on disk: {error}')
    return _fill_memory(fill)
  with _held(entry, log):
    return _read(entry, log) or _fill_entry(entry, fill, log)


def _fill_memory(fill: Callable[[Sink], dict[str, Any]]) -> Tokens:
  sink = Sink()
  summary = fill(sink)
  return Tokens(sink.in_memory(), summary, False)


def _read(entry: Path, log: Callable[[str], None]) -> Tokens | None:
  """Returns the tokens of an entry; None if there is none, or none that can be read."""
  try:
    columns, summary = read_entry(entry)
    os.utime(entry)  # when it was used
    return Tokens(columns, summary, True)
  except FileNotFoundError:
    if entry.exists():
      log(f'{entry} is not complete; the rows are tokenized again')
  except (OSError, ValueError) as error:
    log(f'{entry} cannot be read: {first_line(error)}; the rows are tokenized again')
  return None


def _fill_entry(
  entry: Path, fill: Callable[[Sink], dict[str, Any]], log: Callable[[str], None]
) -> Tokens:
  """Writes an entry and maps it; where it cannot be written, the tokens stay in memory."""
  sink, summary = None, None
  try:
    with atomic_directory(entry) as partial:
      sink = Sink(partial)
      summary = fill(sink)
      if sink.problem:
        raise _NotStoredError
      sink.write_index(summary)
  except _NotStoredError:
    log(f'tokens are kept in memory, not on disk: {entry.parent}: {sink.problem}')
    return Tokens(sink.in_memory(), summary, False)
  except UserError as error:
    if sink is not None and summary is None:
      raise  # of a row
    log(f'tokens are kept in memory, not on disk: {error}')
    return _fill_memory(fill)
  _remove_unused(entry)
  return Tokens(*read_entry(entry), False)


@contextlib.contextmanager
def _held(entry: Path, log: Callable[[str], None]) -> Iterator[None]:
  """Lets one process at a time write an entry; the others wait for it, and then read it."""
  with (entry.parent / '.lock').open('ab') as file:
    byte = int(entry.name[:12], 16)  # one of the file for each entry
    try:
      try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
      except (BlockingIOError, PermissionError):
        log('another process tokenizes these rows; waiting for it')
        fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
    except OSError:
      pass  # a file system without locks: several processes may write the same entry
    yield


def _remove_unused(written: Path) -> None:
  """Removes entries that were last used long before this one was written."""
  oldest = written.stat().st_mtime - _MAX_AGE
  for entry in written.parent.iterdir():
    with contextlib.suppress(OSError):  # another process may have removed it
      if entry.is_dir() and entry.stat().st_mtime < oldest:
        shutil.rmtree(entry)  # a process that has mapped it keeps what it has mapped


def _key(rows: Rows, form: Form) -> str:
  """Returns a hash of what the tokens of rows depend on."""
  values = {field.name: getattr(form, field.name) for field in dataclasses.fields(form)}
  tokenizer = values.pop('tokenizer')
  parts = [rows.fingerprint, type(form).__name__, values, _describe(tokenizer), _code()]
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _describe(tokenizer: ChatTokenizer) -> list[Any]:
  """Returns what the ids of a conversation depend on."""
  fields = {f.name: getattr(tokenizer, f.name) for f in dataclasses.fields(tokenizer)}
  library = fields.pop('tokenizer')
  core = json.loads(library.backend_tokenizer.to_str())
  for name in ('truncation', 'padding'):  # change with each call
    core.pop(name, None)
  digest = hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()
  # The template holds its date.
  return [digest, library.special_tokens_map, library.get_chat_template(), fields]


@functools.cache
def _code() -> list[str]:
  """Returns the versions of the libraries that tokenize, and a hash of this wing's code."""
  digest = hashlib.sha256()
  for file in sorted(Path(__file__).parent.glob('*.py')):
    digest.update(file.read_bytes())
  return [*map(importlib.metadata.version, _LIBRARIES), digest.hexdigest()]
