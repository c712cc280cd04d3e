"""Rows of large sources with a fingerprint, by which their tokens are found again."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from segjax.data import files
from segjax.data.json_rows import Row
from segjax.data.rows import JoinedRows, Reading, Rows
from segjax.data.source_list import parse_sources
from segjax.data.sources import load_rows
from segjax.errors import UserError

# Smaller sources are read again at each start, which takes seconds.
_MANY_ROWS = 4096
_MANY_BYTES = 16 << 20


class LazyRows(Rows):
  """Rows that are loaded on their first use: where their tokens are cached, never.

  Attributes:
    fingerprint: what the rows depend on; equal only for equal rows.
  """

  def __init__(self, load: Callable[[], Rows], fingerprint: str, reading: Reading):
    vars(self).update(rows=load, reading=reading, fingerprint=fingerprint)

  @functools.cached_property
  def loaded(self) -> Rows:
    """The rows."""
    return self.rows()

  @property
  def name(self) -> str:
    """Name of the source in errors."""
    return self.loaded.name

  def __len__(self) -> int:
    return len(self.loaded)

  def __getitem__(self, index: int) -> Row:
    return self.loaded[index]

  def __iter__(self) -> Iterator[Row]:
    return iter(self.loaded)

  def location(self, index: int) -> str:
    """Returns file and row for an error."""
    return self.loaded.location(index)

  def located(self) -> Iterator[tuple[int, str, Any]]:
    """Yields (index, location, row as it is in the source) of each row, for `read_row`."""
    return self.loaded.located()


def open_rows(path: str, split: str, limit: int, reading: Reading) -> Rows:
  """Returns the rows of `load_rows`; those of large sources have a fingerprint.

  Local ones are loaded on their first use. Those of the hub lie in the cache of `datasets`, which
  knows whether they are the same.
  """
  sources = parse_sources(path)
  paths = [epath.Path(source.path).expanduser() for source in sources]
  if 0 < limit < _MANY_ROWS or not sources:
    return load_rows(path, split, limit, reading)
  if not all(path.exists() for path in paths):
    return _with_fingerprint(load_rows(path, split, limit, reading))
  stamps = [files.stamps(path) for path in paths]
  if sum(stamp.size for part in stamps for stamp in part) < _MANY_BYTES:
    return load_rows(path, split, limit, reading)
  weights = [source.weight for source in sources]
  how = [split, limit, reading.drop_bad, sorted(reading.columns.items())]

  def load() -> Rows:
    if [files.stamps(path) for path in paths] != stamps:
      raise UserError(f'{path} has changed since the run has started; start it again.')
    return load_rows(path, split, limit, reading)

  return LazyRows(load, repr([stamps, weights, how]), reading)


def _with_fingerprint(rows: Rows) -> Rows:
  """Returns rows with the fingerprint that `datasets` gives them, if it does."""
  is_joined = isinstance(rows, JoinedRows)
  prints = [getattr(part.rows, '_fingerprint', '') for part in (rows.rows if is_joined else [rows])]
  if len(rows) < _MANY_ROWS or not all(prints):
    return rows
  weights = rows.weights if is_joined else ()
  how = [rows.reading.drop_bad, sorted(rows.reading.columns.items())]
  return LazyRows(lambda: rows, repr([prints, weights, how]), rows.reading)
