"""Rows as JSON text in a file, of which one at a time is in memory."""

import json
import os
import tempfile
from array import array
from typing import Any

from segjax.errors import UserError
from segjax.storage import writing


class StoredRows:
  """A sequence of rows that are parsed when they are read.

  Attributes:
    starts: position of each row in the file, and the end of the last one.
    errors: what stands in the place of a row that is none, by position.
  """

  def __init__(self, file: Any, starts: array, errors: dict[int, UserError]):
    """Reads rows from a binary file, which has to stay as it is."""
    self._file = file
    self.starts, self.errors = starts, errors

  def __len__(self) -> int:
    return len(self.starts) - 1

  def __getitem__(self, index: int) -> Any:
    index = range(len(self))[index]
    start, end = self.starts[index : index + 2]
    if start in self.errors:
      return self.errors[start]
    # pread: several threads may read.
    return json.loads(os.pread(self._file.fileno(), end - start, start))

  def select(self, indices: range) -> 'StoredRows':
    """Returns the rows at consecutive indices."""
    starts = self.starts[indices.start : indices.stop + 1]
    return StoredRows(self._file, starts, self.errors)


class RowStore:
  """Collects the rows of a stream: in a list, and beyond `max_bytes` of text in a file.

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

  def append(self, row: Any) -> None:
    """Appends the row that was read last, or the error in its place."""
    if self._rows is not None and self._stream.num_bytes > self._max_bytes:
      self._move_to_file()
    if self._rows is None:
      self._store(row, self._stream.line_start)
    else:
      self._rows.append(row)
      self._starts.append(self._stream.line_start)

  def _move_to_file(self) -> None:
    source, rows, starts = self._stream.source, self._rows, self._starts
    self._file = source.open('rb') if source else tempfile.TemporaryFile()  # noqa: SIM115
    self._rows, self._starts = None, array('q')
    for row, start in zip(rows, starts, strict=True):
      self._store(row, start)

  def _store(self, row: Any, start: int) -> None:
    if not self._stream.source:
      start = self._file.tell()
      with writing(tempfile.gettempdir()):
        self._file.write(b'\n' if isinstance(row, UserError) else json.dumps(row).encode())
    if isinstance(row, UserError):
      self._errors[start] = row
    self._starts.append(start)

  def finish(self) -> list[Any] | StoredRows:
    """Returns the rows."""
    if self._rows is not None:
      return self._rows
    end = self._stream.num_bytes
    if not self._stream.source:
      with writing(tempfile.gettempdir()):
        self._file.flush()
      end = self._file.tell()
    self._starts.append(end)
    return StoredRows(self._file, self._starts, self._errors)
