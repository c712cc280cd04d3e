"""Console output of a run: lines, progress bars and tables."""

import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from segjax import processes

Item = TypeVar('Item')

NO_BREAK = '\N{NO-BREAK SPACE}'  # printed as a space

_STAGE_WIDTH = 12  # columns of the stage's name, which begins each of its lines
_BAR = '{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
_NARROW_BAR = '{desc}|{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}'  # for 80 columns
_SECONDS = 15  # between two lines of a bar in a log file
_LOG_WIDTH = 100  # columns of tables and bars in a log file
_BOLD, _NORMAL = '\033[1m', '\033[0m'


def log(text: str, stage: str = '') -> None:
  """Prints a line immediately and clear of any progress bar; a stage's name begins its lines.

  On a terminal, lines of a stage are wrapped at its width.

  Only the first of several processes prints, because all of them do the same.
  """
  if not processes.is_first():
    return
  if stage:
    text = _wrap(f'{stage:<{_STAGE_WIDTH - 1}} {text}', indent=_STAGE_WIDTH)
  tqdm.write(text.replace(NO_BREAK, ' '), file=sys.stdout)
  sys.stdout.flush()


def _wrap(text: str, indent: int) -> str:
  """Wraps lines at the width of a terminal, with an indent below the first; not in a log file.

  A path stays whole, and so do words that are joined by NO_BREAK.
  """
  if not sys.stdout.isatty():
    return text
  return '\n'.join(
    textwrap.fill(
      line,
      console_width(),
      subsequent_indent=' ' * indent,
      break_long_words=False,
      break_on_hyphens=False,
    )
    for line in text.splitlines()
  )


class ProgressBar:
  """A stage's progress: a bar on a terminal, a full line every 15 seconds in a log file.

  Args:
    stage: name of the stage.
    total: its number of steps.
    start: steps that are done.
    in_log_file: False if other lines show the progress in a log file.
  """

  def __init__(self, stage: str, total: int, start: int = 0, in_log_file: bool = True):
    self.stage, self.total = stage, total
    self._on_terminal = sys.stdout.isatty() and processes.is_first()
    self._prints_lines = in_log_file and not self._on_terminal
    self._meter = {'total': total, 'prefix': f'{stage:<{_STAGE_WIDTH - 1}} ', 'bar_format': _BAR}
    self._start, self._done, self._note = start, start, ''
    self._begun = self._printed = time.monotonic()
    is_narrow = shutil.get_terminal_size().columns < _LOG_WIDTH
    self._bar = tqdm(
      total=total,
      initial=start,
      desc=self._meter['prefix'],
      bar_format=_NARROW_BAR if is_narrow else _BAR,
      file=sys.stdout,
      dynamic_ncols=True,
      disable=not self._on_terminal,
    )

  def update(self, done: int, note: str = '') -> None:
    """Moves the bar to `done` of the total and shows a note after it."""
    note = note.replace(NO_BREAK, ' ')
    self._bar.set_postfix_str(note, refresh=False)
    self._bar.update(done - self._done)
    self._done, self._note = done, note
    is_due = time.monotonic() - self._printed > _SECONDS and done < self._meter['total']
    if is_due and self._prints_lines:
      self._print()

  def close(self) -> None:
    """Ends the bar in its present state."""
    self._bar.close()
    if self._prints_lines and self._done > self._start:
      self._print()

  def _print(self) -> None:
    self._printed = time.monotonic()
    elapsed = self._printed - self._begun
    line = tqdm.format_meter(
      self._done,
      elapsed=elapsed,
      initial=self._start,
      postfix=self._note,
      ncols=_LOG_WIDTH,
      **self._meter,
    )
    log(line.rstrip())


def track(stage: str, items: Iterable[Item], total: int, note: str = '') -> Iterator[Item]:
  """Yields the items and moves a bar after each."""
  bar = ProgressBar(stage, total)
  for done, item in enumerate(items, 1):
    yield item
    bar.update(done, note)
  bar.close()


def format_duration(seconds: float) -> str:
  """Formats seconds as '42 s', '3 min 5 s' or '2 h 10 min'."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def console_width() -> int:
  """Returns the columns of the terminal, or of tables in a log file."""
  return shutil.get_terminal_size().columns if sys.stdout.isatty() else _LOG_WIDTH


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  """Prints a table, the first column aligned to the left, the others to the right.

  Where the table is wider than the terminal (100 columns in a log file), the first column's cells
  are shortened.
  """
  if not processes.is_first():
    return
  on_terminal = sys.stdout.isatty()
  widths = [max(map(disp_len, cells)) for cells in zip(columns, *rows, strict=True)]
  others = sum(width + 2 for width in widths[1:])
  widths[0] = min(widths[0], max(console_width() - others, 8))
  lines = [_row(cells, widths) for cells in (columns, *rows)]
  lines.insert(1, '─' * (widths[0] + others))
  if title:
    lines.insert(0, f'{_BOLD}{title}{_NORMAL}' if on_terminal else title)
  log('\n'.join([*lines, '']))


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
  first = cells[0]
  if disp_len(first) > widths[0]:
    first = disp_trim(first, widths[0] - 1) + '…'
  # Spaces are counted here, because str.ljust takes a wide character for one column.
  row = first + ' ' * (widths[0] - disp_len(first))
  for cell, width in zip(cells[1:], widths[1:], strict=True):
    row += ' ' * (2 + width - disp_len(cell)) + cell
  return row.rstrip()
