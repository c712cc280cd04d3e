"""What a run prints at its end: in one sentence what it has reached, its time, its report."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segjax.report.console import console_width, format_duration, log
from segjax.report.metric_log import METRICS_FILE
from segjax.run.stage import Stage
from segjax.storage import read_json_lines


def log_end(headlines: Sequence[str], seconds: float, report: Path | None) -> None:
  """Prints the last headline of the stages that is not empty, the time, and the report's path."""
  log('')
  if sentence := next(filter(None, reversed(headlines)), ''):
    log(textwrap.fill(f'{sentence[0].upper()}{sentence[1:]}.', console_width()))
  where = f'; the report is {report}' if report else ''
  log(f'{format_duration(seconds)} in total{where}')


def describe_change(stage: Stage, metric: str, label: str) -> str:
  """Returns how a metric changed from the first to the last tenth of a stage's steps."""
  rows = read_json_lines(stage.directory / METRICS_FILE)
  values = [float(row[metric]) for row in rows if metric in row]
  if len(values) < 2:
    return ''
  count = max(1, len(values) // 10)
  first, last = np.mean(values[:count]), np.mean(values[-count:])
  verb = 'rose' if last > first else 'fell'
  steps = f'{len(values):,} steps' + (f' (means of {count:,} steps)' if count > 1 else '')
  return f'{label} {verb} from {first:.3f} to {last:.3f} in {steps}'
