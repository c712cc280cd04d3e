"""Shows the steps of a stage on the console: a bar, and lines of metrics with the time left."""

import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from segjax.report.console import NO_BREAK, ProgressBar, log

# Names that the last part of a metric's name does not explain.
_LABELS = {
  'objective/kl': 'KL',
  'response/length_mean': 'length',
  'segments/per_response': 'segments',
  'eval/kl': 'KL',
  'eval/length_mean': 'length',
  'eval/length_baseline_accuracy': 'accuracy of preferring the longer',
  'eval/ece': 'calibration error',
}
_FIRST = ('eval/gold', 'eval/reward', 'eval/accuracy', 'eval/loss')  # of an evaluation's line
_ZERO_BELOW = 1e-6  # rounding errors of float32 are shown as 0
_MAX_SHARE, _MAX_SECONDS = 0.01, 60  # in a long stage a line is due after that share of its time


class StepLines:
  """Moves the bar with each step, and prints lines: by time, at evaluations, at the end.

  Args:
    bar: the stage's bar.
    show: metrics on a line, the first two also next to the bar.
    every: seconds between two lines, more in long stages; 0 for none.
    seconds_after: (seconds of this stage in total) -> about those of the stages after it.
  """

  def __init__(
    self,
    bar: ProgressBar,
    show: Sequence[str],
    every: float,
    seconds_after: Callable[[float], float | None],
  ):
    self._bar, self._show, self._every, self._seconds_after = bar, show, every, seconds_after
    self._begun = self._printed = time.monotonic()
    self._first: tuple[int, float] | None = None  # the first step that ended here, and when
    self._unprinted = ''

  def update(self, step: int, values: dict[str, float]) -> None:
    """Shows a step, from 0, and its metrics."""
    done, now = step + 1, time.monotonic()
    self._first = self._first or (done, now)
    shown = format_metrics(values, self._show)
    speed = values.get('perf/tokens_per_second')
    speed = [] if speed is None else [f'{_in_thousands(speed)}{NO_BREAK}tok/s']
    self._bar.update(done, ', '.join([*speed, *shown[:2]]))
    if not self._every:
      return
    left = self._time_left(done, now)
    title = f'step {done} of {self._bar.total}'
    self._unprinted = f'{title}: {", ".join([*shown, *speed])}{left and f"; {left}"}'
    held_out = format_metrics(values, sorted(filter(_is_held_out, values), key=_position))
    limit = max(self._every, min(_MAX_SECONDS, _MAX_SHARE * (now - self._begun)))
    if held_out or now - self._printed >= limit:
      self._print()
    if held_out:
      log(f'{title}, held out: {", ".join(held_out)}', self._bar.stage)

  def close(self) -> None:
    """Prints the last step unless it is printed, and ends the bar."""
    if self._unprinted:
      self._print()
    self._bar.close()

  def _print(self) -> None:
    log(self._unprinted, self._bar.stage)
    self._printed, self._unprinted = time.monotonic(), ''

  def _time_left(self, done: int, now: float) -> str:
    first, first_at = self._first
    if done in (first, self._bar.total):  # in the first step programs are compiled
      return ''
    left = (self._bar.total - done) * (now - first_at) / (done - first)
    text = f'{tqdm.format_interval(left)}{NO_BREAK}left'
    after = self._seconds_after(now - self._begun + left)
    return f'{text}, whole run about {tqdm.format_interval(left + after)}' if after else text


def format_metrics(values: dict[str, float], names: Sequence[str]) -> list[str]:
  """Returns 'label value' of those of the metrics that have a value."""
  return [f'{_label(name)}{NO_BREAK}{_number(values[name])}' for name in names if name in values]


def _number(value: float) -> str:
  return f'{0 if abs(value) < _ZERO_BELOW else value:.3g}'


def _is_held_out(name: str) -> bool:
  return name.startswith('eval/')


def _position(name: str) -> int:
  return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def _label(name: str) -> str:
  return _LABELS.get(name) or name.rpartition('/')[2].replace('_', ' ')


def _in_thousands(number: float) -> str:
  return f'{number / 1000:.1f}k' if number >= 1000 else f'{number:.0f}'
