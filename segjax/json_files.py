"""Reads JSON files that a person or another program may have written; what is wrong is one line.

Fields are checked by the caller.
"""

import json
from pathlib import Path
from typing import Any

from segjax.errors import UserError

# A tokenizer of 256,000 tokens takes 40 MB and 2 million values. Parsed values take up to 60 bytes
# each, so that no file takes more than half a gigabyte.
MAX_BYTES = 64 << 20
MAX_VALUES = 4_000_000


def read_object(path: Any, fix: str = 'correct it, or fetch it again') -> dict[str, Any]:
  """Returns the JSON object in a file.

  Args:
    path: pathlib or etils path.
    fix: what to do about an invalid file, for the error.

  Raises:
    UserError: the file is missing or unreadable, not UTF-8, not JSON, too large or too deep, an
      object in it has a key twice, or it holds another value than an object.
  """
  value = parse(read_bytes(path, fix), str(path), fix)
  if not isinstance(value, dict):
    raise UserError(f'{path} holds a JSON {type(value).__name__}, not an object; {fix}.')
  return value


def parse(data: bytes, name: str, fix: str = 'correct it, or fetch it again') -> Any:
  """Returns the value of JSON text; limits and errors are those of `read_object`.

  Args:
    data: the text in UTF-8, with or without a byte order mark.
    name: name of the file or row, for the error.
    fix: what to do about invalid text, for the error.
  """
  # Every value follows a comma or opens a list or object. Counted before parsing: millions of empty
  # lists are small as text.
  if len(data) > MAX_BYTES or sum(map(data.count, (b',', b'[', b'{'))) > MAX_VALUES:
    raise UserError(
      f'{name} is larger than {MAX_BYTES >> 20} MB or {MAX_VALUES:,} JSON values; {fix}.'
    )
  try:
    return json.loads(data.decode('utf-8-sig'), object_pairs_hook=_without_repeats)
  except RecursionError:
    raise UserError(f'{name} is JSON nested too deep to be read; {fix}.') from None
  except ValueError as error:  # UserError and UnicodeDecodeError are such
    raise UserError(f'{name} is not valid JSON ({error}); {fix}.') from error


def read_bytes(path: Any, fix: str) -> bytes:
  """Returns the content of a file, at most one byte more than the limit.

  Raises:
    UserError: it is missing or unreadable, or not a file: a device or a pipe may never end.
  """
  if '://' not in str(path):
    path = Path(path)  # etils counts devices and pipes as files
  try:
    # A pipe would wait for a writer.
    if path.exists() and not path.is_file():
      raise UserError(f'{path} is not a file; {fix}.')
    with path.open('rb') as stream:
      return stream.read(MAX_BYTES + 1)
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; {fix}.') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror or error}).') from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object whose keys differ; json itself keeps the last of equal ones."""
  value = dict(pairs)
  if len(value) < len(pairs):
    seen: set[str] = set()
    for name, _ in pairs:
      if name in seen:
        raise UserError(f'{name[:60]!r} occurs twice')
      seen.add(name)
  return value
