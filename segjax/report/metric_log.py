"""Logs the metrics of a stage, a step late: JSON lines, TensorBoard, W&B, and lines on the console.

Printing is done by `step_lines`; `metric_docs` describes the metrics, `alerts` warns about them.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from segjax import processes
from segjax.errors import UserError
from segjax.report.alerts import AlertMonitor
from segjax.report.console import ProgressBar, log
from segjax.report.step_lines import StepLines
from segjax.report.timing import Part, compiles
from segjax.report.wandb_run import WandbRun
from segjax.storage import (
  is_before,
  make_directory,
  read_json_lines,
  truncate_json_lines,
  writing,
)
from segjax.train.throughput import FLOPS, TOKENS

METRICS_FILE = 'metrics.jsonl'
HASHES = 'weights/'  # prefix of metrics that have no curve

_MAY_BE_EMPTY = 'reward/by_position/'  # NaN where no segment is in that tenth: not logged


@dataclasses.dataclass(frozen=True)
class _Pending:
  """A dispatched step whose metrics have not been read.

  Attributes:
    part: its time, from the completion of the step before it to its own.
    num_compiles: programs compiled so far.
  """

  step: int
  metrics: dict[str, Any]
  part: Part
  num_compiles: int


class TooManySkippedStepsError(UserError):
  """Too many consecutive steps whose update was skipped."""


@dataclasses.dataclass(frozen=True)
class Options:
  """How a stage's metrics are logged.

  Attributes:
    max_skipped_steps: consecutive steps with skipped updates that raise TooManySkippedStepsError.
    wandb_project: Weights & Biases project to log to as well; '' for none.
    line_every: seconds between two lines on the console; 0 for none.
    peak_flops: peak of all devices together, bfloat16 FLOP/s; 0 if unknown.
    seconds_after: (seconds of the stage) -> about those of the stages after it; None if unknown.
  """

  max_skipped_steps: int = 1
  wandb_project: str = ''
  line_every: float = 0.0
  peak_flops: float = 0.0
  seconds_after: Callable[[float], float | None] = lambda _: None


class MetricLog:
  """Accepts the metrics of step k when step k is dispatched, and reads those of step k - 1.

  So the host does not wait for the devices. Only the first of several processes writes. A step
  with `skipped_updates` > 0 left the training state unchanged; too many consecutive ones raise
  TooManySkippedStepsError, which names step and metric. Memory does not grow with the number of
  steps.

  Attributes:
    last: the metrics of the last step read; after a restart, those on file.
    evaluated: the newest metrics of evaluation (eval/...), which not every step has.
  """

  def __init__(
    self,
    directory: Path,
    bar: ProgressBar,
    show: Sequence[str],
    *,
    start: int = 0,
    options: Options | None = None,
  ):
    from tensorboardX import SummaryWriter

    self._options = options or Options()
    make_directory(directory)
    self.last: dict[str, float] = {}
    self.evaluated: dict[str, float] = {}
    self._skipped_steps, self._alerts = 0, AlertMonitor()
    for values in read_json_lines(directory / METRICS_FILE):
      if not is_before(values, start):
        continue
      self._keep({k: float(v) for k, v in values.items() if _is_number(v)})
      self._count_skipped(self.last)
      self._alerts.update(self.last)
    processes.barrier('metrics')
    first = processes.is_first()
    if first:
      truncate_json_lines(directory / METRICS_FILE, start)
    path = directory / METRICS_FILE if first else Path(os.devnull)
    with writing(path):
      self._file = path.open('a', encoding='utf-8')
    self._curves = SummaryWriter(
      str(directory / 'tensorboard'), purge_step=start or None, write_to_disk=first
    )
    project = self._options.wandb_project
    self._wandb = WandbRun(project, directory) if project and first else None
    self._stage = bar.stage
    self._lines = StepLines(bar, show, self._options.line_every, self._options.seconds_after)
    self._pending: _Pending | None = None
    self._last_part = Part()

  def __enter__(self) -> 'MetricLog':
    return self

  def __exit__(self, error: type | None, *_: object) -> None:
    try:
      if error is None:
        self.flush()
      elif error is TooManySkippedStepsError and self._pending is not None:
        self._write(self._pending)  # the step dispatched after the skipped one
    finally:
      self._lines.close()
      with writing(self._curves.logdir):
        self._curves.close()
      self._file.close()
      if self._wandb is not None:
        self._wandb.finish(failed=error is not None)

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    """Accepts the metrics of `step` and writes those of the step before."""
    pending = self._pending
    self._last_part = Part(self._last_part, metrics)
    self._pending = _Pending(step, metrics, self._last_part, compiles())
    self._read(pending)

  def flush(self) -> None:
    """Writes the pending metrics; raises TooManySkippedStepsError as `log` does."""
    pending, self._pending = self._pending, None
    self._read(pending)

  def _read(self, pending: '_Pending | None') -> None:
    if pending is not None:
      self._write(pending)
      self._raise_if_too_many_skipped(pending.step, self.last)

  def _write(self, pending: _Pending) -> None:
    step = pending.step
    values = {name: float(value) for name, value in processes.to_host(pending.metrics).items()}
    empty = [k for k, v in values.items() if k.startswith(_MAY_BE_EMPTY) and math.isnan(v)]
    for name in empty:
      del values[name]
    # Unless the step has measured its parts: then it is their sum.
    seconds = {'timing/step': pending.part.seconds, 'timing/compile': pending.part.compiling}
    values = seconds | values
    values |= _rates(values, self._options.peak_flops) | {'perf/num_compiles': pending.num_compiles}
    self._keep(values)
    # JSON has no NaN: a value that is not finite is written as its name.
    record = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
    with writing(self._file.name):
      self._file.write(json.dumps({'step': step} | record) + '\n')
      self._file.flush()
    curves = {k: v for k, v in values.items() if not k.startswith(HASHES)}
    for name, value in curves.items():
      if math.isfinite(value):
        self._curves.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(step, curves)
    self._lines.update(step, values)
    for alert in self._alerts.update(values):
      log(f'warning: step {step + 1}: {alert}', self._stage)

  def _keep(self, values: dict[str, float]) -> None:
    self.last = values
    self.evaluated |= {k: v for k, v in values.items() if k.startswith('eval/')}

  def _count_skipped(self, values: dict[str, float]) -> None:
    self._skipped_steps = self._skipped_steps + 1 if values.get('skipped_updates') else 0

  def _raise_if_too_many_skipped(self, step: int, values: dict[str, float]) -> None:
    self._count_skipped(values)
    if not self._skipped_steps:
      return
    limit = self._options.max_skipped_steps
    # NaN in tenths of a response in which no segment ends.
    names = [
      k
      for k, v in values.items()
      if not math.isfinite(v) and not k.startswith('reward/by_position/')
    ]
    reason = f'{", ".join(names)} not finite'
    if not names:
      bounded = ('objective/kl', 'reward/token_abs_max')
      large = [f'{k} {values[k]:.3g}' for k in bounded if k in values]
      reason = f'{", ".join(large) or "loss or gradient norm"} beyond bounds'
    text = (
      f'step {step + 1}: {reason}, {self._skipped_steps} step(s) in a row '
      f'(config.max_skipped_steps={limit})'
    )
    if self._skipped_steps < limit:
      log(f'warning: {text}; the update was skipped', self._stage)
      return
    raise TooManySkippedStepsError(
      f'{text}. Lower the learning rate, or check the rows of this step.'
    )


def _rates(values: dict[str, float], peak_flops: float) -> dict[str, float]:
  """Returns tokens per second, model FLOPs utilisation and peak memory.

  perf/mfu = model FLOPs of the step / (seconds · peak FLOP/s of all devices), Chowdhery et al.
  2022, https://arxiv.org/abs/2204.02311. An evaluation's work is not counted, nor its seconds.

  Removes the inputs of the rates, TOKENS and FLOPS, from `values`.
  """
  tokens, flops = values.pop(TOKENS, None), values.pop(FLOPS, None)
  seconds = max(values['timing/step'] - values.get('timing/evaluate', 0.0), 1e-9)
  rates = {}
  if tokens is not None:
    rates['perf/tokens_per_second'] = tokens / seconds
  if flops is not None and peak_flops:
    rates['perf/mfu'] = flops / seconds / peak_flops
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    rates['perf/peak_memory_gib'] = stats['peak_bytes_in_use'] / 2**30
  return rates


def _is_number(value: Any) -> bool:
  """Returns whether a value on file is a number, or the name of one that is not finite."""
  return isinstance(value, int | float) or value in ('nan', 'inf', '-inf')
