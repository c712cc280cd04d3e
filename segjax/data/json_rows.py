"""Reads rows from a stream of JSON, a bounded amount of it: one row per line, or one array.

Broken and hostile files end in one line, before memory runs out.
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any

from segjax.data.stored_rows import RowStore, RowText, StoredRows, check_row, too_deep
from segjax.errors import UserError, excerpt

Row = dict[str, Any]

MAX_ROW_BYTES = 32 << 20  # the longest conversations are a hundred times shorter
_IN_MEMORY = 4 << 20  # bytes of text whose rows are kept in memory
MAX_RATIO = 200  # of unpacked to packed bytes; text packs to a third or a tenth
_UNCHECKED_BYTES = 4 << 20  # unpacked, at the beginning of a file; their ratio does not matter
_CHECKED_BYTES = 32 << 20  # unpacked, whose ratio is checked together
_READ_AHEAD = 128 << 10  # packed bytes that may have been read, but not yet unpacked
_MAX_BLANK = 1 << 16  # bytes of blank lines between two rows
_CHUNK = 1 << 20  # bytes of an array read at once


class BoundedStream:
  """Bytes of a file, which may not unpack to far more than text does.

  Attributes:
    path: the file, for errors.
    num_bytes: bytes that were read.
    line_start: position of the line that was read last.
    source: the file, if each of its lines can be read again by its position.
  """

  def __init__(self, path: Any, stream: Any, packed: Any = None):
    """Wraps a stream.

    Args:
      path: the file.
      stream: its bytes, unpacked; a binary file.
      packed: the file that `stream` unpacks, if it does.
    """
    self.path, self._stream, self._packed = path, stream, packed
    self.source = None if packed or '://' in str(path) else path
    self.num_bytes, self.line_start, self._next_check = 0, 0, _UNCHECKED_BYTES
    self._mark = (0, 0)  # bytes, unpacked and packed, at the beginning of the part that is checked

  def lines(self) -> Iterator[bytes]:
    """Yields the lines, the first without a byte order mark; ends after one that is too long."""
    while line := self._read_line():
      self.line_start = self.num_bytes
      self.num_bytes += len(line)
      if not self.line_start:
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
          raise UserError(f'{self.path}: the text is UTF-16; save it as UTF-8.')
        line = line.removeprefix(codecs.BOM_UTF8)
      if self.num_bytes > self._next_check:
        self._check_ratio()
      yield line
      if len(line) > MAX_ROW_BYTES:
        return

  def _read_line(self) -> bytes:
    if self.num_bytes:
      return self._stream.readline(MAX_ROW_BYTES + 1)
    # The first line may be an array of all rows, of which only the first ones are wanted.
    line = self._stream.readline(_CHUNK)
    if line.endswith(b'\n') or line.lstrip().startswith(b'['):
      return line
    return line + self._stream.readline(MAX_ROW_BYTES + 1 - len(line))

  def read(self, size: int) -> bytes:
    """Returns the next bytes, at most `size`; b'' at the end."""
    data = self._stream.read(size)
    self.num_bytes += len(data)
    if self.num_bytes > self._next_check:
      self._check_ratio()
    return data

  def _check_ratio(self) -> None:
    self._next_check = self.num_bytes + (1 << 20)
    if self._packed is None:
      return
    position = self._packed.tell()
    unpacked, packed = self.num_bytes - self._mark[0], position - self._mark[1]
    if unpacked > MAX_RATIO * packed:
      raise UserError(describe_ratio(self.path, packed, unpacked))
    if unpacked > _CHECKED_BYTES:  # the beginning must not make up for the rest
      self._mark = self.num_bytes, max(0, position - _READ_AHEAD)


def describe_ratio(path: Any, packed: int, unpacked: int) -> str:
  """Returns the error on a file that unpacks to far more bytes than text does."""
  return (
    f'{path}: {packed:,} bytes unpack to more than {unpacked:,}, over {MAX_RATIO} times as many; '
    'if this is what the file should hold, unpack it first, or read its first rows by '
    'data.max_rows.'
  )


def read_rows(
  stream: BoundedStream, limit: int, drop_bad: bool
) -> list[Row | UserError] | StoredRows:
  """Returns the first rows of a stream; 0 reads all.

  Rows of over 4 MiB of text are parsed when they are used: only a line that does not look like an
  object is parsed here.

  Raises:
    UserError: a row is not a JSON object. With `drop_bad`, its place is taken by the error.
  """
  rows = RowStore(stream, _IN_MEMORY)
  for row in _read_values(stream):
    number = len(rows) + 1
    try:
      if not isinstance(row, RowText):
        check_row(row, f'{stream.path}, row {number}')
      elif not rows.is_large or not _is_braced(row.text):
        row = row.parse()
    except UserError as error:
      if number == 1 and isinstance(row, RowText):
        _check_one_line(row.text, error.__cause__, stream)
      if not drop_bad:
        raise
      row = error
    rows.append(row)
    if len(rows) == limit:
      break
  if len(rows) == 1 and isinstance(row, dict):
    _check_object(row, stream.path)
  return rows.finish()


def _is_braced(line: bytes) -> bool:
  return line.startswith(b'{') and line.endswith((b'}\n', b'}\r\n', b'}'))


def _read_values(stream: BoundedStream) -> Iterator[Any]:
  """Yields each value of an array, or the texts of the lines that are not blank."""
  path, number, num_blank = str(stream.path), 0, 0
  for line in stream.lines():
    num_blank = num_blank + len(line) if line.isspace() else 0
    if num_blank > _MAX_BLANK:
      raise UserError(
        f'{stream.path}: over {_MAX_BLANK:,} bytes of blank lines in a row; remove them.'
      )
    if num_blank:
      continue
    number += 1
    if number == 1 and line.lstrip().startswith(b'['):
      stream.source = None
      yield from _parse_array(line.lstrip()[1:], stream)
      return
    if len(line) > MAX_ROW_BYTES:
      raise UserError(_too_long(f'{path}, row {number}'))
    yield RowText(line, path, number)


def _parse_array(text: bytes, stream: BoundedStream) -> Iterator[Any]:
  """Yields the values of an array one by one, without holding all of its text.

  Args:
    text: what was read after the opening bracket.
    stream: the rest.
  """
  decode = codecs.getincrementaldecoder('utf-8')().decode
  buffer, position, number, at_end = '', 0, 0, False
  while True:
    location = f'{stream.path}, row {number + 1}'
    position = _skip_space(buffer, position)
    if buffer.startswith(']', position):
      if (buffer[position + 1 :] + decode(stream.read(_CHUNK))).strip():
        raise UserError(f'{stream.path}: text follows the array of {number} rows; remove it.')
      return
    value, end, problem = _decode_value(buffer, position, location)
    if buffer.startswith((',', ']'), end):
      number += 1
      yield value
      position = end + buffer.startswith(',', end)
      continue
    if at_end or (end < len(buffer) and not problem):
      raise UserError(f'{location}: not JSON: {problem or "expected a comma or ]"}.')
    if len(buffer) - position > MAX_ROW_BYTES:
      raise UserError(_too_long(location))
    # The value may end in what follows. Reading as much again as there is keeps the cost linear.
    data = text or stream.read(max(_CHUNK, len(buffer) - position))
    at_end, text = not data, b''
    try:
      buffer, position = buffer[position:] + decode(data, final=at_end), 0
    except UnicodeDecodeError as error:
      raise UserError(f'{location} or later: not UTF-8: {error.reason}.') from error


def _decode_value(buffer: str, position: int, location: str) -> tuple[Any, int, str]:
  """Returns (the value at a position, the position of what follows, '').

  Where the text is broken, or ends too early: (None, the end of the text, what is wrong).
  """
  try:
    value, end = json.JSONDecoder().raw_decode(buffer, position)
  except RecursionError:
    raise UserError(too_deep(location)) from None
  except ValueError as error:
    at = getattr(error, 'pos', position)
    reason = getattr(error, 'msg', str(error))
    return None, len(buffer), f'{reason} at {excerpt(buffer[at : at + 80])}'
  end = _skip_space(buffer, end)
  return value, end, 'the array is not closed' if end == len(buffer) else ''


def _skip_space(text: str, position: int) -> int:
  return json.decoder.WHITESPACE.match(text, position).end()


def _check_one_line(line: bytes, error: BaseException | None, stream: BoundedStream) -> None:
  """Raises UserError if the first line opens an object that goes on in the next one."""
  is_open = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip())
  if is_open and line.lstrip().startswith(b'{') and next(stream.lines(), b'').strip():
    raise UserError(
      f'{stream.path}: an object is spread over several lines; write one row per line, or all '
      'rows as one array in brackets.'
    )


def _check_object(row: Row, path: Any) -> None:
  """Raises UserError if the only row of a file is an object that holds all rows or columns."""
  nested = {key: value for key, value in row.items() if isinstance(value, list | dict | str)}
  for key, value in nested.items() if len(nested) == 1 else ():
    is_rows = isinstance(value, list) and len(value) > 1 and all(isinstance(v, dict) for v in value)
    if is_rows and not any(name in item for item in value for name in ('role', 'from')):
      raise UserError(
        f'{path}: one object in place of a list of rows; write the array under {key!r} alone to '
        'the file.'
      )
  columns = [value for value in row.values() if isinstance(value, list)]
  is_columns = len(columns) == len(row) > 1 and len({len(column) for column in columns}) == 1
  if is_columns and all(isinstance(text, str) for column in columns for text in column):
    raise UserError(
      f'{path}: one object of columns ({", ".join(row)}) in place of a list of rows; write one '
      'object per row.'
    )


def _too_long(location: str) -> str:
  return f'{location}: longer than {MAX_ROW_BYTES >> 20} MiB, the limit; shorten or remove it.'
