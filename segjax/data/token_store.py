"""Columns of a dataset that grow by chunks, in memory or in files that are mapped afterwards.

An entry is a directory with a file of raw elements for each column, and `entry.json` with their
types, numbers and checksums.
"""

import contextlib
import json
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segjax.errors import first_line

_INDEX = 'entry.json'
_BLOCK = 8 << 20  # bytes read at once

Columns = dict[str, np.ndarray]


class Sink:
  """Collects the chunks of the columns of a dataset.

  Attributes:
    problem: why the columns are kept in memory although there is a directory; '' if they are not.
  """

  def __init__(self, directory: Path | None = None):
    """Collects in files of an empty directory, or in memory."""
    self.problem = ''
    self._directory = directory
    self._files: dict[str, Any] = {}
    self._index: dict[str, list[Any]] = {}  # type, number of elements, checksum
    self._parts: dict[str, list[np.ndarray]] = {}

  def append(self, columns: Mapping[str, np.ndarray]) -> None:
    """Appends a chunk; a full disk is no error, see `problem`."""
    if self._directory is not None and not self.problem:
      try:
        self._write(columns)
        return
      except OSError as error:
        self._move_to_memory(first_line(error))
    for name, array in columns.items():
      self._parts.setdefault(name, []).append(array)

  def _write(self, columns: Mapping[str, np.ndarray]) -> None:
    for name, array in columns.items():
      if name not in self._files:
        self._files[name] = (self._directory / name).open('wb')
      self._files[name].write(memoryview(array).cast('B'))
    for file in self._files.values():
      file.flush()  # a full disk is an error here
    for name, array in columns.items():  # all or none of a chunk
      _, count, checksum = self._index.get(name, ('', 0, 0))
      self._index[name] = [array.dtype.str, count + len(array), zlib.crc32(array, checksum)]

  def _move_to_memory(self, problem: str) -> None:
    self.problem = problem
    self._close()
    for name, (dtype, count, _) in self._index.items():
      self._parts[name] = [np.fromfile(self._directory / name, dtype, count)]
      (self._directory / name).unlink()

  def _close(self) -> None:
    for file in self._files.values():
      with contextlib.suppress(OSError):  # what is still buffered on a full disk
        file.close()

  def in_memory(self) -> Columns:
    """Returns the columns that were not written to files."""
    return {name: np.concatenate(parts) for name, parts in self._parts.items()}

  def write_index(self, summary: dict[str, Any]) -> None:
    """Completes the entry."""
    self._close()
    content = {'columns': self._index, 'summary': summary}
    (self._directory / _INDEX).write_text(json.dumps(content), encoding='utf-8')


def read_entry(directory: Path) -> tuple[Columns, dict[str, Any]]:
  """Maps the columns of an entry; returns them and the summary.

  Raises:
    OSError: there is no such entry.
    ValueError: it is damaged.
  """
  try:
    content = json.loads((directory / _INDEX).read_text(encoding='utf-8'))
    columns = {
      name: _map_column(directory / name, *values) for name, values in content['columns'].items()
    }
    return columns, content['summary']
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{_INDEX} is damaged: {first_line(error)}') from error


def _map_column(path: Path, dtype: str, count: int, checksum: int) -> np.ndarray:
  with path.open('rb') as file:
    actual = 0
    while block := file.read(_BLOCK):  # read, not mapped: pages of a mapping count as its memory
      actual = zlib.crc32(block, actual)
    if file.tell() != count * np.dtype(dtype).itemsize or actual != checksum:
      raise ValueError(f'{path.name} is damaged')
    if not count:
      return np.zeros(0, dtype)
    return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), dtype)
