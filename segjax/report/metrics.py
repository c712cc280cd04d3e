"""Metrics of a stage: read a step late, written as JSON lines, TensorBoard curves and W&B.

Drawing on the console is `console`'s job.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segjax import processes
from segjax.report.console import ProgressBar, say
from segjax.report.timing import compiles

FILE = 'metrics.jsonl'


class BadStepError(RuntimeError):
  """Too many steps in a row whose loss or gradient was not finite."""


class MetricLog:
  """Takes the metrics of step k when step k is dispatched, and reads those of step k - 1.

  So the host never waits for the device. Of several processes the first writes. A step with
  `bad` > 0 was left out by the jitted step; `max_bad_steps` of them in a row raise BadStepError,
  which names step and metric.

  Attributes:
    last: the metrics of the last step read; after a restart, those on file.
  """

  def __init__(
    self,
    directory: Path,
    bar: ProgressBar,
    show: Sequence[str],
    *,
    start: int = 0,
    max_bad_steps: int = 1,
    wandb_project: str = '',
  ):
    from tensorboardX import SummaryWriter

    directory.mkdir(parents=True, exist_ok=True)
    before = _lines(directory / FILE, start)
    processes.barrier('metrics')
    self.last: dict[str, float] = {k: float(v) for k, v in before[-1].items()} if before else {}
    first = processes.is_first()
    if first:
      _rewrite(directory / FILE, before)
    self._file = (directory / FILE if first else Path(os.devnull)).open('a', encoding='utf-8')
    self._curves = SummaryWriter(
      str(directory / 'tensorboard'), purge_step=start or None, write_to_disk=first
    )
    self._wandb = _wandb_run(wandb_project, directory) if wandb_project and first else None
    self._bar, self._show = bar, show
    self._pending: tuple[int, dict[str, Any]] | None = None
    self._max_bad_steps = max_bad_steps
    self._bad_steps = _bad_at_the_end(before)
    self._clock = time.monotonic()

  def __enter__(self) -> 'MetricLog':
    return self

  def __exit__(self, error: type | None, *_: object) -> None:
    try:
      if error is None:
        self.flush()
      elif error is BadStepError and self._pending is not None:
        self._write(*self._pending)  # the step dispatched after the bad one
    finally:
      self._bar.close()
      self._curves.close()
      self._file.close()
      if self._wandb is not None:
        self._wandb.finish()

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of `step` and writes those of the step before."""
    pending, self._pending = self._pending, (step, metrics)
    self._read(pending)

  def flush(self) -> None:
    """Writes what is pending; raises BadStepError as `log` does."""
    pending, self._pending = self._pending, None
    self._read(pending)

  def _read(self, pending: tuple[int, dict[str, Any]] | None) -> None:
    if pending is not None:
      self._write(*pending)
      self._watch(pending[0], self.last)

  def _write(self, step: int, metrics: dict[str, Any]) -> None:
    values = {name: float(value) for name, value in processes.fetch(metrics).items()}
    now = time.monotonic()
    values['seconds'], self._clock = now - self._clock, now
    values['compiles'] = compiles()
    self.last = values
    # JSON has no NaN: a value that is not finite is written as its name.
    clean = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
    self._file.write(json.dumps({'step': step} | clean) + '\n')
    self._file.flush()
    for name, value in values.items():
      if math.isfinite(value):
        self._curves.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)
    shown = [f'{name}={values[name]:.3g}' for name in self._show if name in values]
    self._bar.update(step + 1, ', '.join(shown))

  def _watch(self, step: int, values: dict[str, float]) -> None:
    self._bad_steps = self._bad_steps + 1 if values.get('bad') else 0
    if not self._bad_steps:
      return
    names = [k for k, v in values.items() if not math.isfinite(v)]
    why = f'{", ".join(names)} not finite'
    if not names:
      large = [f'{k} {values[k]:.3g}' for k in ('kl', 'reward_token_max') if k in values]
      why = f'{", ".join(large) or "loss or gradient norm"} beyond bounds'
    text = f'step {step}: {why}, {self._bad_steps} step(s) in a row '
    text += f'(config.max_bad_steps={self._max_bad_steps})'
    if self._bad_steps < self._max_bad_steps:
      say(f'warning: {text}; what was learned in it is left out')
      return
    raise BadStepError(f'{text}. Lower the learning rate, or look at the rows of this step.')


def _bad_at_the_end(lines: list[dict[str, Any]]) -> int:
  """How many of the last steps in a row were bad."""
  good = (i for i, line in enumerate(reversed(lines)) if not float(line.get('bad', 0)))
  return next(good, len(lines))


def _lines(path: Path, before: int) -> list[dict[str, Any]]:
  """The lines of steps before `before`: a step that is run again must not stand there twice."""
  found = []
  for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
    try:
      values = json.loads(line)
    except ValueError:  # the process was stopped while it wrote this line
      continue
    if values['step'] < before:
      found.append(values)
  return found


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
  """Puts the lines in place of the file at once: a process that is killed here loses none."""
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
  partial.replace(path)


def _wandb_run(project: str, directory: Path) -> Any:
  import wandb

  name = '/'.join(directory.absolute().parts[-2:])  # the run's directory and the stage
  return wandb.init(project=project, name=name, dir=str(directory))
