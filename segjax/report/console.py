"""What a person sees while a run goes on: lines, progress bars and tables."""

import sys
from collections.abc import Sequence

from tqdm import tqdm


def say(text: str) -> None:
  """One line, at once, clear of any progress bar."""
  tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


class ProgressBar:
  """A bar for one stage, with the metrics in `show` beside it."""

  def __init__(self, name: str, total: int, show: Sequence[str]):
    self._show = list(show)
    # A log file gets a line every ten seconds, a terminal a smooth bar.
    interval = 0.1 if sys.stdout.isatty() else 10
    self._bar = tqdm(
      total=total, desc=f'{name:10}', mininterval=interval, file=sys.stdout, dynamic_ncols=True
    )

  def update(self, done: int, values: dict[str, float]) -> None:
    """Moves the bar to `done` steps."""
    shown = {name: f'{values[name]:.3g}' for name in self._show if name in values}
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update(done - self._bar.n)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  """Prints a table, first column to the left, the others to the right."""
  from rich.console import Console
  from rich.table import Table

  made = Table(title=title, title_justify='left')
  for i, column in enumerate(columns):
    made.add_column(column, justify='left' if i == 0 else 'right', no_wrap=True)
  for row in rows:
    made.add_row(*row)
  Console(width=None if sys.stdout.isatty() else 100, file=sys.stdout).print(made)
