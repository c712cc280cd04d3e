"""Times the metrics of a step, and measures whether memory grows with the number of steps."""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp

from segjax.report import metric_docs
from segjax.report.console import ProgressBar, table
from segjax.report.metric_log import MetricLog, Options

_POSITIONS = [f'reward/by_position/{k}' for k in range(1, 11)]


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  parser.add_argument('--steps', type=int, default=5_000)
  parser.add_argument('--step_seconds', type=float, default=1.0, help='time of a step of PPO')


def run(steps: int, step_seconds: float) -> dict:
  """Logs arrays under PPO's names to all sinks: JSON lines, TensorBoard, alerts, the console."""
  names = [n for entry in metric_docs.ENTRIES for n in entry.names if '*' not in n] + _POSITIONS
  values = {name: jnp.float32(0.5) for name in names if name != 'skipped_updates'}
  seconds, resident = [], 0
  with (
    tempfile.TemporaryDirectory() as directory,
    open(os.devnull, 'w') as null,
    contextlib.redirect_stdout(null),
  ):
    metric_log = MetricLog(
      Path(directory), ProgressBar('ppo', steps), names[:4], options=Options(line_every=5.0)
    )
    with metric_log:
      for step in range(steps):
        begin = time.perf_counter()
        metric_log.log(step, values)
        seconds.append(time.perf_counter() - begin)
        if step == steps // 10:  # after the allocations that happen once
          resident = _resident()
      growth = _resident() - resident
  micros = statistics.median(seconds) * 1e6
  share = micros / 1e6 / step_seconds
  table(
    f'{len(names)} metrics per step, median of {steps} steps',
    ('', ''),
    [
      ('time', f'{micros:.0f} µs'),
      (f'share of a step of {step_seconds:g} s', f'{share:.2%}'),
      ('growth of memory', f'{growth / 1024:.0f} KiB in {steps - steps // 10} steps'),
    ],
  )
  return {
    'metrics': len(names),
    'microseconds': round(micros, 1),
    'share_of_step': round(share, 5),
    'grown_kib': round(growth / 1024, 1),
    'steps': steps,
  }


def _resident() -> int:
  """Returns the resident bytes of this process."""
  pages = int(Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE')
