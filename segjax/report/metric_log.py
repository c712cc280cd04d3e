"""Metrics of a stage: read a step late, written as JSON lines, TensorBoard curves and W&B.

Drawing on the console is `console`'s job, what the names mean `glossary`'s, what to worry about
`watch`'s.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from segjax import processes
from segjax.errors import UserError
from segjax.report.alerts import AlertMonitor
from segjax.report.console import ProgressBar, log
from segjax.report.timing import compiles
from segjax.storage import read_json_lines, truncate_json_lines

FILE = 'metrics.jsonl'
TOKENS, FLOPS = 'perf/tokens', 'perf/flops'  # of a step; what rates are made of, not logged

_NO_DATA = 'reward/by_position/'  # left out of a step that has none for them


_Pending = tuple[int, dict[str, Any], float]  # a step, its metrics, its seconds


class TooManySkippedStepsError(UserError):
  """Too many steps in a row whose loss or gradient was not finite."""


@dataclasses.dataclass(frozen=True)
class Options:
  """How a stage's metrics are kept.

  Attributes:
    max_skipped_steps: in a row, before TooManySkippedStepsError.
    wandb_project: also goes there; '' for nowhere.
    line_every: steps between two lines on the console; 0 for none.
    peak_flops: of all devices together, bfloat16 FLOP/s; 0 where it is not known.
  """

  max_skipped_steps: int = 1
  wandb_project: str = ''
  line_every: int = 0
  peak_flops: float = 0.0


class MetricLog:
  """Takes the metrics of step k when step k is dispatched, and reads those of step k - 1.

  So the host never waits for the device. Of several processes the first writes. A step with
  `bad` > 0 was left out by the jitted step; too many of them in a row raise BadStepError, which
  names step and metric. What it keeps in memory does not grow with the number of steps.

  Attributes:
    last: the metrics of the last step read; after a restart, those on file.
    evaluated: the newest figures of evaluation (eval/...), which not every step has.
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
    directory.mkdir(parents=True, exist_ok=True)
    self.last: dict[str, float] = {}
    self.evaluated: dict[str, float] = {}
    self._bad_steps, self._watch = 0, AlertMonitor()
    for values in read_json_lines(directory / FILE):
      if values['step'] >= start:
        continue
      self._keep({k: float(v) for k, v in values.items()})
      self._count_bad(self.last)
      self._watch.look(self.last)
    processes.barrier('metrics')
    first = processes.is_first()
    if first:
      truncate_json_lines(directory / FILE, start)
    self._file = (directory / FILE if first else Path(os.devnull)).open('a', encoding='utf-8')
    self._curves = SummaryWriter(
      str(directory / 'tensorboard'), purge_step=start or None, write_to_disk=first
    )
    project = self._options.wandb_project
    self._wandb = _wandb_run(project, directory) if project and first else None
    self._bar, self._show = bar, show
    self._pending: _Pending | None = None
    self._clock = time.monotonic()

  def __enter__(self) -> 'MetricLog':
    return self

  def __exit__(self, error: type | None, *_: object) -> None:
    try:
      if error is None:
        self.flush()
      elif error is TooManySkippedStepsError and self._pending is not None:
        self._write(*self._pending)  # the step dispatched after the bad one
    finally:
      self._bar.close()
      self._curves.close()
      self._file.close()
      if self._wandb is not None:
        self._wandb.finish()

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of `step` and writes those of the step before."""
    now = time.monotonic()
    pending, self._pending = self._pending, (step, metrics, now - self._clock)
    self._clock = now
    self._read(pending)

  def flush(self) -> None:
    """Writes what is pending; raises BadStepError as `log` does."""
    pending, self._pending = self._pending, None
    self._read(pending)

  def _read(self, pending: '_Pending | None') -> None:
    if pending is not None:
      self._write(*pending)
      self._stop_if_bad(pending[0], self.last)

  def _write(self, step: int, metrics: dict[str, Any], seconds: float) -> None:
    values = {name: float(value) for name, value in processes.to_host(metrics).items()}
    values = {k: v for k, v in values.items() if not (k.startswith(_NO_DATA) and math.isnan(v))}
    values['timing/step'] = seconds  # between two that were dispatched
    values |= _rates(values, self._options.peak_flops)
    self._keep(values)
    # JSON has no NaN: a value that is not finite is written as its name.
    clean = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
    self._file.write(json.dumps({'step': step} | clean) + '\n')
    self._file.flush()
    for name, value in values.items():
      if math.isfinite(value):
        self._curves.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)
    self._tell(step, values)

  def _keep(self, values: dict[str, float]) -> None:
    self.last = values
    self.evaluated |= {k: v for k, v in values.items() if k.startswith('eval/')}

  def _tell(self, step: int, values: dict[str, float]) -> None:
    shown = [f'{_short(name)} {values[name]:.3g}' for name in self._show if name in values]
    speed = values.get('perf/tokens_per_second')
    speed = [] if speed is None else [f'{_in_thousands(speed)} tok/s']
    self._bar.update(step + 1, ', '.join([*speed, *shown[:2]]))
    every = self._options.line_every
    if every and (step + 1) % every == 0:
      log(f'step {step + 1}: {", ".join([*shown, *speed])}', self._bar.stage)
    for warning in self._watch.look(values):
      log(f'warning: step {step + 1}: {warning}', self._bar.stage)

  def _count_bad(self, values: dict[str, float]) -> None:
    self._bad_steps = self._bad_steps + 1 if values.get('skipped_updates') else 0

  def _stop_if_bad(self, step: int, values: dict[str, float]) -> None:
    self._count_bad(values)
    if not self._bad_steps:
      return
    most = self._options.max_skipped_steps
    names = [k for k, v in values.items() if not math.isfinite(v)]
    why = f'{", ".join(names)} not finite'
    if not names:
      large = [
        f'{k} {values[k]:.3g}' for k in ('objective/kl', 'reward/token_abs_max') if k in values
      ]
      why = f'{", ".join(large) or "loss or gradient norm"} beyond bounds'
    text = (
      f'step {step}: {why}, {self._bad_steps} step(s) in a row (config.max_skipped_steps={most})'
    )
    if self._bad_steps < most:
      log(f'warning: {text}; what was learned in it is left out')
      return
    raise TooManySkippedStepsError(
      f'{text}. Lower the learning rate, or look at the rows of this step.'
    )


def _rates(values: dict[str, float], peak_flops: float) -> dict[str, float]:
  """Tokens per second, share of the devices' peak, memory, compiles; takes what they are made of.

  perf/mfu = model FLOPs of the step / (seconds · peak FLOP/s of all devices), Chowdhery et al.
  2022, https://arxiv.org/abs/2204.02311.
  """
  tokens, flops = values.pop(TOKENS, None), values.pop(FLOPS, None)
  seconds = max(values['timing/step'], 1e-9)
  found = {'perf/num_compiles': float(compiles())}
  if tokens is not None:
    found['perf/tokens_per_second'] = tokens / seconds
  if flops is not None and peak_flops:
    found['perf/mfu'] = flops / seconds / peak_flops
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    found['perf/peak_memory_gib'] = stats['peak_bytes_in_use'] / 2**30
  return found


def _short(name: str) -> str:
  return name.rpartition('/')[2]


def _in_thousands(number: float) -> str:
  return f'{number / 1000:.1f}k' if number >= 1000 else f'{number:.0f}'


def _wandb_run(project: str, directory: Path) -> Any:
  import wandb

  name = '/'.join(directory.absolute().parts[-2:])  # the run's directory and the stage
  return wandb.init(project=project, name=name, dir=str(directory))
