"""Rows as JSON text in a file, of which one at a time is in memory."""

import codecs
import functools
import json
import os
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from segjax.errors import UserError, excerpt
from segjax.storage import writing


class RowText(NamedTuple):
  """A row as JSON text, which whoever uses it parses: a process of its own, if there are many.

  Attributes:
    text: a line; what follows it is not read.
    path: file of the row, for errors.
    number: the row's, counted from 1, for errors.
  """

  text: bytes
  path: str
  number: int

  def parse(self) -> dict[str, Any]:
    """Returns the row; raises UserError if the text is not JSON, or no object."""
    line = self.text[: self.text.find(b'\n') + 1 or None].removeprefix(codecs.BOM_UTF8)
    location = f'{self.path}, row {self.number}'
    try:
      row = json.loads(line)
    except RecursionError:
      raise UserError(too_deep(location)) from None
    except ValueError as error:
      start = excerpt(line[:80].decode('utf-8', 'replace'))
      raise UserError(f'{location}: not JSON: {error}; the line is {start}.') from error
    check_row(row, location)
    return row


def check_row(row: Any, location: str) -> None:
  """Raises UserError unless a JSON value is an object."""
  if not isinstance(row, dict):
    raise UserError(f'{location}: must be a JSON object, not {excerpt(row)}.')


def too_deep(location: str) -> str:
  """Returns the error on a row whose values are nested too deeply."""
  return f'{location}: not JSON that can be read: nested too deeply; remove the row.'


class StoredRows:
  """A sequence of the texts of rows, or of the errors in their places.

  Attributes:
    starts: position of each row in the file, and the end of the last one.
    errors: what stands in the place of a row that is none, by position.
  """

  def __init__(
    self,
    file: Callable[[], BinaryIO],
    path: str,
    starts: array,
    errors: dict[int, UserError],
    first: int,
  ):
    """Reads rows from a binary file, which has to stay as it is.

    Args:
      file: returns the file of the texts.
      path: file of the rows, for errors.
      starts: see above.
      errors: see above.
      first: number of the first row in its file, from 0.
    """
    self._file, self._path, self._first = file, path, first
    self.starts, self.errors = starts, errors

  def __len__(self) -> int:
    return len(self.starts) - 1

  def __getitem__(self, index: int) -> RowText | UserError:
    index = range(len(self))[index]
    start, end = self.starts[index : index + 2]
    if start in self.errors:
      return self.errors[start]
    # pread: several threads may read.
    text = os.pread(self._file().fileno(), end - start, start)
    return RowText(text, self._path, self._first + index + 1)

  def select(self, indices: range) -> 'StoredRows':
    """Returns the rows at consecutive indices."""
    starts = self.starts[indices.start : indices.stop + 1]
    return StoredRows(self._file, self._path, starts, self.errors, self._first + indices.start)


# A data set may have more files than a process may have open; a file that is left out is closed
# when nobody reads from it any more.
@functools.lru_cache(maxsize=128)
def _opened(path: str) -> BinaryIO:
  return Path(path).open('rb')


class RowStore:
  """Collects the rows of a stream: in a list, and beyond `max_bytes` of text in a file.

  Those in the file are parsed when they are used.

  The file is that of the stream if its lines can be read again, else a temporary one, which
  vanishes with the rows.
  """

  def __init__(self, stream: Any, max_bytes: int):
    """Starts with no rows; `stream` is the `json_rows.BoundedStream` from which they are read."""
    self._stream, self._max_bytes = stream, max_bytes
    self._rows: list[Any] | None = []
    self._starts, self._errors = array('q'), {}
    self._file: Any = None

  def __len__(self) -> int:
    return len(self._starts)

  @property
  def is_large(self) -> bool:
    """Whether the row that is appended next goes to the file."""
    return self._stream.num_bytes > self._max_bytes

  def append(self, row: Any) -> None:
    """Appends the row that was read last, as its text or parsed, or the error in its place."""
    if self._rows is not None and self.is_large:
      self._move_to_file()
    if self._rows is None:
      self._store(row, self._stream.line_start)
    else:
      self._rows.append(row)
      self._starts.append(self._stream.line_start)

  def _move_to_file(self) -> None:
    source, rows, starts = self._stream.source, self._rows, self._starts
    self._file = None if source else tempfile.TemporaryFile()  # noqa: SIM115
    self._rows, self._starts = None, array('q')
    for row, start in zip(rows, starts, strict=True):
      self._store(row, start)

  def _store(self, row: Any, start: int) -> None:
    if not self._stream.source:
      start = self._file.tell()
      with writing(tempfile.gettempdir()):
        self._file.write(_to_text(row))
    if isinstance(row, UserError):
      self._errors[start] = row
    self._starts.append(start)

  def finish(self) -> list[Any] | StoredRows:
    """Returns the rows."""
    if self._rows is not None:
      return self._rows
    end, file = self._stream.num_bytes, functools.partial(_opened, str(self._stream.source))
    if not self._stream.source:
      with writing(tempfile.gettempdir()):
        self._file.flush()
      end, file = self._file.tell(), lambda: self._file
    self._starts.append(end)
    return StoredRows(file, str(self._stream.path), self._starts, self._errors, 0)


def _to_text(row: Any) -> bytes:
  if isinstance(row, UserError):
    return b'\n'
  return row.text if isinstance(row, RowText) else json.dumps(row).encode()
