"""Sequences of rows of one source or of several, which know where each row comes from.

Rows are loaded by `segjax.data.sources`. Locations in errors count rows from 1.
"""

import dataclasses
import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from segjax.data import row_forms
from segjax.data.json_rows import Row
from segjax.data.stored_rows import RowText
from segjax.errors import UserError, first_line

Item = TypeVar('Item')


class MissingColumnError(KeyError):
  """A row lacks a column that a function of the user's reads."""

  def __str__(self) -> str:
    return self.args[0]  # a KeyError would quote it


class LocatedRow(dict):
  """The columns of a row; the error of one that it lacks says which row it is."""

  def __init__(self, row: Row, location: str):
    super().__init__(row)
    self.location = location

  def __missing__(self, name: str) -> Any:
    raise MissingColumnError(
      f'{self.location} has no column {name!r}; {row_forms.describe_keys(self)}'
    )


class NoRowsLeftError(UserError):
  """Every row was dropped."""


@dataclasses.dataclass(frozen=True)
class Reading:
  """How rows are read.

  Attributes:
    columns: {our name: the data's name} of columns that are renamed.
    drop_bad: rows that cannot be read are left out; else they raise.
    log: called with a line of text, once for each remark on the rows.
  """

  columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
  drop_bad: bool = False
  log: Callable[[str], None] | None = None


AS_THEY_ARE = Reading()
_DROPPED = 'dropped by data.bad_rows=drop, the first of these rows: '


class Remarks:
  """Logs remarks on rows, the first of each kind.

  Attributes:
    said: the first text of each kind.
  """

  def __init__(self, log: Callable[[str], None] | None):
    self._log = log
    self.said: dict[str, str] = {}

  def say(self, kind: str, text: str) -> None:
    """Logs a text unless one of its kind was logged."""
    if kind not in self.said:
      self.said[kind] = text
      if self._log:
        self._log(text)


def read_row(
  row: Any,
  location: str,
  convert: Callable[[Row, str], Item],
  reading: Reading,
  say: Callable[[str, str], None],
) -> Item | None:
  """Returns convert(row, location), with columns renamed; None for a row that is dropped.

  Args:
    row: a row, its text, or the error that has its place.
    say: receives the kind and the text of each remark on the row.

  Raises:
    UserError: the row cannot be read, and `reading` drops none.
  """
  try:
    row = row_forms.with_columns(_parsed(row), reading.columns, location)
    item = convert(row, location)
  except UserError as error:
    if not reading.drop_bad:
      raise
    say(_DROPPED, f'{_DROPPED}{error}')
    return None
  for remark in row_forms.notes(row):
    say(remark, f'{location}: {remark}, here and in all rows')
  return item


def _parsed(row: Any) -> Row:
  """Returns a row as a dict; raises the error that has its place."""
  if isinstance(row, UserError):
    raise row
  return row.parse() if isinstance(row, RowText) else row


@dataclasses.dataclass(frozen=True)
class Rows:
  """A sequence of dicts with the name of its source.

  Attributes:
    rows: a list of dicts, a memory-mapped `datasets.Dataset`, or `StoredRows`, whose rows are
      texts; with `reading.drop_bad`, a line that is not a row has its error in its place.
    name: name of the source in errors.
    first: number of the first row in its source, from 0.
    reading: how they are read.
  """

  rows: Any
  name: str
  first: int = 0
  reading: Reading = AS_THEY_ARE

  fingerprint = ''  # of rows that cannot be told apart

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Row:
    row = _parsed(self.rows[index])
    return row_forms.with_columns(row, self.reading.columns, self.location(index))

  def __iter__(self) -> Iterator[Row]:
    for index, row in self._indexed():
      yield row_forms.with_columns(_parsed(row), self.reading.columns, self.location(index))

  def location(self, index: int) -> str:
    """Returns file and row for an error: 'train.jsonl, row 12' for index 11."""
    return f'{self.name}, row {self.first + index + 1}'

  def part(self, first: int, last: int) -> 'Rows':
    """Returns the rows from `first` to `last` - 1."""
    is_list = isinstance(self.rows, list)
    rows = self.rows[first:last] if is_list else self.rows.select(range(first, last))
    return dataclasses.replace(self, rows=rows, first=self.first + first)

  def read(
    self, convert: Callable[[Row, str], Item], counts: dict[str, int]
  ) -> Iterator[tuple[int, str, Item]]:
    """Yields (index, location, convert(row, location)) of each row.

    Args:
      convert: raises UserError for a row that cannot be read.
      counts: its 'dropped_bad' is incremented for such a row, with `reading.drop_bad`.

    Raises:
      UserError: a row cannot be read; `NoRowsLeftError` with `reading.drop_bad`, if none can.
    """
    remarks = Remarks(self.reading.log)
    for index, location, row in self.located():
      item = read_row(row, location, convert, self.reading, remarks.say)
      if item is None:
        counts['dropped_bad'] = counts.get('dropped_bad', 0) + 1
      else:
        yield index, location, item
    self.check_any_read(remarks, counts)

  def located(self) -> Iterator[tuple[int, str, Any]]:
    """Yields (index, location, row as it is in the source) of each row, for `read_row`."""
    return ((index, self.location(index), row) for index, row in self._indexed())

  def check_any_read(self, remarks: 'Remarks', counts: Mapping[str, int]) -> None:
    """Raises NoRowsLeftError if every row was dropped because it cannot be read."""
    if counts.get('dropped_bad') and counts['dropped_bad'] == len(self):
      error = remarks.said[_DROPPED].removeprefix(_DROPPED)
      raise NoRowsLeftError(f'{self.name}: none of its {len(self)} rows can be read; {error}')

  def _indexed(self) -> Iterator[tuple[int, Any]]:
    """Yields (index, row), and names the row where reading the file fails."""
    rows, index = self._unchanged(), 0
    while True:
      try:
        row = next(rows)
      except StopIteration:
        return
      except Exception as error:  # of the library that decodes the file
        raise UserError(f'{self.location(index)}: cannot be read: {first_line(error)}') from error
      yield index, row
      index += 1

  def _unchanged(self) -> Iterator[Any]:
    return iter(self.rows)


@dataclasses.dataclass(frozen=True)
class JoinedRows(Rows):
  """Rows of several sources one after another; `rows` is their list of `Rows`.

  Attributes:
    weights: how many times each source is read: 2 repeats every row, 0.5 leaves out every other.
  """

  weights: tuple[float, ...] = ()

  @functools.cached_property
  def _ends(self) -> list[int]:
    ends, total = [], 0
    for part, weight in zip(self.rows, self.weights, strict=True):
      total += round(len(part) * weight)
      ends.append(total)
    return ends

  def _find(self, index: int) -> tuple[Rows, int]:
    """Returns the source of a row, and the row's index there."""
    number = bisect_right(self._ends, index)
    start = self._ends[number - 1] if number else 0
    # Spread evenly: a share of a source has rows of all of it.
    return self.rows[number], int((index - start) / self.weights[number])

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Row:
    part, number = self._find(range(len(self))[index])
    return part[number]

  def location(self, index: int) -> str:
    """Returns file and row for an error."""
    part, number = self._find(index)
    return part.location(number)

  def _unchanged(self) -> Iterator[Any]:
    for part, weight in zip(self.rows, self.weights, strict=True):
      if weight == 1:
        yield from part.rows
      else:
        yield from (part.rows[int(i / weight)] for i in range(round(len(part) * weight)))
