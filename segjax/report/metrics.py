"""Metrics of a stage: read a step late, written as JSON lines and TensorBoard curves.

Drawing on the console is `console`'s job.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, Self

import jax

from segjax.report.console import ProgressBar


class BadStepError(RuntimeError):
  """Too many steps in a row whose loss or gradient was not finite."""


class MetricLog:
  """Takes the metrics of step k when step k is dispatched, and reads those of step k - 1.

  So the host never waits for the device. A step with `bad` > 0 was left out by the jitted step;
  `max_bad_steps` of them in a row raise BadStepError, which names step and metric.
  """

  def __init__(self, directory: Path, name: str, total: int, max_bad_steps: int, show: list[str]):
    from tensorboardX import SummaryWriter

    directory.mkdir(parents=True, exist_ok=True)
    self._file = (directory / 'metrics.jsonl').open('a', encoding='utf-8')
    self._curves = SummaryWriter(str(directory / 'tensorboard'))
    self._bar = ProgressBar(name, total, show)
    self._pending: tuple[int, dict[str, Any]] | None = None
    self._max_bad_steps = max_bad_steps
    self._bad_steps = 0
    self._clock = time.monotonic()
    self.last: dict[str, float] = {}

  def __enter__(self) -> Self:
    return self

  def __exit__(self, error: type | None, *_: object) -> None:
    if error is None:
      self.flush()
    self._bar.close()
    self._curves.close()
    self._file.close()

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of `step` and writes those of the step before."""
    pending, self._pending = self._pending, (step, metrics)
    if pending is not None:
      self._write(*pending)

  def flush(self) -> None:
    """Writes what is pending; raises BadStepError as `log` does."""
    pending, self._pending = self._pending, None
    if pending is not None:
      self._write(*pending)

  def _write(self, step: int, metrics: dict[str, Any]) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    now = time.monotonic()
    values['seconds'], self._clock = now - self._clock, now
    self.last = values
    # JSON has no NaN: a value that is not finite is written as its name.
    clean = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
    self._file.write(json.dumps({'step': step} | clean) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._curves.add_scalar(name, value, step)
    self._bar.update(step + 1, values)
    self._watch(step, values)

  def _watch(self, step: int, values: dict[str, float]) -> None:
    self._bad_steps = self._bad_steps + 1 if values.get('bad') else 0
    if self._bad_steps < self._max_bad_steps:
      return
    names = [k for k, v in values.items() if not math.isfinite(v)] or ['loss or gradient norm']
    raise BadStepError(
      f'step {step}: {", ".join(names)} not finite, {self._bad_steps} step(s) in a row '
      f'(config.max_bad_steps={self._max_bad_steps}). Lower the learning rate or look at the data '
      'of this step; the state from before it is saved.'
    )
