"""What a person sees while a run goes on: lines, progress bars and tables."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from segjax import processes

Item = TypeVar('Item')

_COLUMN = 12  # the stage's name stands before each of its lines
_BAR = '{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
_NARROW = '{desc}|{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}'  # in 80 columns
_SECONDS = 15  # between two lines of a bar in a log file
_WIDTH = 100  # of tables and bars in a log file


def log(text: str, stage: str = '') -> None:
  """One line, at once, clear of any progress bar; a stage's lines begin with its name.

  Of several processes the first speaks, for all do the same.
  """
  if not processes.is_first():
    return
  tqdm.write(f'{stage:<{_COLUMN - 1}} {text}' if stage else text, file=sys.stdout)
  sys.stdout.flush()


class ProgressBar:
  """A bar for one stage: smooth on a terminal, now and then a whole line in a log file."""

  def __init__(self, stage: str, total: int, start: int = 0):
    self.stage = stage
    self._on_terminal = sys.stdout.isatty() and processes.is_first()
    self._meter = {'total': total, 'prefix': f'{stage:<{_COLUMN - 1}} ', 'bar_format': _BAR}
    self._start, self._done, self._note = start, start, ''
    self._begun = self._printed = time.monotonic()
    is_narrow = shutil.get_terminal_size().columns < _WIDTH
    self._bar = tqdm(
      total=total,
      initial=start,
      desc=self._meter['prefix'],
      bar_format=_NARROW if is_narrow else _BAR,
      file=sys.stdout,
      dynamic_ncols=True,
      disable=not self._on_terminal,
    )

  def update(self, done: int, note: str = '') -> None:
    """Moves the bar to `done` of the total, with a note beside it."""
    self._bar.set_postfix_str(note, refresh=False)
    self._bar.update(done - self._done)
    self._done, self._note = done, note
    is_due = time.monotonic() - self._printed > _SECONDS and done < self._meter['total']
    if is_due and not self._on_terminal:
      self._print()

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()
    if not self._on_terminal and self._done > self._start:
      self._print()

  def _print(self) -> None:
    self._printed = time.monotonic()
    elapsed = self._printed - self._begun
    line = tqdm.format_meter(
      self._done,
      elapsed=elapsed,
      initial=self._start,
      postfix=self._note,
      ncols=_WIDTH,
      **self._meter,
    )
    log(line.rstrip())


def track(stage: str, items: Iterable[Item], total: int, note: str = '') -> Iterator[Item]:
  """The items, with a bar that moves as each is done with."""
  bar = ProgressBar(stage, total)
  for done, item in enumerate(items, 1):
    yield item
    bar.update(done, note)
  bar.close()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  """Prints a table, first column to the left, the others to the right."""
  from rich import box
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  if not processes.is_first():
    return
  made = Table(title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD)
  made.show_edge = False
  for i, column in enumerate(columns):
    made.add_column(column, justify='left' if i == 0 else 'right', no_wrap=True)
  for row in rows:
    made.add_row(*map(Text, row))  # as Text, for cells may hold what rich takes for markup
  Console(width=None if sys.stdout.isatty() else _WIDTH, file=sys.stdout).print(made, '')
